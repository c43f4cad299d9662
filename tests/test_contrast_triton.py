# SPDX-License-Identifier: Apache-2.0
"""CRD's Triton kernel: compiled ahead of time, and interpreted."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from interpreter import INTERPRETED, assert_passes_interpreted
from test_triton_aot import TARGETS, assert_in_registers, compiled, load_widths

from kdkernels.testing import LOSSES, assert_close_to_oracle, gradients, leaves
from kdkernels.testing.contrast import crd_published

CRD = LOSSES["crd_loss"]


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: kernels are not compiled")
@pytest.mark.parametrize(
    ("dtype", "dim"),
    [(torch.float32, 128), (torch.float32, 100), (torch.float32, 2048), (torch.float64, 128)],
    ids=str,
)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target, dtype, dim, tmp_path, monkeypatch):
    from kdkernels.triton import contrast

    if target == "gfx942":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    rows, bank = torch.empty(64, dim, dtype=dtype), torch.empty(1000, dim, dtype=dtype)
    index, negatives = torch.zeros(64, dtype=torch.int64), torch.zeros(64, 512, dtype=torch.int64)
    given = rows, rows, bank, bank, rows[0, :2], index, negatives, contrast.CrdNumbers()
    for grads in (0, 3):
        sides, _ = contrast.launches(*given, grads)
        kernel = compiled(contrast.crd_kernel, sides[0], target)
        assert_in_registers(kernel, target, tmp_path)
        assert 16 in load_widths(kernel, target)


if not INTERPRETED:

    def test_in_a_process_with_the_interpreter():
        assert_passes_interpreted(__file__)


class TestInterpreted:
    __test__ = INTERPRETED

    # One program to a sample, or several, of which the last takes the positive alone.
    @pytest.mark.parametrize("programs", [1, 64])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
    def test_value_and_gradients(self, dtype, programs, monkeypatch):
        from kdkernels.triton import contrast

        monkeypatch.setattr(contrast, "PROGRAMS", programs)
        monkeypatch.setattr(contrast, "ELEMENTS", 128)
        inputs = CRD.inputs(3, 20, 32, 50, dtype=dtype, requires_grad=True)
        exact, plain = leaves(inputs, torch.float64), leaves(inputs)
        oracle, eager = CRD(exact, backend="reference"), crd_published(**plain)
        value = CRD(inputs, backend="triton")
        assert_close_to_oracle(value, eager, oracle)
        found, wanted = gradients(value, inputs), gradients(oracle, exact)
        for name, yardstick in gradients(eager, plain).items():
            assert_close_to_oracle(found[name], yardstick, wanted[name], name)

    def test_rows_outside_the_bank_are_nan(self):
        inputs = CRD.inputs(3, 20, 32, 50)
        names = ("student", "teacher", "student_bank", "teacher_bank", "normalizer", "index")
        from kdkernels.triton import contrast

        inputs["negatives"][1, 7] = 2**40
        inputs["index"][2] = -1
        tensors = (inputs[n] for n in (*names, "negatives"))
        loss, of_student, of_teacher, *_ = contrast._crd(*tensors, 1.0, (0.07, 1e-7), (), 3)
        assert loss.isnan()
        for gradient in (of_student, of_teacher):
            assert gradient[1:].isnan().all() and gradient[0].isfinite().all()

    def test_registered(self):
        from kdkernels.triton import contrast  # noqa: F401  (registers the operators)

        inputs = CRD.inputs(3, 20, 32, 50)
        names = ("student", "teacher", "student_bank", "teacher_bank", "normalizer", "index")
        tensors = tuple(inputs[n] for n in (*names, "negatives"))
        for grads in (0, 1, 3):
            arguments = (*tensors, 0.5, [0.07, 1e-7], [], grads)
            torch.library.opcheck(torch.ops.kdkernels.crd_triton.default, arguments)
