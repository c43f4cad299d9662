# SPDX-License-Identifier: Apache-2.0
"""Several teachers with no weight, no rows, and logits that saturate or are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from test_ensemble import ENTRIES, forms

from kdkernels import functional as kd
from kdkernels.testing import gradients, leaves


@forms
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("by_row", [False, True])
def test_a_teacher_without_weight_is_not_looked_at(form, bad, by_row, backend, device):
    x = ENTRIES[0].inputs(4, 30, device=device)
    student, teachers = x["student"].requires_grad_(), x["teachers"]
    weights = torch.tensor([1.0, 0.0, 3.0], device=device)
    options = {"form": form, "backend": backend}
    expected = kd.multi_teacher_kl_div(student, teachers[::2], weights=weights[::2], **options)
    teachers[1] = bad
    if by_row:
        weights = weights.unsqueeze(-1).expand(-1, 4)
    for learned in (False, True):  # it is then looked at, and found to hold nothing
        held = weights.clone().requires_grad_(learned)
        given = teachers.clone().requires_grad_(learned)
        value = kd.multi_teacher_kl_div(student, given, weights=held, **options)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        inputs = {"student": student, "teachers": given, "weights": held}
        for name, gradient in gradients(value, inputs).items():
            assert gradient.isfinite().all(), name
            if name == "teachers":
                assert not gradient[1].any()


@forms
def test_a_weight_of_zero_has_a_gradient(form, backend, device):
    x = ENTRIES[0].inputs(4, 30, dtype=torch.float64, device=device)
    weights = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64, device=device, requires_grad=True)

    def loss(w):
        return kd.multi_teacher_kl_div(**x, weights=w, form=form, backend=backend)

    (gradient,) = torch.autograd.grad(loss(weights), weights)
    step = torch.tensor([0.0, 1e-7, 0.0], dtype=torch.float64, device=device)
    slope = (loss(weights.detach() + step) - loss(weights.detach())) / 1e-7
    assert gradient[1].item() == pytest.approx(slope.item(), rel=1e-5)


@forms
def test_masked_rows_are_not_read(form, backend, device):
    x = ENTRIES[0].inputs(3, 30, device=device, optional=True, requires_grad=True)
    mask = torch.tensor([True, False, True], device=device)
    options = {"mask": mask, "form": form, "backend": backend}
    expected = kd.multi_teacher_kl_div(**x, **options)
    with torch.no_grad():
        x["student"][1] = math.nan
        x["teachers"][:, 1] = math.inf
    value = kd.multi_teacher_kl_div(**x, **options)
    assert torch.equal(value, expected)
    for name, gradient in gradients(value, x).items():
        assert gradient.isfinite().all(), name


@forms
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("side", ["student", "teachers"])
def test_bad_logits_stay_in_their_row(form, side, bad, backend, device):
    x = ENTRIES[0].inputs(4, 30, device=device, requires_grad=True)
    with torch.no_grad():
        x[side].select(-2, 1)[..., 7] = bad
    rows = kd.multi_teacher_kl_div(**x, form=form, reduction="none", backend=backend)
    assert rows.isnan().tolist() == [False, True, False, False]
    for name, gradient in gradients(rows, x).items():
        others = gradient.index_select(-2, torch.tensor([0, 2, 3], device=device))
        assert others.isfinite().all(), name


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_saturated_rows(form, dtype, backend, device):
    """|logits| of 1e4, one-hot: the same winner, another, and teachers that disagree."""
    student = torch.full((3, 20), -1e4, device=device)
    teachers = torch.full((2, 3, 20), -1e4, device=device)
    for i, (s, t, u) in enumerate(((3, 3, 3), (3, 8, 8), (5, 5, 0))):
        student[i, s] = teachers[0, i, t] = teachers[1, i, u] = 1e4
    student, teachers = student.to(dtype).requires_grad_(), teachers.to(dtype).requires_grad_()
    inputs = {"student": student, "teachers": teachers}
    rows = kd.multi_teacher_kl_div(**inputs, form=form, reduction="none", backend=backend)
    exact = leaves(inputs, torch.float64)
    oracle = kd.multi_teacher_kl_div(**exact, form=form, reduction="none", backend="reference")
    torch.testing.assert_close(rows.double(), oracle, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(rows, inputs).items():
        assert gradient.isfinite().all(), name


def test_no_rows(backend, device):
    for reduction in ("none", "mean"):
        x = ENTRIES[0].inputs(0, 10, device=device, optional=True, requires_grad=True)
        value = kd.multi_teacher_kl_div(**x, reduction=reduction, backend=backend)
        assert value.shape == ((0,) if reduction == "none" else ()) and not value.any()
        for name, gradient in gradients(value, x).items():
            assert gradient.shape == x[name].shape
