# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import torch
from torch import Tensor

from kdkernels.ops.features import compute_dtype

_EPS = 1e-12


def spatial_attention(student: Tensor, teacher: Tensor, power: int, distance: int) -> Tensor:
    """Sum over samples of a distance of normalised attention maps."""
    dtype = compute_dtype(student, teacher)
    difference = _normalised(student.to(dtype), power) - _normalised(teacher.to(dtype), power)
    if distance == 0:
        return difference.square().sum()
    if distance == 1:
        return difference.abs().sum()
    return torch.linalg.vector_norm(difference, dim=1).sum()


def _normalised(maps: Tensor, power: int) -> Tensor:
    attention = maps.pow(power).mean(1).flatten(1)
    norm = torch.linalg.vector_norm(attention, dim=1, keepdim=True)
    # Zeros are over infinity: they stay zero, and without a gradient.
    return attention / norm.clamp(min=_EPS).masked_fill(norm == 0, math.inf)
