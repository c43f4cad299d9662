# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of spatial attention and pyramids: compiled ahead of time, and interpreted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from interpreter import INTERPRETED, assert_passes_interpreted
from test_triton_aot import TARGETS, assert_in_registers, compiled

from kdkernels.testing import LOSSES, assert_close_to_oracle, gradients, leaves

NAMES = ("attention_transfer", "attention_transfer_norm", "ft_loss", "hcl_loss")


def maps(dtype, last):
    x = torch.empty(8, 64, 32, 32, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if last else x


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: kernels are not compiled")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target, dtype, last, tmp_path, monkeypatch):
    from kdkernels.triton.maps import pyramid, spatial_attention

    if target == "gfx942":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    x = maps(dtype, last)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    means = torch.empty(2, 8, 1024, dtype=wide)
    side = spatial_attention.map_arguments(x, 2, wide)
    compare = spatial_attention.compare_arguments(means, 0.1, 2)
    for kernel, launch in (
        (spatial_attention.mean_kernel, {**side, "means": means[0]}),
        (spatial_attention.compare_kernel, compare),
        (spatial_attention.emit_kernel, {**side, "of_means": means[0], "grad": x}),
        (
            pyramid.pyramid_kernel,
            pyramid.arguments(x, x, 0.1, (0.5, 0.3, 0.2, 0.1), (4, 2, 1), 3),
        ),
    ):
        assert_in_registers(compiled(kernel, launch, target), target, tmp_path)


if not INTERPRETED:

    def test_in_a_process_with_the_interpreter():
        assert_passes_interpreted(__file__)


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
    @pytest.mark.parametrize("name", NAMES)
    def test_value_and_gradients(self, name, dtype, last, monkeypatch):
        from kdkernels.triton.maps import pyramid, spatial_attention

        # Several tiles of positions and of channels, none of them whole.
        monkeypatch.setattr(pyramid, "TILE", 64)
        monkeypatch.setattr(pyramid, "CHANNELS", 4)
        tiles = {False: (2, 16), True: (4, 8)}
        monkeypatch.setattr(spatial_attention, "TILES", tiles)
        monkeypatch.setattr(spatial_attention, "WIDTH", 32)
        loss = LOSSES[name]
        inputs = loss.inputs(2, 5, 6, 9, dtype=dtype)
        if last:
            for side in ("student", "teacher"):
                inputs[side] = inputs[side].contiguous(memory_format=torch.channels_last)
        for side in ("student", "teacher"):
            inputs[side].requires_grad_()
        exact, plain = leaves(inputs, torch.float64), leaves(inputs)
        found = []
        for given, call in (
            (inputs, lambda x: loss(x, backend="triton")),
            (plain, lambda x: loss.eager(**x, **loss.hyper)),
            (exact, lambda x: loss(x, backend="reference")),
        ):
            value = call(given)
            found.append({"loss": value} | gradients(value, given))
        for key in found[0]:
            assert_close_to_oracle(*(result[key] for result in found), key)

    @pytest.mark.parametrize("name", ["spatial_attention", "pyramid"])
    def test_registered(self, name):
        from kdkernels.triton import maps as _  # noqa: F401  (registers the operators)

        operator = getattr(torch.ops.kdkernels, f"{name}_triton").default
        student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
        rest = ([], [2, 0]) if name == "spatial_attention" else ([0.5, 0.5], [2])
        for grads in (0, 3):
            torch.library.opcheck(operator, (student, teacher, 0.5, *rest, grads))
