# SPDX-License-Identifier: Apache-2.0
"""Divergences from a teacher stored as its top-k values, in plain torch.

A row becomes one of k + 1 classes, the stored ones and the tail, on both sides; of these it is the
rowwise family's divergence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdkernels.divergences import (
    KINDS,
    LEAST_TAIL,
    MISSING,
    TopKChoices,
    TopKNumbers,
)
from kdkernels.ops.rowwise import compute_dtype
from kdkernels.reference.rows import (
    counted,
    reduced,
    squared,
    temperatures,
    tempered,
    weighted,
)
from kdkernels.reference.rowwise.divergences import Gradient, LogRatio, Softmax, divergence


def _logsumexp(x: Tensor) -> Tensor:
    """(N, k) -> (N, 1); -inf, without a derivative, where all are."""
    some = ~torch.isneginf(x).all(-1, keepdim=True)
    total = torch.logsumexp(torch.where(some, x, 0.0), -1, keepdim=True)
    return torch.where(some, total, -math.inf)


def _teacher_tail(
    values: Tensor,  # (N, k), -inf where absent
    others: Tensor,  # (N, 1) classes that are not stored
    tau: Tensor | float,
    logsumexp: Tensor | None,  # (N, 1)
    kind: str,
    spread: bool,
) -> Tensor:
    """(N, 1): the tail's logit beside ``values / tau``."""
    u = tempered(values, tau)
    captured = _logsumexp(values) if logsumexp is None else _logsumexp(u) - logsumexp
    exists = (captured < 0) & (others > 0)
    log_tail = torch.log(-torch.expm1(torch.where(exists, captured, -1.0)))
    if logsumexp is not None:
        tail = logsumexp + log_tail
    else:
        width = others.clamp(min=1).log() if spread else 0.0
        tail = width + (log_tail - width) / tau
    least = torch.full_like(tail, -math.inf)
    if kind == "reverse_kl":
        least = torch.where(others > 0, _logsumexp(u.detach()) + math.log(LEAST_TAIL), least)
    return torch.where(exists, tail, least)


def sparse(
    student: Tensor,  # (..., C)
    values: Tensor,  # (..., k)
    indices: Tensor,  # (N, k) int64
    logsumexp: Tensor | None,  # (N,)
    given,  # kdkernels.functional.rows.Rows
    numbers: TopKNumbers,
    choices: TopKChoices,
) -> Tensor:
    """The family's reference; see ``kdkernels.functional.topk_divergence``."""
    kind, missing = KINDS[choices.kind], MISSING[choices.missing]
    leading, classes = student.shape[:-1], student.shape[-1]
    dtype = compute_dtype(student, values)
    student = student.reshape(-1, classes).to(dtype)
    values = values.reshape(indices.shape).to(dtype)
    valid = counted(student, given, choices.ignore_index)
    # Rows that do not count are read as uniform, with one stored class, so that their NaN cannot
    # reach a derivative.
    student = torch.where(valid.unsqueeze(-1), student, 0.0)
    one_class = torch.full_like(values, -math.inf)
    one_class[:, 0] = -1.0
    values = torch.where(valid.unsqueeze(-1), values, one_class)
    indices = torch.where(valid.unsqueeze(-1), indices, 0)

    tau_s, tau_t = temperatures(given, numbers)
    absent = torch.isneginf(values)
    known = (indices >= 0) & (indices < classes)
    at = torch.where(known & ~absent, indices, 0)
    count = torch.zeros_like(student).scatter_add(-1, at, (~absent).to(dtype))
    faulty = (~absent & ~known).any(-1) | (count > 1).any(-1)
    stored = count > 0
    others = classes - stored.sum(-1, keepdim=True, dtype=dtype)

    u = tempered(student, tau_s)
    s_tail = _logsumexp(torch.where(stored, -math.inf, u))
    t_tail = torch.full_like(s_tail, -math.inf)
    if missing == "renormalize":
        s_tail = t_tail
    elif missing == "tail":
        whole = None if logsumexp is None else logsumexp.unsqueeze(-1)
        t_tail = _teacher_tail(values, others, tau_t, whole, kind, bool(choices.spread))
    inside = torch.where(absent, -math.inf, u.gather(-1, at))
    s = Softmax(torch.cat([inside, s_tail], -1), 1.0)
    t = Softmax(torch.cat([tempered(values, tau_t), t_tail], -1), 1.0)
    rows, infinite = divergence(kind, s, t, LogRatio(s, t, t.u - s.u), 0.0, numbers.beta)

    if kind == "forward_kl":
        gradient = (s.p - t.p).detach()
        share = torch.where(torch.isneginf(s_tail), 0.0, (u - s_tail).exp()) * gradient[:, -1:]
        gradient = torch.where(
            stored,
            torch.zeros_like(u).scatter_add(-1, at, torch.where(absent, 0.0, gradient[:, :-1])),
            share.detach(),
        )
        tau = tau_s.detach() if isinstance(tau_s, Tensor) else tau_s
        rows = torch.where(infinite, Gradient.apply(student, gradient / tau), rows)
    rows = torch.where(s.empty | t.empty | faulty, math.nan, rows)
    if choices.t2:
        rows = rows * squared(tau_s)
    rows = weighted(rows, infinite, given, valid)
    return reduced(rows.view(leading), valid, classes, choices.reduction)
