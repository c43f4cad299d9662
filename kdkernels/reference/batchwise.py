# SPDX-License-Identifier: Apache-2.0
"""Losses that relate a batch's rows to each other, in plain torch."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from kdkernels.divergences import KINDS, REDUCTIONS, Choices, Numbers
from kdkernels.ops.batchwise import DistChoices, DistNumbers, Relations
from kdkernels.ops.rowwise import compute_dtype
from kdkernels.reference.rows import tempered
from kdkernels.reference.rowwise import rowwise

_EPS = 1e-8


def _read(student: Tensor, teacher: Tensor, mask: Tensor | None):
    """Both as (N, C) in the accumulation dtype, zero where masked, and which rows take part."""
    dtype, classes = compute_dtype(student, teacher), student.shape[-1]
    student = student.reshape(-1, classes).to(dtype)
    teacher = teacher.reshape(-1, classes).to(dtype)
    if mask is None:
        mask = torch.ones(student.shape[0], dtype=torch.bool, device=student.device)
    counts = mask.unsqueeze(-1)
    return torch.where(counts, student, 0.0), torch.where(counts, teacher, 0.0), counts


def _pearson(a: Tensor, b: Tensor, dim: int, clamp: bool) -> Tensor:
    """The correlation of centred vectors."""
    norm_a, norm_b = (torch.linalg.vector_norm(x, dim=dim) for x in (a, b))
    product = (a * b).sum(dim)
    if clamp:
        return product / (norm_a.clamp(min=_EPS) * norm_b.clamp(min=_EPS))
    return product / (norm_a * norm_b + _EPS)


def dist(
    student: Tensor,  # (..., C)
    teacher: Tensor,  # (..., C)
    mask: Tensor | None,  # (N,) bool
    temperature: Tensor | None,  # (1,); numbers.temperature where None
    numbers: DistNumbers,
    choices: DistChoices,
) -> Tensor:
    """See ``kdkernels.functional.dist_loss``."""
    student, teacher, counts = _read(student, teacher, mask)
    if student.shape[0] == 0:
        return student.sum() + teacher.sum()
    tau = numbers.temperature if temperature is None else temperature
    number = counts.sum().clamp(min=1)
    p, q = tempered(student, tau).softmax(-1), tempered(teacher, tau).softmax(-1)

    def by_row(x: Tensor) -> Tensor:
        # Measured from one element, so that a constant vector is exactly 0 when centred.
        x = x - x[:, :1]
        return x - x.mean(-1, keepdim=True)

    def by_column(x: Tensor) -> Tensor:
        pivot = x.index_select(0, counts.to(torch.uint8).argmax(0))
        x = torch.where(counts, x - pivot, 0.0)
        return torch.where(counts, x - x.sum(0) / number, 0.0)

    rows = 1 - _pearson(by_row(p), by_row(q), -1, choices.clamp)
    inter = torch.where(counts.squeeze(-1), rows, 0.0).sum() / number
    columns = 1 - _pearson(by_column(p), by_column(q), 0, choices.clamp)
    loss = numbers.beta * inter + numbers.gamma * torch.where(counts.any(), columns, 0.0).mean()
    return (loss * tau**2 if choices.t2 else loss).sum()


def mlkd(
    student: Tensor,  # (..., C)
    teacher: Tensor,  # (..., C)
    mask: Tensor | None,  # (N,) bool
    temperatures: tuple[float, ...],
    relations: Relations,
) -> Tensor:
    """See ``kdkernels.functional.mlkd_loss``."""
    choices = Choices(kind=KINDS.index("forward_kl"), reduction=REDUCTIONS.index("sum"))
    given = SimpleNamespace(  # as kdkernels.functional.rows.Rows
        labels=None, mask=mask, row_weight=relations.row_weight, temperatures=None,
        teacher_temperatures=None,
    )  # fmt: skip
    loss = sum(
        rowwise(student, teacher, given, None, Numbers(temperature=tau), choices)
        for tau in temperatures
    )
    student, teacher, counts = _read(student, teacher, mask)

    def squared(difference: Tensor, chosen: Tensor | None) -> Tensor:
        if chosen is not None:
            difference = difference * (chosen.unsqueeze(-1) * chosen)
        return difference.square().sum()

    weights = relations.weights
    if relations.scale is not None:
        weights = [weight * scale for weight, scale in zip(weights, relations.scale, strict=True)]
    for tau in temperatures if any(relations.weights) else ():
        p = torch.where(counts, (student / tau).softmax(-1), 0.0)
        q = torch.where(counts, (teacher / tau).softmax(-1), 0.0)
        batch = squared(p @ p.mT - q @ q.mT, relations.samples)
        classes = squared(p.mT @ p - q.mT @ q, relations.classes)
        loss = loss + weights[0] * batch + weights[1] * classes
    return loss
