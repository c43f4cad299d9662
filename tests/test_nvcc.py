# SPDX-License-Identifier: Apache-2.0
"""Every CUDA kernel compiles for every target into registers alone, on a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvcc import STATIC_SHARED_LIMIT, compiled

ROOT = Path(__file__).parents[1]
PRIMITIVES = ROOT / "tests/simt/right.cu"
SOURCES = sorted((ROOT / "csrc/kd/cuda").rglob("*.cu"))


def cases():
    for source in SOURCES:
        # Of one source compiled for every divergence, the two with targets are telling enough, and
        # one of them for every target.
        kind = source.parent.name == "kinds"
        for target, told in (("sm_80", ["forward_kl"]), ("sm_90", ["forward_kl", "cross_entropy"])):
            rare = kind and source.stem not in told
            yield pytest.param(source, target, marks=[pytest.mark.slow] if rare else [])
        # Not built for it: this is what a driver makes of sm_90's PTX there.
        if not kind or source.stem in told:
            yield pytest.param(source, "sm_100", marks=pytest.mark.slow)


@pytest.mark.parametrize(("source", "target"), list(cases()), ids=lambda x: getattr(x, "stem", x))
def test_kernels(source, target, record_property):
    for kernel in compiled(source, target):
        record_property(
            "kernel",
            f"{target} {kernel.name}: {kernel.registers} registers, "
            f"{kernel.blocks} x {kernel.threads} threads, {kernel.occupancy:.0%} of all warps",
        )
        assert kernel.stack == kernel.spills == 0, f"{kernel.name} uses local memory"
        assert kernel.shared <= STATIC_SHARED_LIMIT
        assert kernel.blocks >= 1


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_primitives(target):
    kernels = compiled(PRIMITIVES, target)
    assert len(kernels) == 12
    assert not any(kernel.stack for kernel in kernels)


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
