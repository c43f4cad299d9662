# SPDX-License-Identifier: Apache-2.0
"""What every loss over rows of logits is given, validated."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels import backends, checks, divergences


class Rows(NamedTuple):
    """Arguments of one call over N rows; the numbers stand where there is no tensor."""

    labels: Tensor | None  # (N,) int64, or probabilities (..., C)
    mask: Tensor | None  # (N,) bool
    row_weight: Tensor | None  # (N,)
    temperatures: Tensor | None  # (1,) or (N,)
    teacher_temperatures: Tensor | None
    temperature: float
    teacher_temperature: float  # 0: the student's, be that a number or a tensor
    t2: bool
    reduction: int  # of divergences.REDUCTIONS
    backend: str  # the one that runs


def prepare(
    name: str, family: str, student: Tensor, dtype: torch.dtype, labels, temperature,
    teacher_temperature, scale, reduction, mask, ignore_index, row_weight, backend,
) -> Rows:  # fmt: skip
    """Validate the arguments shared by the losses over rows, and choose the backend.

    ``student`` has been validated, and ``dtype`` is what the rows are accumulated in.
    """
    checks.choice(name, "scale", scale, divergences.SCALES)
    checks.choice(name, "reduction", reduction, divergences.REDUCTIONS)
    value, tensor = checks.temperature(name, "temperature", temperature, student, dtype)
    # Known to be the student's, it is exact where the logits are close.
    teacher_value, teacher_tensor = 0.0, None
    if teacher_temperature is not None and teacher_temperature is not temperature:
        teacher_value, teacher_tensor = checks.temperature(
            name, "teacher_temperature", teacher_temperature, student, dtype
        )
        if tensor is None and teacher_tensor is None and teacher_value == value:
            teacher_value = 0.0
    checks.integer(name, "ignore_index", ignore_index)
    backend = backends.select(family, student.device.type, backend, name)
    if labels is not None:
        # The CPU kernels look at every label, and say what is wrong with one.
        labels = checks.labels(name, labels, student, ignore_index, read=backend != "cpu")
    if mask is not None:
        mask = checks.per_row(name, "mask", mask, student, None)
    if row_weight is not None:
        row_weight = checks.per_row(name, "row_weight", row_weight, student, dtype)
    return Rows(
        labels, mask, row_weight, tensor, teacher_tensor, value, teacher_value, scale == "t2",
        divergences.REDUCTIONS.index(reduction), backend,
    )  # fmt: skip
