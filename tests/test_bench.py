# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: baselines that are no straw men, and measurements that measure what they say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdkernels import bench
from kdkernels.bench import measure, rows
from kdkernels.testing import LOSSES

ROOT = Path(__file__).parents[1]
KERNELS = [backend for backend in ("cpu",) if backend in LOSSES["kl_div"].backends()]


class Operators(TorchDispatchMode):
    """Counts operators other than views, and the largest tensor one of them returns."""

    def __init__(self):
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.count += 1
            sizes = [x.nbytes for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            self.largest = max(self.largest, *sizes)
        return result


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    # Counted in mdistiller's and RepDistiller's own code, at 512x1000.
    [("kl_div", 10, 8), ("kd_loss", 15, 13)],
)
def test_eager_baseline_is_the_suites_formulation(name, forward, backward):
    loss = LOSSES[name]
    inputs = measure.make_inputs(loss, (512, 1000), torch.float32, "cpu")
    with Operators() as forwards:
        value = loss.eager(**inputs, **loss.hyper)
    with Operators() as backwards:
        value.backward()
    assert forwards.count == pytest.approx(forward, rel=0.2)
    assert backwards.count == pytest.approx(backward, rel=0.2)
    largest = max(forwards.largest, backwards.largest)
    assert largest == pytest.approx(512 * 1000 * 4, rel=0.2)


@pytest.mark.skipif(not KERNELS, reason="no kernel runs on this machine's CPU")
@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_extra_memory_is_one_gradient(loss, upstream):
    """And O(rows) on top; nothing but these with ``inplace=True``."""
    count, classes = 64, 1000
    inputs = measure.make_inputs(loss, (count, classes), torch.float32, "cpu")
    per_row = 64 * count + 4096
    for backend in KERNELS:

        def call(given, backend=backend):
            return loss(given, backend=backend)

        memory = rows._counts(loss, backend, call, inputs, upstream, "cpu")
        assert memory["extra_bytes"] <= count * classes * 4 + per_row
        assert memory["inplace_extra_bytes"] <= per_row


def test_allocations_are_counted_at_their_peak():
    """Two tensors of 4000 bytes are alive at once, not three; scalars are a few bytes more."""

    def work():
        a = torch.ones(1000)
        b = a + 1
        del a
        c = torch.ones(500)
        return b, c

    assert measure.extra_bytes(work, "cpu") == pytest.approx(8000, rel=0.01)


def test_resident_memory_sees_every_allocation():
    size = 64 * 2**20
    measured = measure.resident_bytes(lambda: bytearray(b"x") * size)
    if measured is None:
        pytest.skip("this system does not tell")
    assert measured == pytest.approx(size, rel=0.1)


def test_contenders_take_turns():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}

    def clock(function, number):
        function()
        return 1.0

    samples = measure.interleave(functions, clock, seconds=0, rounds=3)
    assert [len(x) for x in samples.values()] == [3, 3, 3]
    assert calls[-18:] == list("aabbccbbccaaccaabb")  # an untimed call before each


def test_speed_is_relative_to_the_better_baseline():
    seconds = {"eager": 4.0, "compile": 2.0, "cpu": 0.5, "copy": 0.25}
    row = {"minimal_bytes": 10**9, "contenders": {n: {"seconds": s} for n, s in seconds.items()}}
    row["loss"] = "kl_div"
    rows.compare(row)
    speed = {name: found.get("speedup") for name, found in row["contenders"].items()}
    assert speed == {"eager": 0.5, "compile": 1.0, "cpu": 4.0, "copy": None}
    assert row["contenders"]["cpu"]["gb_per_s"] == 2.0
    assert row["contenders"]["cpu"]["share_of_copy"] == 0.5


def test_failing_contender_is_reported_and_left_out():
    def fail(name, call):
        if name == "compile":
            raise RuntimeError("no compiler\nfound")
        return {"seconds": 1.0}

    calls, skipped = {"eager": None, "compile": None}, {}
    assert rows._each(calls, skipped, fail) == {"eager": {"seconds": 1.0}}
    assert list(calls) == ["eager"] and skipped == {"compile": "RuntimeError: no compiler"}


def test_no_case_is_begun_after_its_time():
    cases = [bench.Case("kl_div", "16x50"), bench.Case("kd_loss", "16x50")]
    result = bench.run(cases, bench.Settings(), within=-1)
    assert not result["rows"]
    assert [case["loss"] for case in result["not_run"]] == ["kl_div", "kd_loss"]


def test_command(tmp_path, capsys):
    """One small case from the command line to its JSON."""
    file = tmp_path / "result.json"
    arguments = "--losses kl_div --shapes 16x50 --upstream 1 0.5 --seconds 0 --repeats 2"
    arguments += f" --device cpu --near-zero kl_div --json {file}"
    assert bench.main(arguments.split()) == 0
    printed = capsys.readouterr().out
    result = json.loads(file.read_text())
    assert [row["upstream"] for row in result["rows"]] == [1.0, 0.5]
    for row in result["rows"]:
        assert row["size"] == [16, 50] and row["minimal_bytes"] == 3 * 16 * 50 * 4
        assert list(row["contenders"]) == ["eager", "compile", *KERNELS, "copy"]
        for name in ("eager", "compile", *KERNELS):
            found = row["contenders"][name]
            assert 0 < found["p20"] <= found["seconds"] <= found["p80"]
            assert found["loss_error"] < 1e-5 and found["grad_error"] < 1e-5
            assert found["extra_bytes"] >= 16 * 50 * 4
            assert name in printed
    assert [row["true"] for row in result["near_zero"]] == pytest.approx(rows.NEAR_ZERO, rel=0.05)
    for row in result["near_zero"]:
        for name in KERNELS:
            assert row["contenders"][name]["worst_error"] <= 2e-6
            assert row["contenders"][name]["negative_rows"] == 0
    environment = result["environment"]
    assert environment["info"]["torch"] == torch.__version__ and environment["threads"] >= 1


def test_unknown_shape(capsys):
    assert bench.main(["--shapes", "huge"]) == 2
    assert "host_8x10" in capsys.readouterr().err


@pytest.mark.skipif(
    not any((ROOT / "benchmarks/results").glob("*/*.json")), reason="no results are kept yet"
)
@pytest.mark.parametrize("script", ["plot.py", "accuracy_table.py"])
def test_readme_shows_the_results(script):
    command = [sys.executable, ROOT / "benchmarks" / script, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
