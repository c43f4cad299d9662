# SPDX-License-Identifier: Apache-2.0
"""What the references of losses over rows of logits share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdkernels.divergences import REDUCTIONS


def tempered(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """``logits / temperature``, whose derivatives know nothing of -inf."""
    off = torch.isneginf(logits)
    return torch.where(off, -math.inf, torch.where(off, 0.0, logits) / temperature)


def counted(student: Tensor, given, ignore_index: int) -> Tensor:
    """Which of the rows of ``student`` (N, C) count; ``given``: kdkernels.functional.rows.Rows."""
    valid = torch.ones(student.shape[0], dtype=torch.bool, device=student.device)
    if given.mask is not None:
        valid = valid & given.mask
    if given.labels is not None and given.labels.dtype == torch.int64:
        valid = valid & (given.labels != ignore_index)
    return valid


def temperatures(given, numbers) -> tuple[Tensor | float, Tensor | float]:
    """The student's and the teacher's, (N, 1) or (1, 1) where they are tensors."""
    tau_s = numbers.temperature if given.temperatures is None else given.temperatures.unsqueeze(-1)
    if numbers.teacher_temperature == 0:
        return tau_s, tau_s
    if given.teacher_temperatures is None:
        return tau_s, numbers.teacher_temperature
    return tau_s, given.teacher_temperatures.unsqueeze(-1)


def squared(tau: Tensor | float) -> Tensor | float:
    """What "t2" scales rows by."""
    return tau.squeeze(-1) ** 2 if isinstance(tau, Tensor) else tau**2


def weighted(rows: Tensor, infinite: Tensor, given, valid: Tensor) -> Tensor:
    """``rows`` times their weights, or +inf: 0 where they do not count, whatever they hold there.

    Nor does that reach a weight's gradient.
    """
    if given.row_weight is not None:
        weight = torch.where(valid, given.row_weight, 0.0)
        rows, infinite = rows * weight, infinite & (weight != 0)
    return torch.where(valid, rows + torch.where(infinite, math.inf, 0.0), 0.0)


def reduced(rows: Tensor, valid: Tensor, classes: int, reduction: int) -> Tensor:
    if REDUCTIONS[reduction] == "none":
        return rows
    total = rows.sum()
    if REDUCTIONS[reduction] == "sum":
        return total
    count = valid.sum().clamp(min=1).to(rows.dtype)
    return total / (count * classes if REDUCTIONS[reduction] == "mean" else count)
