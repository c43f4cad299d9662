# SPDX-License-Identifier: Apache-2.0
"""Top-k teachers: the properties of losses over rows, and what becomes of the tail."""

from __future__ import annotations

import math

import pytest
import torch
from test_conformance import (  # noqa: F401
    test_gradient_is_that_of_the_returned_number,
    test_inputs_are_left_alone,
    test_mean_is_over_rows_that_count,
    test_scale_is_explicit,
)
from test_edges import test_all_rows_masked, test_no_rows, test_one_class  # noqa: F401
from test_grads import (  # noqa: F401
    test_all_arguments,
    test_double_backward_is_refused,
    test_gradcheck,
    test_gradient,
    test_gradient_is_zero_where_rows_do_not_count,
    test_gradients_accumulate,
    test_no_gradient_is_recorded_where_none_is_needed,
    test_one_value_used_twice,
    test_scalar_temperatures,
    test_second_backward_needs_a_kept_graph,
)
from test_threads_isa import test_same_bits_for_any_number_of_threads, threads  # noqa: F401
from test_values import (  # noqa: F401
    test_autocast_changes_nothing,
    test_every_option_at_once,
    test_reductions_follow_from_rows,
    test_reference_is_the_published_formula,
    test_rows_do_not_see_each_other,
    test_teacher_temperature_defaults_to_the_students,
    test_tensor_temperature_is_the_number,
    test_value,
)

from kdkernels import functional as kd
from kdkernels.testing import LOSSES

ENTRIES = [loss for loss in LOSSES.values() if loss.family == "sparse"]
KINDS = {"forward_kl": {}, "reverse_kl": {}, "js": {"beta": 0.3}, "tv": {}}
kinds = pytest.mark.parametrize("kind", KINDS)
missings = pytest.mark.parametrize("missing", ["tail", "zero", "renormalize"])


def dense(rows=6, classes=40, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    student = teacher / 2 + torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return student.to(device, dtype), teacher.to(device, dtype)


def close(value, expected, rel=1e-9, abs=1e-14):
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= rel * expected.abs().max() + abs


@kinds
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_classes_are_the_dense_divergence(kind, temperature, backend, device):
    """Whatever is done about the missing classes, since there are none; in any order."""
    student, teacher = dense(device=device)
    order = torch.rand(student.shape).argsort(-1).to(device)
    values = teacher.log_softmax(-1).gather(-1, order)
    for grad in (student, values, teacher):
        grad.requires_grad_()
    options = {"temperature": temperature, "backend": backend, **KINDS[kind]}
    expected = kd.divergence(student, teacher, kind=kind, **options)
    wanted = torch.autograd.grad(expected, [student, teacher])
    for missing in ("tail", "zero", "renormalize"):
        if (kind, missing) == ("reverse_kl", "zero"):
            continue
        value = kd.topk_divergence(student, values, order, kind=kind, missing=missing, **options)
        close(value, expected)
        to_student, to_values = torch.autograd.grad(value, [student, values])
        close(to_student, wanted[0])
        close(torch.zeros_like(teacher).scatter(-1, order, to_values), wanted[1])


def bucketed(student, teacher, indices, temperature):
    """Log-probabilities of the stored classes and of all the others together."""
    out = []
    for logits in (student, teacher):
        log_p = (logits / temperature).log_softmax(-1)
        others = log_p.scatter(-1, indices, -math.inf).logsumexp(-1, keepdim=True)
        out.append(torch.cat([log_p.gather(-1, indices), others], -1))
    return out


@kinds
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("values", ["log_probs", "logits"])
def test_tail_is_one_more_class(kind, temperature, values, backend, device):
    """Exact, and so are its gradients, with the teacher's logsumexp at the temperature."""
    student, teacher = dense(device=device)
    student.requires_grad_(), teacher.requires_grad_()
    full = teacher.log_softmax(-1) if values == "log_probs" else teacher + 7.0
    stored, indices = full.topk(5)
    whole = (full / temperature).logsumexp(-1)
    value = kd.topk_divergence(
        student, stored, indices, kind=kind, values=values, temperature=temperature,
        teacher_logsumexp=whole, backend=backend, **KINDS[kind],
    )  # fmt: skip
    expected = temperature**2 * kd.divergence(
        *bucketed(student, teacher, indices, temperature), kind=kind, backend="reference",
        **KINDS[kind],
    )  # fmt: skip
    close(value, expected)
    for gradient, wanted in zip(
        torch.autograd.grad(value, [student, teacher]),
        torch.autograd.grad(expected, [student, teacher]),
        strict=True,
    ):
        close(gradient, wanted)
    if temperature == 1.0 and values == "log_probs":
        alone = kd.topk_divergence(
            student, stored, indices, kind=kind, backend=backend, **KINDS[kind]
        )
        close(alone, expected)


@kinds
def test_even_tail_is_exact_at_any_temperature(kind, backend, device):
    """What is assumed without the logsumexp: the other classes have one logit."""
    student, teacher = dense(device=device)
    indices = teacher.topk(5).indices
    even = torch.full_like(teacher, -1.0).scatter(-1, indices, teacher.gather(-1, indices))
    stored = even.log_softmax(-1).gather(-1, indices)
    options = {"kind": kind, "temperature": 3.0, "backend": backend, **KINDS[kind]}
    whole = (even.log_softmax(-1) / 3.0).logsumexp(-1)
    close(
        kd.topk_divergence(student, stored, indices, **options),
        kd.topk_divergence(student, stored, indices, teacher_logsumexp=whole, **options),
    )


@kinds
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_renormalized_is_dense_over_the_stored_classes(kind, temperature, backend, device):
    student, teacher = dense(device=device)
    student.requires_grad_()
    stored, indices = teacher.topk(7)
    options = {"kind": kind, "temperature": temperature, "backend": backend, **KINDS[kind]}
    value = kd.topk_divergence(
        student, stored, indices, values="logits", missing="renormalize", **options
    )
    expected = kd.divergence(student.gather(-1, indices), stored, **options)
    close(value, expected)
    gradient, wanted = (torch.autograd.grad(v, student)[0] for v in (value, expected))
    close(gradient, wanted)
    unread = student.detach().clone()
    unread.scatter_(-1, teacher.topk(40).indices[:, 7:], math.nan)
    again = kd.topk_divergence(
        unread, stored, indices, values="logits", missing="renormalize", **options
    )
    assert torch.equal(again, value.detach())


@pytest.mark.parametrize("kind", ["forward_kl", "js", "tv"])
def test_zero_is_dense_with_a_teacher_off_elsewhere(kind, backend, device):
    student, teacher = dense(device=device)
    student.requires_grad_()
    stored, indices = teacher.topk(7)
    off = torch.full_like(teacher, -math.inf).scatter(-1, indices, stored)
    options = {"kind": kind, "temperature": 2.0, "backend": backend, **KINDS[kind]}
    value = kd.topk_divergence(student, stored, indices, missing="zero", **options)
    expected = kd.divergence(student, off, **options)
    close(value, expected)
    gradient, wanted = (torch.autograd.grad(v, student)[0] for v in (value, expected))
    close(gradient, wanted)


@kinds
def test_distillkit_takes_the_tail_for_one_class(kind, backend, device):
    student, teacher = dense(device=device)
    log_p, indices = teacher.log_softmax(-1).topk(5)
    rest = (-log_p.logsumexp(-1, keepdim=True).expm1()).log()
    whole = (torch.cat([log_p, rest], -1) / 2).logsumexp(-1)
    options = {"kind": kind, "temperature": 2.0, "backend": backend, **KINDS[kind]}
    close(
        kd.topk_divergence(student, log_p, indices, compat="distillkit", **options),
        kd.topk_divergence(student, log_p, indices, teacher_logsumexp=whole, **options),
    )


def test_values_that_exceed_one_are_renormalised(backend, device):
    """Log-probabilities in bf16 may sum to more than 1."""
    student, teacher = dense(device=device)
    values, indices = teacher.log_softmax(-1).topk(40)
    over = (values + 0.1)[:, :30]
    value = kd.topk_divergence(student, over, indices[:, :30], missing="tail", backend=backend)
    assert over.exp().sum(-1).min() > 1
    expected = kd.topk_divergence(student, over, indices[:, :30], missing="zero", backend=backend)
    close(value, expected)


@kinds
def test_a_teacher_with_one_class(kind, backend, device):
    """One-hot: nothing is left for the tail, and reverse KL is finite all the same."""
    student, _ = dense(device=device)
    student.requires_grad_()
    values, indices = torch.zeros(6, 1, device=device), torch.arange(6, device=device)[:, None]
    options = {"kind": kind, "reduction": "none", "backend": backend, **KINDS[kind]}
    rows = kd.topk_divergence(student, values, indices, **options)
    p = student.softmax(-1).gather(-1, indices).squeeze(-1)
    expected = {
        "forward_kl": -p.log(),
        "reverse_kl": p * p.log() + (1 - p) * ((1 - p).log() - math.log(1e-7)),
        "tv": 1 - p,
        "js": 0.3 * -(0.3 + 0.7 * p).log()
        + 0.7 * (p * (p / (0.3 + 0.7 * p)).log() - (1 - p) * math.log(0.7)),
    }[kind]
    close(rows, expected, rel=1e-6)
    gradient, wanted = (torch.autograd.grad(v.sum(), student)[0] for v in (rows, expected))
    close(gradient, wanted, rel=1e-6)
