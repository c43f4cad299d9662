# SPDX-License-Identifier: Apache-2.0
"""Plackett-Luce distillation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kdkernels import functional as kd
from kdkernels.modules import PLDLoss
from kdkernels.testing import LOSSES, gradients

LOSS = LOSSES["pld_loss"]


def test_reference_is_the_published_formula():
    inputs = LOSS.inputs(7, 50, dtype=torch.float64)
    for name in ("student", "teacher"):
        inputs[name].requires_grad_()
    value, expected = LOSS(inputs), LOSS.eager(**inputs, **LOSS.hyper)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    wanted = gradients(expected, inputs)
    for name, gradient in gradients(value, inputs).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-10, atol=1e-13)


def test_derivatives_of_any_order():
    inputs = LOSS.inputs(3, 5, dtype=torch.float64, optional=True, requires_grad=True)
    labels = inputs.pop("labels")

    def function(*tensors):
        return LOSS(dict(zip(inputs, tensors, strict=True)) | {"labels": labels})

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(function, tuple(inputs.values()))


def test_a_certain_teacher_leaves_the_cross_entropy():
    student = torch.randn(4, 9, dtype=torch.float64)
    labels = torch.tensor([0, 3, 8, 2])
    teacher = 1e4 * F.one_hot(labels, 9).double()
    value = kd.pld_loss(student, teacher, labels)
    torch.testing.assert_close(value, F.cross_entropy(student, labels))


def test_rows_that_do_not_count():
    inputs = LOSS.inputs(5, 9, requires_grad=True, optional=True)
    inputs["labels"][1] = -100
    inputs["mask"] = torch.tensor([True, True, False, True, True])
    with torch.no_grad():
        inputs["student"][1:3] = math.nan
    rows = LOSS(inputs, reduction="none")
    assert rows[[0, 3, 4]].all() and not rows[1:3].any()
    assert torch.allclose(LOSS(inputs), rows.sum() / 3)
    assert torch.allclose(LOSS(inputs, reduction="mean"), rows.sum() / 27)
    for gradient in gradients(rows.sum(), inputs).values():
        assert gradient.isfinite().all() and not gradient[1:3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extremes_are_finite(dtype):
    for classes in (1, 2, 30):
        inputs = LOSS.inputs(4, classes)
        for side in ("student", "teacher"):
            inputs[side] = (1e4 * inputs[side].sign()).to(dtype).requires_grad_()
        value = LOSS(inputs)
        assert value.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients(value, inputs).values())


def test_classes_that_are_off():
    inputs = LOSS.inputs(2, 6, dtype=torch.float64)
    inputs["labels"][:] = 1
    alone = LOSS(inputs)
    off = torch.full((2, 3), -math.inf, dtype=torch.float64)
    both = inputs | {side: torch.cat([inputs[side], off], -1) for side in ("student", "teacher")}
    for side in ("student", "teacher"):
        both[side].requires_grad_()
    for side in ("temperature", "teacher_temperature"):
        both[side] = torch.tensor(LOSS.hyper[side], dtype=torch.float64, requires_grad=True)
    value = LOSS(both)
    torch.testing.assert_close(value, alone)
    assert all(gradient.isfinite().all() for gradient in gradients(value, both).values())
    inputs["student"][0, 3] = -math.inf
    assert LOSS(inputs, reduction="none").isposinf().tolist() == [True, False]


def test_composite_by_design():
    inputs = LOSS.inputs(4, 9)
    assert torch.equal(PLDLoss(teacher_temperature=2.0)(**inputs), LOSS(inputs))
    assert LOSS.backends() == ["reference"]
    with pytest.raises(RuntimeError, match="composite by design"):
        LOSS(inputs, backend="cpu")
    with pytest.raises(NotImplementedError, match="probabilities"):
        LOSS(inputs | {"labels": torch.rand(4, 9)})
