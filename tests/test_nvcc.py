# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel compiles for every target into registers alone, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvcc import STATIC_SHARED_LIMIT, TARGETS, compiled

ROOT = Path(__file__).parents[1]
SOURCES = [*sorted((ROOT / "csrc/kd/cuda").rglob("*.cu")), ROOT / "tests/simt/right.cu"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels(source, target, record_property):
    kernels = compiled(source, target)
    assert kernels
    for kernel in kernels:
        record_property(
            "kernel",
            f"{target} {kernel.name}: {kernel.registers} registers, "
            f"{kernel.blocks} x {kernel.threads} threads, {kernel.occupancy:.0%} of all warps",
        )
        assert kernel.stack == kernel.spills == 0, f"{kernel.name} uses local memory"
        assert kernel.shared <= STATIC_SHARED_LIMIT
        assert kernel.blocks >= 1


def test_local_memory_is_found(tmp_path):
    source = tmp_path / "local.cu"
    source.write_text(
        f'#include "{ROOT}/csrc/kd/cuda/device.h"\n'
        "using namespace kd::cuda;\n"
        "KD_KERNEL(256, 1) void local(const int* index, int* out) {\n"
        "  int counts[64] = {};\n"
        "  for (int i = 0; i < 512; i++) counts[index[i]] += i;\n"
        "  out[thread_index()] = counts[index[thread_index()]];\n"
        "}\n"
        "KD_KERNEL(1024, 1) void plain(int* out) { out[thread_index()] = 1; }\n"
    )
    kernels = {kernel.name: kernel for kernel in compiled(source, "sm_90")}
    assert kernels["local"].stack >= 64 * 4
    assert kernels["plain"].stack == 0
    assert (kernels["plain"].blocks, kernels["plain"].occupancy) == (2, 1)
