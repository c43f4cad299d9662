# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of the losses over elements of maps: compiled ahead of time, interpreted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from interpreter import INTERPRETED, assert_passes_interpreted
from test_triton_aot import assert_in_registers, compiled, load_widths

from kdkernels.ops.maps.elementwise import KINDS, Choices, Numbers
from kdkernels.testing import LOSSES, assert_close_to_oracle, gradients, leaves

NAMES = [name for name, loss in LOSSES.items() if loss.family == "maps.elementwise"]

if not INTERPRETED:

    def test_in_a_process_with_the_interpreter():
        assert_passes_interpreted(__file__)


# Maps of 32 x 32 and of 7 x 7, whose rows start anywhere; channels alone.
MAPS = [(8, 64, 32, 32), (8, 65, 7, 7), (64, 2048, 1, 1)]
CASES = [
    *(("sm_90", dtype, shape) for dtype in (torch.float32, torch.bfloat16) for shape in MAPS),
    *((target, torch.bfloat16, MAPS[0]) for target in ("sm_80", "sm_100")),
    *(("gfx942", torch.float32, shape) for shape in MAPS[:2]),
    ("sm_90", torch.float64, MAPS[0]),
]


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: kernels are not compiled")
@pytest.mark.parametrize(("target", "dtype", "shape"), CASES)
def test_compiles_without_spills(target, dtype, shape, tmp_path, monkeypatch):
    from kdkernels.triton.maps.elementwise import arguments, elementwise_kernel

    if target == "gfx942":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    channel = torch.empty(1, shape[1], 1, 1, dtype=wide)
    for kind in KINDS:
        scalars = 0.5, Numbers(), Choices(KINDS.index(kind))
        x = torch.empty(shape, dtype=dtype)
        kernel = compiled(elementwise_kernel, arguments(x, x, None, *scalars, 1)[0], target)
        assert_in_registers(kernel, target, tmp_path)
        if shape != MAPS[1]:
            assert load_widths(kernel, target) == {16}
        for order in (torch.contiguous_format, torch.channels_last):
            x = x.to(memory_format=order)
            everything, _ = arguments(x, x, channel, *scalars, 7)
            kernel = compiled(elementwise_kernel, everything, target)
            assert_in_registers(kernel, target, tmp_path)


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.fixture(params=["one tile", "several"])
    def tiles(self, request, monkeypatch):
        from kdkernels.triton import layout

        if request.param == "several":
            monkeypatch.setattr(layout, "TILES", {})
            monkeypatch.setattr(layout, "SWEEP", layout.Tile(4, 16, 4))

    @pytest.mark.parametrize("shape", [(3, 5, 6, 9), (2, 20, 4, 4), (4, 70, 1, 1), (0, 3, 4, 4)])
    @pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
    @pytest.mark.parametrize("name", NAMES)
    def test_value_and_gradients(self, name, last, shape, tiles):
        loss = LOSSES[name]
        for dtype in (torch.float64, torch.float32, torch.float16):
            inputs = loss.inputs(*shape, dtype=dtype)
            if last:
                for side in ("student", "teacher"):
                    inputs[side] = inputs[side].contiguous(memory_format=torch.channels_last)
            for side in loss.differentiable:
                inputs[side].requires_grad_()
            exact, plain = leaves(inputs, torch.float64), leaves(inputs)
            found = []
            for given, backend in ((inputs, "triton"), (plain, "reference"), (exact, "reference")):
                value = loss(given, backend=backend)
                found.append({"loss": value} | gradients(value, given))
            for key in found[0]:
                assert_close_to_oracle(*(result[key] for result in found), key)

    @pytest.mark.parametrize("kind", KINDS)
    def test_opcheck(self, kind):
        from kdkernels.triton import maps as _  # noqa: F401  (registers the operator)

        operator = torch.ops.kdkernels.elementwise_triton.default
        student, teacher = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
        rest = 0.5, Numbers(), Choices(KINDS.index(kind))
        torch.library.opcheck(operator, (student, teacher, None, *rest, 0))
        torch.library.opcheck(operator, (student, teacher, -torch.rand(1, 3, 1, 1), *rest, 7))
