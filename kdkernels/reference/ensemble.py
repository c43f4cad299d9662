# SPDX-License-Identifier: Apache-2.0
"""KL divergences of several teachers from one student in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels.divergences import Choices, Numbers
from kdkernels.ops.ensemble import compute_dtype
from kdkernels.reference.rows import counted, reduced, squared, temperatures, weighted
from kdkernels.reference.rowwise.divergences import Gradient, LogRatio, Softmax, divergence, phi
from kdkernels.reference.rowwise.target import cross_entropy

# log q of a class that only teachers without weight have mass in, for their weights' gradient.
_NO_MASS = {torch.float32: 1e-30, torch.float64: 1e-300}


def _mixture(s: Softmax, teachers: list[tuple[Tensor, Softmax, Tensor]], tau):
    """Per row: KL(q || p_s) of ``q = sum_m w_m p_m`` where it is finite (else 0), and where not."""
    zero = torch.zeros_like(s.p)
    q, gap = zero, zero
    for weight, t, dz in teachers:
        ratio = LogRatio(s, t, dz)
        near = ratio.on & (ratio.d.abs() < 0.5)
        difference = s.p * torch.expm1(torch.where(near, ratio.d, zero))
        q = q + weight * t.p
        gap = gap + weight * torch.where(near, difference, t.p - s.p)
    near = (s.p > 0) & ((gap / s.p).detach().abs() < 0.5)
    e = torch.where(near, gap, zero) / torch.where(near, s.p, 1.0)
    log_q = torch.clamp(q, min=_NO_MASS[q.dtype]).log()
    far = q * torch.where(s.off, zero, log_q - s.log_p) - gap
    rows = torch.where(near, s.p * phi(e, torch.log1p(e)), far).sum(-1)
    infinite = (s.off & (q > 0)).any(-1)
    remains = Gradient.apply(tau[0], (s.p - q.detach()) / tau[1])
    return torch.where(infinite, remains, rows), infinite


def _sum(s: Softmax, teachers: list[tuple[Tensor, Softmax, Tensor]], tau):
    """Per row: ``sum_m w_m KL(p_m || p_s)`` over the finite ones, and where one is infinite."""
    rows, infinite = 0.0, False
    for weight, t, dz in teachers:
        weight = weight.squeeze(-1)
        value, beyond = divergence("forward_kl", s, t, LogRatio(s, t, dz), 0.0, 0.0)
        remains = Gradient.apply(tau[0], (s.p - t.p.detach()) / tau[1])
        # An infinite divergence moves the student, and not its own weight.
        rows = rows + torch.where(beyond, weight.detach() * remains, weight * value)
        infinite = infinite | (beyond & (weight != 0))
    return rows, infinite


def ensemble(
    student: Tensor,  # (..., C)
    teachers: Sequence[Tensor],  # M of (..., C)
    weights: Tensor | None,  # (M, 1) or (M, N); None: 1 / M
    given,  # kdkernels.functional.rows.Rows
    mixture: bool,
    numbers: Numbers,
    choices: Choices,
) -> Tensor:
    """The family's reference; see ``kdkernels.functional.ensemble`` for what it computes."""
    labels = given.labels
    leading, classes = student.shape[:-1], student.shape[-1]
    dtype = compute_dtype(student, teachers)
    student = student.reshape(-1, classes).to(dtype)
    valid = counted(student, given, choices.ignore_index)
    if weights is None:
        weights = student.new_full((len(teachers), 1), 1 / len(teachers))
    weights = weights.expand(len(teachers), len(valid)).unsqueeze(-1)
    # What does not count is read as zeros, so that its NaN cannot reach a derivative.
    student = torch.where(valid.unsqueeze(-1), student, 0.0)

    tau_s, tau_t = temperatures(given, numbers)
    one_tau = numbers.teacher_temperature == 0
    s = Softmax(student, tau_s)
    rows = (torch.where(student.isfinite(), student, 0.0) * 0.0).sum(-1)
    empty = s.empty
    terms = []
    for weight, logits in zip(weights, teachers, strict=True):
        logits = logits.reshape(-1, classes).to(dtype)
        sound = logits.amax(-1, keepdim=True).isfinite()
        counts = valid.unsqueeze(-1) & ((weight != 0) | (sound & weights.requires_grad))
        logits, weight = torch.where(counts, logits, 0.0), torch.where(counts, weight, 0.0)
        t = Softmax(logits, tau_t)
        dz = (logits - student - (t.shift - s.shift)) / tau_s if one_tau else t.u - s.u
        terms.append((weight, t, dz))
        empty = empty | t.empty
    tau = student, tau_s.detach() if isinstance(tau_s, Tensor) else tau_s
    value, infinite = (_mixture if mixture else _sum)(s, terms, tau)
    value = torch.where(empty, math.nan, value)
    if choices.t2:
        value = value * squared(tau_s)
    rows = rows + numbers.kd_weight * value
    if numbers.ce_weight:
        s = Softmax(student, 1.0)
        if labels.dtype == torch.int64:
            labels = torch.where(valid, labels, 0)
        value, too_large = cross_entropy(s, student, labels, numbers.label_smoothing)
        value = torch.where(s.empty, math.nan, value)
        infinite = infinite | too_large
        rows = rows + numbers.ce_weight * value
    rows = weighted(rows, infinite, given, valid)
    return reduced(rows.view(leading), valid, classes, choices.reduction)


# Added to every class of a target, which is not normalised again.
_OKDDIP = 1e-7


def okddip(loss, student, teachers, weights, given, mixture, numbers, choices) -> Tensor:
    """From the loss of each row, that of targets raised by 1e-7, reduced."""
    dtype, leading, classes = loss.dtype, student.shape[:-1], student.shape[-1]
    student = student.reshape(-1, classes).to(dtype)
    valid = counted(student, given, choices.ignore_index)
    tau_s, tau_t = temperatures(given, numbers)

    def log_softmax(logits, tau):
        logits = logits.reshape(-1, classes).to(dtype)
        return torch.log_softmax(torch.where(valid.unsqueeze(-1), logits, 0.0) / tau, -1)

    targets = [log_softmax(t, tau_t).exp() for t in teachers]
    if weights is None:
        weights = loss.new_full((len(teachers), 1), 1 / len(teachers))
    if mixture:
        targets = [sum(w.unsqueeze(-1) * p for w, p in zip(weights, targets, strict=True))]
        weights = torch.ones_like(weights[:1])
    rows = 0.0
    for weight, p in zip(weights, targets, strict=True):
        p = p.clamp(min=torch.finfo(dtype).tiny)
        raised = p + _OKDDIP
        rows = rows + weight * (raised * raised.log() - p * p.log()).sum(-1)
        rows = rows - weight * _OKDDIP * log_softmax(student, tau_s).sum(-1)
    scale = numbers.kd_weight
    if choices.t2:
        scale = scale * squared(tau_s)
    if given.row_weight is not None:
        scale = scale * given.row_weight
    loss = loss + torch.where(valid, rows * scale, 0.0).view(leading)
    return reduced(loss, valid, classes, choices.reduction)
