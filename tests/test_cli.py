# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, and messages where something cannot be done."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels
from kdkernels import backends, bench, cli, diagnostics

ROOT = Path(kdkernels.__file__).parents[1]


def shell(command):
    line = command.replace("kdkernels", f"{sys.executable} -m kdkernels", 1)
    return subprocess.run(line, shell=True, capture_output=True, text=True, cwd=ROOT)


def test_version_and_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"kdkernels {kdkernels.__version__}\n"
    assert cli.main([]) == 0
    assert "compare every loss on this machine" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough():
    done = shell("kdkernels info | head -1")
    assert done.stdout == f"kdkernels {kdkernels.__version__}\n" and not done.stderr


def test_check_ends_with_a_verdict(monkeypatch, capsys):
    found = {"a": {"reference": None, "cpu": None}, "b": {"reference": None, "cpu": "off by 1"}}
    monkeypatch.setattr(diagnostics, "check", lambda device: found)
    assert cli.main(["check"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "2 losses, 1 failed"
    del found["b"]
    assert cli.main(["check"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 losses, 0 failed"


def test_devices_that_are_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    absent = f"device 'cuda' is not there: torch {torch.__version__} finds 0 GPUs"
    for command in (["check"], ["bench", "--shapes", "8x10"]):
        assert cli.main([*command, "--device", "cuda"]) == 2
        assert capsys.readouterr().err == f"{command[0]}: {absent}.\n"
        assert cli.main([*command, "--device", "foo"]) == 2
        message = f"{command[0]}: device must be cpu, cuda or cuda:N, got 'foo'.\n"
        assert capsys.readouterr().err == message
    with pytest.raises(ValueError, match=re.escape(absent)):
        kdkernels.check(device="cuda")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--threads -3", "--threads: must be an integer of at least 1, got -3"),
        ("--threads 1.5", "--threads: must be an integer of at least 1, got 1.5"),
        ("--repeats 1", "--repeats: must be an integer of at least 2, got 1"),
        ("--near-zero rkd_loss", "--near-zero: 'rkd_loss' is no divergence of rows here"),
        ("--losses dkd_los", "--losses: 'dkd_los' is no loss here; did you mean dkd_loss"),
        ("--losses zzz", "--losses: 'zzz' is no loss here; there are kl_div, reverse_kl_div,"),
    ],
)
def test_bench_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["huge", "64", "0x5", "-3x5", "64x10x10"])
def test_bench_shapes(shape, capsys):
    assert bench.main(["--losses", "kl_div", f"--shapes={shape}"]) == 2
    assert f"sizes such as 16x100; got '{shape}'" in capsys.readouterr().err


def test_info_says_a_reason_once(monkeypatch):
    """Whatever is not built, for as many families as it would have run."""
    whole = backends.verdict

    def verdict(family, backend, device_type):
        found = whole(family, backend, device_type)
        lost = backend == "cpu" and "composite" not in found.reason
        return backends.Verdict(False, "gone with the wind") if lost else found

    monkeypatch.setattr(backends, "verdict", verdict)
    text = diagnostics.format_info(diagnostics.info())
    assert text.count("gone with the wind") == 1
    assert "    cpu, triton, cuda: no, composite by design: a sort of every row" in text


def test_info_without_the_numpy_extension():
    """The CPU kernels are there all the same, and their instruction sets known."""
    data = diagnostics.info()
    data["cpu"] |= {"isa": None, "isa_levels": ["baseline", "avx2"]}
    data["build"]["extensions"]["_native"] = "not built: No module named 'pybind11'"
    text = diagnostics.format_info(data)
    assert "kernels for baseline, avx2\n" in text
    assert "'pybind11'; kdkernels.numpy needs it, and nothing else does\n" in text
