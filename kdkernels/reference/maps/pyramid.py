# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops.features import compute_dtype


def pyramid(
    student: Tensor, teacher: Tensor, levels: Sequence[int], weights: Sequence[float]
) -> Tensor:
    """Sum over samples and channels of weighted mean squares (``ops.maps.pyramid``)."""
    dtype = compute_dtype(student, teacher)
    difference = student.to(dtype) - teacher.to(dtype)
    positions = student.shape[2] * student.shape[3]
    loss = weights[0] * difference.square().sum() / positions
    for level, weight in zip(levels, weights[1:], strict=True):
        pooled = F.adaptive_avg_pool2d(difference, level)
        loss = loss + weight * pooled.square().sum() / level**2
    return loss


def pkd(student: Tensor, teacher: Tensor, eps: float, reduction: str) -> Tensor:
    """Half the squared difference of channels standardised over samples and positions."""
    dtype = compute_dtype(student, teacher)
    standard = _standardised(student.to(dtype), eps) - _standardised(teacher.to(dtype), eps)
    loss = 0.5 * standard.square().sum()
    return loss / max(standard.numel(), 1) if reduction == "mean" else loss


def _standardised(maps: Tensor, eps: float) -> Tensor:
    values = maps.movedim(1, -1).flatten(0, -2)
    centred = values - values.mean(0)
    # A constant channel has no direction to grow in: its deviation's gradient is taken as 0.
    variance = centred.square().sum(0) / max(values.shape[0] - 1, 1)
    deviation = variance.where(variance > 0, 1.0).sqrt().where(variance > 0, 0.0)
    return centred / (deviation + eps)
