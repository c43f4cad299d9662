# SPDX-License-Identifier: Apache-2.0
"""How the maps' operators take their tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def packed(maps: Tensor) -> Tensor:
    """``maps`` (B, C, H, W), copied unless they are contiguous or channels-last."""
    if maps.is_contiguous() or maps.is_contiguous(memory_format=torch.channels_last):
        return maps
    return maps.contiguous()


def packed_alike(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the student's layout."""
    student = packed(student)
    if student.is_contiguous():
        return student, teacher.contiguous()
    return student, teacher.contiguous(memory_format=torch.channels_last)
