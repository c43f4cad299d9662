# SPDX-License-Identifier: Apache-2.0
"""Sums over the elements of two maps: half of a square each, of what is below."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.ops.features import compute_dtype
from kdkernels.ops.maps.elementwise import Numbers


def _square(s, t, c, numbers):
    return (s - t).square() * (1.0 if c is None else c)


def _ofd(s, t, c, numbers):
    target = t if c is None else torch.where(t <= c, c, t)
    return (s - target).square() * ((s > target) | (target > 0))


def _ab(s, t, c, numbers):
    m = numbers.margin
    return torch.where(t > 0, (s - m).clamp(max=0), (s + m).clamp(min=0)).square()


_SQUARES = {"square": _square, "ofd": _ofd, "ab": _ab}


def elementwise(
    kind: str,
    student: Tensor,  # (B, C, ...)
    teacher: Tensor,
    parameter: Tensor | None,  # of their shape but for sizes of 1
    factor: float,
    numbers: Numbers,
) -> Tensor:
    """The family's reference; see ``csrc/kd/elementwise.h`` for what it computes."""
    dtype = compute_dtype(student, teacher)
    squares = _SQUARES[kind](student.to(dtype), teacher.to(dtype), parameter, numbers)
    return factor / 2 * squares.sum()
