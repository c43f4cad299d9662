# SPDX-License-Identifier: Apache-2.0
"""Several teachers close to the student, where differences of probabilities would cancel."""

from __future__ import annotations

import pytest
import torch
from test_ensemble import ENTRIES, dtypes, forms  # noqa: F401

from kdkernels import functional as kd
from kdkernels.testing import LOSSES, gradients, leaves


@forms
@dtypes
def test_identical_logits_are_exactly_zero(form, dtype, backend, device):
    for classes in (1, 33, 3000):
        x = LOSSES["kl_div"].inputs(4, classes, dtype=dtype, device=device)["teacher"]
        student, teachers = x.clone().requires_grad_(), [x.clone().requires_grad_()] * 3
        weights = torch.tensor([0.1, 0.7, 0.3], device=device)
        value = kd.multi_teacher_kl_div(
            student, teachers, weights=weights, form=form, temperature=3.0, backend=backend
        )
        assert value.item() == 0
        for gradient in torch.autograd.grad(value, [student, teachers[0]]):
            assert not gradient.any()


@forms
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4, 3e-5])
def test_exact_and_not_negative_near_zero(form, size, backend, device):
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(16, 2000, generator=generator)
    teachers = student + size * torch.randn(3, 16, 2000, generator=generator)
    student, teachers = student.to(device), teachers.to(device)
    options = {"form": form, "reduction": "none"}
    rows = kd.multi_teacher_kl_div(student, teachers, backend=backend, **options)
    oracle = kd.multi_teacher_kl_div(
        student.double(), teachers.double(), backend="reference", **options
    )
    assert (rows >= 0).all()
    assert ((rows.double() - oracle) / oracle).abs().max() <= 2e-6


def assert_exact(student, teachers, form, backend):
    """Every row's loss and gradient in fp32, by fp64 on the same logits."""
    inputs = {"student": student.requires_grad_()}
    exact = leaves(inputs, torch.float64)
    options = {"form": form, "reduction": "none"}
    rows = kd.multi_teacher_kl_div(student, teachers, backend=backend, **options)
    oracle = kd.multi_teacher_kl_div(
        exact["student"], teachers.double(), backend="reference", **options
    )
    assert (rows >= 0).all()
    assert ((rows.double() - oracle) / oracle).abs().max() <= 2e-6
    (gradient,), (wanted,) = gradients(rows, inputs).values(), gradients(oracle, exact).values()
    errors = (gradient.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert errors.max() <= 5e-6


@forms
@pytest.mark.parametrize("raised", [0.3, 0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("classes", [17, 1000, 3000])  # of one block, of several
def test_the_likeliest_class_is_raised(form, raised, classes, backend, device):
    """Then all others differ by as much, relative to the maximum, and the sums cancel.

    The less of the probability the class has, the more: a kernel that takes a row's loss from these
    sums has to see when digits are lost. About the maxima that is at about 1/2; in a mixture on the
    CPU, at 1/9.
    """
    limits = torch.linspace(0.48, 0.52, 60), torch.linspace(0.105, 0.135, 60)
    p = torch.cat([torch.linspace(0.01, 0.6, 60), *limits])
    student = 0.5 * torch.randn(180, classes, generator=torch.Generator().manual_seed(0))
    student[:, 5] = -torch.inf
    student[:, 5] = student.logsumexp(-1) + torch.logit(p)
    student = student[student.argmax(-1) == 5].to(device)
    teachers = student.repeat(2, 1, 1)
    teachers[0, :, 5] += raised
    teachers[1, :, 5] += raised / 2
    assert_exact(student, teachers, form, backend)


@forms
@pytest.mark.parametrize("sharper", [0.8, 0.9, 1.05, 1.2])
def test_a_teacher_of_other_sharpness(form, sharper, backend, device):
    """Close rows whose sums about their own maxima differ severalfold."""
    student = 3 * torch.randn(32, 1000, generator=torch.Generator().manual_seed(0))
    teachers = (sharper * student).repeat(2, 1, 1)
    assert_exact(student.to(device), teachers.to(device), form, backend)


@forms
def test_maxima_that_rise_from_block_to_block(form, backend, device):
    """Sums are then taken to new maxima, the student's and the teachers' at different classes."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(8, 4000, generator=generator)
    teachers = student + 1e-2 * torch.randn(3, 8, 4000, generator=generator)
    for row in range(8):
        for first in range(0, 4000, 1000):
            student[row, first + row] += first / 400
            teachers[:, row, first + row] += first / 400
            teachers[row % 3, row, first + 2 * row] += first / 500
    assert_exact(student.to(device), teachers.to(device), form, backend)


@forms
@pytest.mark.parametrize("off", ["student", "teachers", "both"])
def test_a_first_block_without_a_finite_class(form, off, backend, device):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(4, 2500, generator=generator)
    teachers = student + torch.randn(3, 4, 2500, generator=generator)
    if off != "student":
        teachers[..., :1500] = -torch.inf
    if off != "teachers":
        student[:, :1500] = -torch.inf
    if off == "student":
        teachers[0, :, :1500] = -torch.inf  # the first is finite all the same
        rows = kd.multi_teacher_kl_div(student, teachers, form=form, reduction="none")
        assert rows.isposinf().all()
        teachers = teachers[:1]
    assert_exact(student.to(device), teachers.to(device), form, backend)
