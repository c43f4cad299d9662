# SPDX-License-Identifier: Apache-2.0
"""List-wise losses in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdkernels.divergences import REDUCTIONS
from kdkernels.reference.rows import tempered, weighted


def pld(student: Tensor, teacher: Tensor, given, ignore_index: int) -> Tensor:
    """Plackett-Luce distillation; see ``kdkernels.functional.pld_loss``.

    ``given``: kdkernels.functional.rows.Rows.
    """
    labels, mask, _, temperatures, teacher_temperatures = given[:5]
    leading, classes = student.shape[:-1], student.shape[-1]
    dtype = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    valid = labels != ignore_index
    if mask is not None:
        valid = valid & mask
    # Rows that do not count are read as zeros, so that their NaN cannot reach a derivative.
    s, t = (
        torch.where(valid.unsqueeze(-1), x.reshape(-1, classes).to(dtype), 0.0)
        for x in (student, teacher)
    )
    tau_s = given.temperature if temperatures is None else temperatures.unsqueeze(-1)
    tau_t = given.teacher_temperature or tau_s
    if teacher_temperatures is not None:
        tau_t = teacher_temperatures.unsqueeze(-1)

    known = (labels >= 0) & (labels < classes)
    first = torch.where(known & valid, labels, 0).unsqueeze(-1)
    order = t.detach().scatter(-1, first, math.inf).argsort(dim=-1, descending=True, stable=True)
    weight = torch.softmax(tempered(t, tau_t), -1).gather(-1, order)
    off = torch.isneginf(s)
    ranked = tempered(s, tau_s).gather(-1, order)
    # The choice among those not yet chosen; a class without weight is none, wherever it stands.
    remaining = ranked.flip(-1).logcumsumexp(-1).flip(-1)
    live = weight > 0
    gap = torch.where(live & ~ranked.isneginf(), ranked, 0.0) - torch.where(live, remaining, 0.0)
    infinite = (live & ranked.isneginf()).any(-1)
    rows = -(weight * torch.where(infinite.unsqueeze(-1), 0.0, gap)).sum(-1)
    empty = off.all(-1) | torch.isneginf(t).all(-1) | ~(s < math.inf).all(-1)
    rows = torch.where((empty | ~known) & valid, math.nan, rows)
    if given.t2:
        rows = rows * (tau_s.squeeze(-1) if isinstance(tau_s, Tensor) else tau_s) ** 2
    rows = weighted(rows, infinite, given, valid)
    reduction = REDUCTIONS[given.reduction]
    if reduction == "none":
        return rows.view(leading)
    if reduction == "sum":
        return rows.sum()
    count = valid.sum().clamp(min=1).to(dtype)
    return rows.sum() / (count * classes if reduction == "mean" else count)
