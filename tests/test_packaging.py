# SPDX-License-Identifier: Apache-2.0
"""What is installed: the binaries' symbols, a wheel without them, an import without either."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import kdkernels
from kdkernels import contract

ROOT = Path(__file__).parents[1]
BINARY = Path(kdkernels.__file__).with_name("_C_cpu.so")
SOURCE = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a source tree")


def run(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def tool(*names):
    return next(filter(None, map(shutil.which, names)), None) or pytest.skip(f"no {names[0]}")


@pytest.fixture(scope="module")
def needed():
    """The symbols that ``_C_cpu`` expects of whatever loads it, as C++ reads them."""
    if not BINARY.exists():
        pytest.skip("_C_cpu is not built")
    lines = run(tool("nm"), "-D", "-C", "--undefined-only", str(BINARY)).splitlines()
    return [line.split(maxsplit=1)[1].partition("@")[0] for line in lines]


def test_the_operators_need_no_cpp_of_torch_and_no_python(needed):
    unstable = re.compile(r"\b(at|c10|torch|caffe2)::|^_?Py[A-Z_]")
    assert not [name for name in needed if unstable.search(name)]


def test_the_operators_need_only_what_torch_2_10_has(needed):
    """Its shim is what the headers declare when they are told to target it."""
    headers = Path(torch.__file__).parent / "include"
    shim = "torch/csrc/stable/c/shim.h"
    if not (headers / shim).exists():
        pytest.skip("torch has no stable headers here")
    declared = run(
        tool("g++", "clang++"), "-E", "-x", "c++", "-std=c++17", f"-I{headers}",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", "-",
        input=f"#include <{shim}>",
    )  # fmt: skip
    shims = {name for name in needed if re.match(r"(aoti_)?torch_", name)}
    assert shims and shims <= set(re.findall(r"\w+", declared))


# What the linker may take from any object has to be code that every machine can run.
@SOURCE
@pytest.mark.parametrize("family", ["rowwise"])
def test_code_above_the_baseline_stays_in_its_namespace(family, tmp_path):
    compiled = tmp_path / "kernels.o"
    run(
        tool("g++"), "-std=c++17", "-O0", "-fPIC", "-w", "-mavx512f", "-mavx512bw", "-mavx512dq",
        "-mavx512vl", "-mfma", "-DKD_ISA=avx512", "-DKD_BYTES=64",
        "-c", str(ROOT / f"csrc/kd/cpu/{family}/{family}.cpp"), "-o", str(compiled),
    )  # fmt: skip
    symbols = [line.split() for line in run(tool("nm"), str(compiled)).splitlines()]
    shared = [entry[-1] for entry in symbols if entry[-2] == "W"]  # weak code
    assert shared  # -O0 keeps what -O3 would have inlined
    assert not [name for name in shared if not re.match(r"_Z+NK?2kd6avx512", name)]


def python(code, path=BINARY.parents[1]):
    """What ``code`` prints and warns of, with ``path`` before what is installed."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    return run(sys.executable, "-W", "always", "-c", code, env=environment, cwd=path)


@SOURCE
def test_wheel_without_a_compiler(tmp_path):
    source = tmp_path / "source"
    files = run("git", "-C", str(ROOT), "ls-files").splitlines()
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    run(
        sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index",
        "-q", "-w", str(tmp_path), str(source), env=os.environ | {"KDKERNELS_BUILD": "0"},
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {name for name in files if re.match(r"kdkernels/.*\.(py|css)$", name)}
    assert names == modules | {"kdkernels/_build.json"}

    report = python(
        "import torch, kdkernels, sys; from kdkernels import functional as F\n"
        f"assert kdkernels.__file__.startswith({str(tmp_path)!r})\n"
        "x = torch.randn(3, 5, requires_grad=True); F.kl_div(x, x.detach() + 1).backward()\n"
        "F.kl_div(x, x)\n"
        "cpu = kdkernels.info()['backends']['rowwise']['cpu']\n"
        "print(cpu['auto'], cpu['cpu']['reason'], kdkernels.info()['build'])",
        path=tmp_path / "site",
    )
    assert report.count("no fused rowwise kernel for cpu tensors") == 1
    assert "reference the extension was not built" in report
    assert "KDKERNELS_BUILD=0" in report


@pytest.mark.skipif(not BINARY.exists(), reason="_C_cpu is not built")
def test_extensions_of_another_contract_are_not_used(tmp_path):
    package = tmp_path / "kdkernels"
    shutil.copytree(BINARY.parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for path in package.glob("_*.so"):
        mark = b"kdkernels contract %d." % contract.CONTRACT
        content = path.read_bytes()
        assert content.count(mark) == 1
        path.write_bytes(content.replace(mark, mark.replace(b"contract", b"Contract")))
    report = python(
        "import numpy, torch, kdkernels, kdkernels.numpy\n"
        "print(kdkernels.backends.verdict('rowwise', 'cpu', 'cpu'))\n"
        "x = torch.ones(2, 3); print(kdkernels.functional.kl_div(x, x))\n"
        "try: kdkernels.numpy.divergence(x.numpy(), x.numpy())\n"
        "except RuntimeError as error: print(error)",
        path=tmp_path,
    )
    advice = "was built from other sources than these: rebuild it (make install)"
    assert f"UserWarning: kdkernels: _C_cpu.so {advice}" in report
    assert f"Verdict(ok=False, reason='_C_cpu.so {advice}')" in report
    assert "tensor(0.)" in report
    assert "divergence: the compiled extension _native cannot be used: _native." in report


def test_imports_without_triton():
    code = """
import importlib.machinery, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *where):
        return None if name.partition(".")[0] == "triton" else super().find_spec(name, *where)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
import torch, kdkernels
from kdkernels import functional
x = torch.randn(3, 5)
functional.kl_div(x, x, backend="reference")
print(kdkernels.info()["triton"], kdkernels.backends.verdict("rowwise", "triton", "cuda").reason)
"""
    assert "None triton is not installed" in python(code)


def test_one_version():
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("not in a source tree")
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version == kdkernels.__version__


def test_import_without_docstrings():
    run(sys.executable, "-OO", "-c", "import kdkernels", cwd=BINARY.parents[1])
