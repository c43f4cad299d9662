# SPDX-License-Identifier: Apache-2.0
"""Failures that were found once, each by the name of what failed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

from kdkernels import functional as kd
from kdkernels.testing import gradients, leaves, relative_errors

MIN = torch.finfo(torch.float32).min


def against_reference(function, inputs, kernel):
    """Largest relative errors, of the loss and the gradients, to the reference in fp64."""
    wide = leaves(inputs, torch.float64)
    value, oracle = function(**inputs, backend=kernel), function(**wide, backend="reference")
    wanted = gradients(oracle, wide)
    return relative_errors(value, oracle)[0], max(
        relative_errors(g, wanted[name])[0] for name, g in gradients(value, inputs).items()
    )


# exp_at_rate turned exp(NaN) into 0 below AVX-512.
_NAN = """
import torch
from kdkernels import functional as kd
s, t = torch.randn(3, 20), torch.randn(3, 20)
for side in (s, t):
    x = [s.clone(), t.clone()]
    x[0 if side is s else 1][0, 3] = float("nan")
    x[0].requires_grad_()
    for kind in ("forward_kl", "tv", "skew_forward", "js"):
        loss = kd.divergence(*x, kind=kind, reduction="none", backend="cpu")
        assert loss.isnan().tolist() == [True, False, False], (kind, loss)
        (grad,) = torch.autograd.grad(loss.sum(), x[0])
        assert grad[0].isnan().all() and grad[1:].isfinite().all(), (kind, grad)
"""


# Sums of equal terms drifted, and terms of |d| just past 0.34 took exp's error 20-fold.
_ALIKE = """
import torch
from kdkernels import functional as kd
for classes in (10, 100, 1000, 3000):
    for first, others in ((0.0, slice(3, 4)), (0.0, slice(classes // 2)), (3.0, slice(3, 4))):
        student = torch.full((80, classes), 0.7)
        student[:, 3] += first
        teacher = student.clone()
        teacher[:, others] += torch.linspace(-1.2, 1.2, 80)[:, None]
        p, q = student.double().log_softmax(1), teacher.double().log_softmax(1)
        for kind, oracle in {
            "forward_kl": (q.exp() * (q - p)).sum(1), "reverse_kl": (p.exp() * (p - q)).sum(1),
            "jeffreys": ((q.exp() - p.exp()) * (q - p)).sum(1),
        }.items():
            loss = kd.divergence(student, teacher, kind=kind, reduction="none", backend="cpu")
            error = ((loss.double() - oracle) / oracle).abs().max()
            assert error <= 2e-6, (classes, first, others, kind, error)
"""


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("script", [_NAN, _ALIKE], ids=["nan", "alike classes"])
def test_at_every_isa_level(script, level):
    environment = os.environ | {"KDKERNELS_CPU_CAPABILITY": level}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


# The teacher's normaliser, as the student's plus a difference, cancelled.
@pytest.mark.parametrize("peak, temperature", [(14.0, 1.0), (20.0, 1.0), (60.0, 4.0)])
def test_flat_student_and_peaked_teacher(peak, temperature, kernel, device):
    student = 0.1 * torch.randn(2, 128256, device=device)
    teacher = torch.randn(2, 128256, device=device)
    teacher[:, 7] += peak
    inputs = {"student": student.requires_grad_(), "teacher": teacher, "temperature": temperature}
    loss_error, gradient_error = against_reference(kd.kl_div, inputs, kernel)
    assert loss_error < 5e-6 and gradient_error < 1e-5


# fp32 lost Renyi's digits, and exp saturated in powers.
@pytest.mark.parametrize("alpha", [0.5, 5.0])
@pytest.mark.parametrize("spread", [3.0, 10.0])
def test_renyi_of_spread_logits(alpha, spread, kernel, device):
    inputs = {
        "student": spread * torch.randn(16, 10, device=device),
        "teacher": spread * torch.randn(16, 10, device=device),
    }
    inputs["student"].requires_grad_()

    def renyi(**kwargs):
        return kd.divergence(kind="renyi", alpha=alpha, **kwargs)

    loss_error, gradient_error = against_reference(renyi, inputs, kernel)
    assert loss_error < 1e-5 and gradient_error < 1e-5


# One memory was taken for one temperature.
def test_scalar_and_rows_of_one_memory(backend, device):
    student, teacher = torch.randn(4, 10, device=device), torch.randn(4, 10, device=device)
    tau = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
    for one in (tau[0], tau[:1]):
        got, apart = (
            kd.kl_div(
                student, teacher, temperature=one, teacher_temperature=other, reduction="none",
                backend=backend,
            )
            for other in (tau, tau.clone())
        )  # fmt: skip
        assert torch.equal(got, apart) and (got[1:] != got[0]).all()


def test_a_temperature_given_twice_is_one(backend, device):
    teacher = torch.randn(8, 1000, device=device)
    student = teacher + 1e-4 * torch.randn_like(teacher)
    tau = torch.full((8,), 2.0, device=device)
    options = {"reduction": "sum", "backend": backend}
    once = kd.kl_div(student, teacher, temperature=tau, **options)
    twice = kd.kl_div(student, teacher, temperature=tau, teacher_temperature=tau, **options)
    assert torch.equal(once, twice)


@pytest.mark.parametrize("shape", [(), (1,), (6,)])
def test_one_temperature_compiles(shape, kernel, device):
    student = torch.randn(6, 10, device=device, requires_grad=True)
    teacher = torch.randn(6, 10, device=device)
    tau = torch.full(shape, 2.0, device=device, requires_grad=True)

    def loss(s, t, tau):
        return kd.kl_div(s, t, temperature=tau, backend=kernel)

    wanted = torch.autograd.grad(loss(student, teacher, tau), (student, tau))
    compiled = torch.compile(loss, fullgraph=True)(student, teacher, tau)
    for got, want in zip(torch.autograd.grad(compiled, (student, tau)), wanted, strict=True):
        torch.testing.assert_close(got, want)


# fp16 gradients, saved per row and enlarged, overflowed; and 0 times that was NaN.
def test_fp16_weights_and_spreads():
    half = torch.float16
    student = torch.randn(2, 10, dtype=half, requires_grad=True)
    teacher, labels = torch.randn(2, 10, dtype=half), torch.tensor([1, 2])
    for function, options in (
        (kd.kd_loss, {"labels": labels, "ce_weight": 1.0, "kd_weight": 100.0}),
        (kd.reverse_kl_div, {}),
    ):
        other = teacher.clone()
        if function is kd.reverse_kl_div:
            other[0, 3] = -2000.0
        inputs = {"student": student, "teacher": other, **options}
        assert against_reference(function, inputs, "cpu")[1] < 2e-3
    silent = torch.tensor([0.0, 1.0])
    other[0, 3] = -60000.0
    loss = kd.reverse_kl_div(student, other, row_weight=silent, backend="cpu")
    (grad,) = torch.autograd.grad(loss, student)
    assert not grad[0].any() and grad[1].isfinite().all()


# Numbers below -1e30 were taken for -inf, and a row of them for an empty one.
def test_rows_of_the_smallest_number(backend, device):
    student, teacher = torch.randn(2, 5, device=device), torch.randn(2, 5, device=device)
    student[0], teacher[0] = MIN, MIN
    got = kd.kl_div(student, teacher, reduction="none", backend=backend)
    assert got[0] == 0 and got[1].isfinite()


def test_weight_of_an_infinite_row(kernel, device):
    student, teacher = torch.randn(2, 5, device=device), torch.randn(2, 5, device=device)
    student[1, 0] = -torch.inf
    weight = torch.tensor([1.0, 0.0], device=device, requires_grad=True)
    kd.kl_div(student, teacher, row_weight=weight, backend=kernel).backward()
    assert weight.grad.isfinite().all()


# The gradient was written over logits that others still read.
@pytest.mark.parametrize("views", [lambda a: (a[1:], a[:-1]), lambda a: (a.unfold(1, 8, 4),) * 2])
def test_inplace_needs_memory_of_its_own(views):
    base = torch.randn(6, 24, requires_grad=True) * 1
    student, teacher = views(base)
    with pytest.raises(ValueError, match=r"kl_div: inplace=True needs"):
        kd.kl_div(student, teacher.detach(), inplace=True, backend="cpu")


def test_forward_mode_is_refused(kernel, device):
    student, teacher = torch.randn(2, 5, device=device), torch.randn(2, 5, device=device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(student, torch.ones_like(student))
        with pytest.raises(RuntimeError, match=r"kl_div: .* no forward-mode derivative"):
            kd.kl_div(dual, teacher, backend=kernel)


def test_without_any_weight(backend, device):
    student = torch.randn(2, 5, device=device, requires_grad=True)
    teacher = torch.randn(2, 5, device=device, requires_grad=True)
    labels = torch.tensor([1, 2], device=device)
    kd.kd_loss(student, teacher, labels, ce_weight=0.0, kd_weight=0.0, backend=backend).backward()
    assert not student.grad.any() and not teacher.grad.any()
