# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels at every ISA level, and bit-identical for any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kdkernels import backends
from kdkernels.testing import gradients

pytestmark = pytest.mark.skipif(
    not backends.verdict("rowwise", "cpu", "cpu").ok, reason="_C_cpu is not built"
)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Rows enough for every thread to get some, and rows longer than a block of the kernels.
@pytest.mark.parametrize("shape", [(1000, 100), (37, 3000)])
def test_same_bits_for_any_number_of_threads(loss, shape, threads):
    inputs = loss.inputs(*shape, optional=True, requires_grad=True)
    results = []
    for count in (1, 2, 7):
        threads(count)
        value = loss(inputs, backend="cpu")
        results.append([value.detach(), *gradients(value, inputs).values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Prints the level in use, and for every loss the largest relative error against the reference.
_PROBE = """
import torch
from kdkernels import _native
from kdkernels.testing import LOSSES, gradients, leaves, relative_errors
losses = [loss for loss in LOSSES.values() if "cpu" in loss.backends()]
print(_native.isa(), len(losses))
for loss in losses:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for shape in ((5, 10), (3, 1037)) if not loss.features else (loss.small,) * 2:
            i = loss.inputs(*shape, dtype=dtype, optional=True, requires_grad=True)
            w = leaves(i, torch.float64)
            value, oracle = loss(i, backend="cpu"), loss(w, backend="reference")
            errors = [relative_errors(value, oracle)[0]]
            wanted = gradients(oracle, w)
            errors += [relative_errors(g, wanted[k])[0] for k, g in gradients(value, i).items()]
            print(loss.name, str(dtype)[6:], max(errors))
"""
# Of a result rounded to the dtype.
_LIMITS = {"float64": 1e-11, "float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_isa_level(level):
    native = pytest.importorskip("kdkernels._native")
    order = ["baseline", "avx2", "avx512"]
    if native.isa() in order and order.index(level) > order.index(native.isa()):
        pytest.skip(f"this machine has {native.isa()}")
    environment = os.environ | {"KDKERNELS_CPU_CAPABILITY": level}
    result = subprocess.run(
        [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (used, losses), *lines = map(str.split, result.stdout.splitlines())
    assert used == level
    assert len(lines) == 8 * int(losses)
    for line in lines:
        name, dtype, error = line
        assert float(error) <= _LIMITS[dtype], f"{name} in {dtype} at {level}: {error}"
