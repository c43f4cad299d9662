# SPDX-License-Identifier: Apache-2.0
"""The rowwise family in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdkernels.divergences import KINDS, TARGETS, Choices, Numbers
from kdkernels.ops.rowwise import compute_dtype
from kdkernels.reference.rows import counted, reduced, squared, temperatures, weighted
from kdkernels.reference.rowwise import target as targets
from kdkernels.reference.rowwise.divergences import Gradient, LogRatio, Softmax, divergence


def rowwise(
    student: Tensor,  # (..., C)
    teacher: Tensor,  # (..., C), or the divergence's classes
    given,  # kdkernels.functional.rows.Rows
    target: Tensor | None,  # (N,), where it is not the label
    numbers: Numbers,
    choices: Choices,
    parts: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The family's reference; see ``kdkernels.functional.rowwise`` for what it computes.

    With ``parts``, also what the target and the divergence contribute, without their weights.
    """
    labels = given.labels
    leading, classes = student.shape[:-1], student.shape[-1]
    dtype = compute_dtype(student, teacher)
    student = student.reshape(-1, classes).to(dtype)
    teacher = teacher.reshape(-1, teacher.shape[-1]).to(dtype)
    valid = counted(student, given, choices.ignore_index)
    # Rows that do not count are read as zeros, so that their NaN cannot reach a derivative.
    student = torch.where(valid.unsqueeze(-1), student, 0.0)
    teacher = torch.where(valid.unsqueeze(-1), teacher, 0.0)

    tau_s, tau_t = temperatures(given, numbers)
    one_tau = numbers.teacher_temperature == 0
    t2 = squared(tau_s) if choices.t2 else 1.0
    # Whatever has no weight has a gradient all the same, of 0.
    rows = sum((torch.where(x.isfinite(), x, 0.0) * 0.0).sum(-1) for x in (student, teacher))
    infinite = own_infinite = others_infinite = torch.zeros_like(valid)
    own = others = torch.zeros_like(rows)
    if numbers.kd_weight or numbers.target_weight:
        first, last = choices.first, choices.first + (choices.width or classes)
        window = slice(first, last)
        side_s = student[:, window]
        side_t = teacher[:, window] if teacher.shape[-1] == classes else teacher
        form = TARGETS[choices.target]
        known = None
        if form != "ordinary":
            target = labels if target is None else target
            seen = (0, classes) if form == "weighting" else (first, last)
            known = _is_target(target - seen[0], seen[1] - seen[0])
        weight, own_weight = numbers.kd_weight, numbers.target_weight
        if form in ("separate", "weighting"):
            log_s, log_t = (targets.log_prob(x, target) for x in (student, teacher))
            if form == "weighting":
                weight = weight * targets.omega(log_s.detach(), log_t.detach())
            else:
                own_weight = own_weight * log_t.detach().exp()
        if form == "tempered":
            side_t = torch.where(known, side_t * (tau_t / numbers.target_temperature), side_t)
        others, others_infinite, remains, tckd = _divergence(
            side_s, side_t, tau_s, tau_t, one_tau, form, known, numbers, choices
        )
        if form == "decoupled":
            own, own_infinite, own_remains = tckd
            remains = weight * remains + own_weight * own_remains
            own = own * t2
        else:
            remains = (weight.unsqueeze(-1) if isinstance(weight, Tensor) else weight) * remains
        # What has no weight is not looked at.
        others_infinite = others_infinite & (torch.as_tensor(weight) != 0)
        others = torch.where(others_infinite, 0.0, others) * t2
        kept = Gradient.apply(side_s, remains) * t2
        distilled = (weight * others if numbers.kd_weight else 0.0) + (
            own_weight * own if form == "decoupled" else 0.0
        )
        bad = sum((~(x < math.inf)).any(-1) | torch.isneginf(x).all(-1) for x in (side_s, side_t))
        if known is not None:
            bad = bad + ~known.any(-1)
        bad = bad > 0
        own_infinite, others_infinite = own_infinite & ~bad, others_infinite & ~bad
        infinite = (own_infinite & (torch.as_tensor(own_weight) != 0)) | others_infinite
        rows = rows + torch.where(infinite, kept, distilled)
        if form == "separate":
            own, too_large = targets.cross_entropy(Softmax(student, 1.0), student, target, 0.0)
            rows = rows + own_weight * own
            own = own_weight / numbers.target_weight * own
            own_infinite = too_large & (own_weight > 0)
            infinite = infinite | own_infinite
        rows = torch.where(bad, math.nan, rows)
    if numbers.ce_weight:
        s = Softmax(student, 1.0)
        value, too_large = targets.cross_entropy(s, student, labels, numbers.label_smoothing)
        value = torch.where(s.empty, math.nan, value)
        infinite = infinite | too_large
        rows = rows + numbers.ce_weight * value

    def total(rows: Tensor, infinite: Tensor) -> Tensor:
        rows = weighted(rows, infinite, given, valid)
        return reduced(rows.view(leading), valid, choices.width or classes, choices.reduction)

    if not parts:
        return total(rows, infinite)
    return (
        total(rows, infinite),
        total(own.detach(), own_infinite),
        total(others.detach(), others_infinite),
    )


def _is_target(target: Tensor, classes: int) -> Tensor:
    return target.unsqueeze(-1) == torch.arange(classes, device=target.device)


def _divergence(s, t, tau_s, tau_t, one_tau, form, target, numbers: Numbers, choices: Choices):
    """Per row: the divergence, where it is infinite, and the student's gradient that then remains.

    And, if ``decoupled``, the same of the target against the others.
    """
    kind = KINDS[choices.kind]
    divisor = 1.0
    if choices.standardize:
        (s, divisor), (t, _) = targets.standardized(s), targets.standardized(t)
        one_tau = False
    whole_s, whole_t, both = s, t, torch.ones_like(s[..., :1], dtype=torch.bool)
    if form in ("decoupled", "separate"):
        (s, some_s), (t, some_t) = targets.others(s, target), targets.others(t, target)
        both = some_s & some_t  # else there is nothing to compare
    p_s, p_t = Softmax(s, tau_s), Softmax(t, tau_t)

    def difference(z_s, z_t):
        """Of the tempered rows, each about its maximum; 0 where one is off."""
        on = ~(torch.isneginf(z_s) | torch.isneginf(z_t))
        if one_tau:
            return torch.where(on, z_t - z_s - (p_t.shift - p_s.shift), 0.0) / tau_s
        return torch.where(on, z_t - p_t.shift, 0.0) / tau_t - (
            torch.where(on, z_s - p_s.shift, 0.0) / tau_s
        )

    ratio = LogRatio(p_s, p_t, difference(s, t))
    value, infinite = divergence(kind, p_s, p_t, ratio, numbers.alpha, numbers.beta)
    value, infinite = torch.where(both.squeeze(-1), value, 0.0), infinite & both.squeeze(-1)
    rate = 1 / (divisor * (tau_s.detach() if isinstance(tau_s, Tensor) else tau_s))
    remains = torch.zeros_like(s)
    if kind in ("forward_kl", "cross_entropy"):
        remains = torch.where(both, (p_s.p - p_t.p).detach() * rate, 0.0)
    if form != "decoupled":
        return value, infinite, remains, None
    sides = []
    for z, tau, side, some in ((whole_s, tau_s, p_s, some_s), (whole_t, tau_t, p_t, some_t)):
        off = torch.isneginf(z)
        sides.append(
            targets.Odds(torch.where(off, 0.0, z - side.shift) / tau, off, target, some, side)
        )
    at_target = torch.where(target, difference(whole_s, whole_t), 0.0).sum(-1, keepdim=True)
    own, own_infinite, own_remains = targets.decoupled(
        *sides, target, p_s.p, at_target - ratio.delta
    )
    return value, infinite, remains, (own, own_infinite, own_remains * rate)
