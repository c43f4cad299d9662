# SPDX-License-Identifier: Apache-2.0
"""Top-k teachers where rounding, -inf, NaN and absent entries decide."""

from __future__ import annotations

import math

import pytest
import torch
from test_sparse import (  # noqa: F401
    ENTRIES,
    KINDS,
    bucketed,
    close,
    dense,
    kinds,
    missings,
)

from kdkernels import functional as kd
from kdkernels.testing import gradients, leaves


@kinds
@missings
@pytest.mark.parametrize("classes", [33, 3000])
def test_absent_entries_are_as_if_not_stored(kind, missing, classes, backend, device):
    """Ragged k: -inf, whatever the index, repeated or out of range."""
    if (kind, missing) == ("reverse_kl", "zero"):
        pytest.skip("infinite by its definition")
    student, teacher = dense(classes=classes, device=device)
    log_p, indices = teacher.log_softmax(-1).topk(9)
    options = {"kind": kind, "missing": missing, "temperature": 1.5, **KINDS[kind]}
    options |= {"reduction": "none", "backend": backend}
    padded, ids = log_p.clone(), indices.clone()
    counts = [9, 4, 1, 6, 2, 3]
    for row, n in enumerate(counts):
        padded[row, n:] = -math.inf
        ids[row, n:] = torch.tensor([-1, classes + 5, 0, 0, 0, 0, 0, 0])[: 9 - n]
    student.requires_grad_(), padded.requires_grad_()
    value = kd.topk_divergence(student, padded, ids, **options)
    to_student, to_values = torch.autograd.grad(value.sum(), [student, padded])
    for row, n in enumerate(counts):
        one = student.detach()[row].requires_grad_()
        stored = log_p[row, :n].clone().requires_grad_()
        expected = kd.topk_divergence(one, stored, indices[row, :n], **options)
        close(value[row], expected)
        wanted = torch.autograd.grad(expected, [one, stored])
        close(to_student[row], wanted[0])
        close(to_values[row, :n], wanted[1])
        assert not to_values[row, n:].any()


def test_rows_without_values(backend, device):
    student, _ = dense(device=device)
    values = torch.full((6, 3), -math.inf, dtype=torch.float64, device=device)
    indices = torch.full((6, 3), -1, device=device)
    student.requires_grad_()
    value = kd.topk_divergence(student, values, indices, backend=backend)
    assert value == 0
    assert not torch.autograd.grad(value, student)[0].any()
    for missing in ("zero", "renormalize"):
        value = kd.topk_divergence(student, values, indices, missing=missing, backend=backend)
        assert value.isnan()
    masked = kd.topk_divergence(
        student, values, indices, missing="zero", backend=backend,
        mask=torch.zeros(6, dtype=torch.bool, device=device),
    )  # fmt: skip
    assert masked == 0
    assert not torch.autograd.grad(masked, student)[0].any()


@kinds
@missings
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_student_that_is_its_teacher(kind, missing, dtype, backend, device):
    """0 to the rounding of what was stored, never below; so is the gradient."""
    _, teacher = dense(64, 500, device=device)
    student = teacher.to(dtype).requires_grad_()
    values, indices = teacher.log_softmax(-1).topk(20)
    if missing == "zero":
        if kind == "reverse_kl":
            pytest.skip("infinite by its definition")
        student = torch.full_like(teacher, -math.inf).scatter(-1, indices, values)
        student = student.to(dtype).requires_grad_()
    rows = kd.topk_divergence(
        student, values.to(dtype), indices, kind=kind, missing=missing, reduction="none",
        backend=backend, **KINDS[kind],
    )  # fmt: skip
    eps = torch.finfo(dtype).eps
    assert (rows >= 0).all()
    assert rows.max() <= (20 * eps if kind == "tv" else 100 * eps**2)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    assert gradient.abs().max() <= (1 if kind == "tv" else 20 * eps)


@kinds
def test_a_small_tail_is_no_difference(kind, kernel, device):
    """Both tails far below fp32's eps beside 1: eager finds them as 1 - sum, which is rounding."""
    student, teacher = dense(16, 3000, device=device)
    indices = teacher.topk(5).indices
    for logits in (student, teacher):
        logits.scatter_add_(-1, indices, torch.full_like(logits[:, :5], 25.0))
    exact = bucketed(student.float().double(), teacher, indices, 1.0)
    stored = teacher.log_softmax(-1).gather(-1, indices)
    value = kd.topk_divergence(
        student.float(), stored.float(), indices, kind=kind, backend=kernel,
        teacher_logsumexp=(stored.float().double().exp().sum(-1) + exact[1][:, -1].exp()).log(),
        **KINDS[kind],
    )  # fmt: skip
    expected = kd.divergence(*exact, kind=kind, backend="reference", **KINDS[kind])
    close(value, expected.float(), rel=1e-5)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_logits_are_finite(kind, dtype, backend, device):
    student, teacher = dense(dtype=dtype, device=device)
    student = (1e4 * student.sign()).requires_grad_()
    stored, indices = (1e4 * teacher.sign()).topk(5)
    for options in (
        {"missing": "renormalize"},
        {"missing": "tail", "teacher_logsumexp": stored[:, 0].float() + 2.0},
    ):
        value = kd.topk_divergence(
            student, stored, indices, kind=kind, values="logits", backend=backend,
            **options, **KINDS[kind],
        )  # fmt: skip
        assert value.isfinite()
        assert torch.autograd.grad(value, student)[0].isfinite().all()


@kinds
def test_a_confident_student_keeps_its_tail(kind, backend, device):
    """A mass that underflows in fp32 beside the stored classes' has a logarithm all the same."""
    student, teacher = dense(4, 2000, dtype=torch.float32, device=device)
    values, indices = teacher.log_softmax(-1).topk(3)
    student = student.scatter(-1, indices, 300.0).requires_grad_()
    options = {"kind": kind, **KINDS[kind]}
    value = kd.topk_divergence(student, values, indices, backend=backend, **options)
    wide = leaves({"student": student, "values": values}, torch.float64)
    expected = kd.topk_divergence(*wide.values(), indices, backend="reference", **options)
    close(value, expected.float(), rel=1e-5)
    (gradient,) = torch.autograd.grad(value, student)
    (wanted,) = torch.autograd.grad(expected, wide["student"])
    close(gradient, wanted.float(), rel=1e-5, abs=1e-8)


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "row", ["rising", "falling", "late_peak", "off_at_first", "stored_at_first"]
)
def test_a_tail_that_is_uneven_along_the_row(row, dtype, kind, kernel, device):
    """Over three of the CPU kernel's blocks, whose exponentials need references of their own."""
    student, teacher = dense(4, 3000, device=device)
    indices = teacher.topk(5).indices
    along = torch.linspace(0, 300, 3000, dtype=torch.float64, device=device)
    if row == "rising":
        student += along
    elif row == "falling":
        student += along.flip(-1)
    elif row == "late_peak":
        student[:, 2500] += 100
    elif row == "off_at_first":
        student[:, :1100] = -math.inf
        student.scatter_(-1, indices, 1.0)
    else:
        indices = torch.arange(1100, device=device).expand(4, -1)
    inputs = {
        "student": student.to(dtype).requires_grad_(),
        "topk_values": teacher.log_softmax(-1).gather(-1, indices).to(dtype).requires_grad_(),
        "temperature": torch.full((4,), 1.5, device=device, requires_grad=True),
    }
    options = {"topk_indices": indices, "kind": kind, "reduction": "none", **KINDS[kind]}
    rows = kd.topk_divergence(**inputs, **options, backend=kernel)
    wide = leaves(inputs, torch.float64)
    expected = kd.topk_divergence(**wide, **options, backend="reference")
    close(rows.double(), expected, rel=1e-9 if dtype == torch.float64 else 2e-6)
    wanted = gradients(expected.sum(), wide)
    rel = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 4e-3}[dtype]
    for name, gradient in gradients(rows.sum(), inputs).items():
        close(gradient.double(), wanted[name], rel=rel)


def test_minus_infinity_in_the_student(backend, device):
    student, teacher = dense(4, 60, dtype=torch.float32, device=device)
    values, indices = teacher.log_softmax(-1).topk(5)
    stored_off = student.clone()
    stored_off[0, indices[0, 1]] = -math.inf
    tail_off = torch.full_like(student, -math.inf).scatter(-1, indices, student.gather(-1, indices))
    some_off = student.scatter(-1, teacher.topk(60).indices[:, 30:], -math.inf)
    for kind in KINDS:
        options = {"kind": kind, "reduction": "none", "backend": backend, **KINDS[kind]}
        for logits, infinite in ((stored_off, [0]), (tail_off, [0, 1, 2, 3]), (some_off, [])):
            logits = logits.clone().requires_grad_()
            rows = kd.topk_divergence(logits, values, indices, **options)
            expected = torch.zeros(4, dtype=torch.bool, device=device)
            if kind == "forward_kl":
                expected[infinite] = True
            assert torch.equal(rows.isinf(), expected) and not rows.isnan().any()
            (gradient,) = torch.autograd.grad(rows.sum(), logits)
            wide = logits.detach().double().requires_grad_()
            exact = kd.topk_divergence(wide, values, indices, **options | {"backend": "reference"})
            (wanted,) = torch.autograd.grad(exact.sum(), wide)
            close(gradient, wanted.float(), rel=1e-5)


def test_forward_kl_keeps_its_gradient_where_it_is_infinite(backend, device):
    student, teacher = dense(1, 10, device=device)
    values, indices = teacher.log_softmax(-1).topk(3)
    student[0, indices[0, 0]] = -math.inf
    student.requires_grad_()
    value = kd.topk_divergence(student, values, indices, temperature=1.0, backend=backend)
    (gradient,) = torch.autograd.grad(value, student)
    p = student.detach().softmax(-1).squeeze(0)
    teacher = torch.zeros(10, dtype=torch.float64, device=device)
    teacher[indices[0]] = values[0].exp()
    others = teacher == 0
    teacher[others] = (1 - teacher.sum()) * (p / p[others].sum())[others]
    assert value == math.inf
    close(gradient.squeeze(0), p - teacher)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("argument", ["student", "topk_values"])
@pytest.mark.parametrize("missing", ["tail", "renormalize"])
def test_bad_numbers_stay_in_their_row(argument, value, missing, backend, device):
    student, teacher = dense(5, 1500, dtype=torch.float32, device=device)
    values, indices = teacher.log_softmax(-1).topk(5)
    inputs = {"student": student, "topk_values": values}
    inputs[argument][2, indices[2, 3] if argument == "student" else 3] = value
    for tensor in inputs.values():
        tensor.requires_grad_()
    options = {"missing": missing, "reduction": "none", "backend": backend}
    rows = kd.topk_divergence(**inputs, topk_indices=indices, **options)
    assert rows[2].isnan() and rows[[0, 1, 3, 4]].isfinite().all()
    for gradient in gradients(rows, inputs).values():
        assert gradient[2].isnan().any() and gradient[[0, 1, 3, 4]].isfinite().all()
    mask = torch.arange(5, device=device) != 2
    rows = kd.topk_divergence(**inputs, topk_indices=indices, mask=mask, **options)
    for x in (rows, *gradients(rows, inputs).values()):
        assert x.isfinite().all() and not x[2].any()
