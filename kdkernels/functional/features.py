# SPDX-License-Identifier: Apache-2.0
"""What the losses over features share before their kernel: validation, stages, spatial sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kdkernels import checks
from kdkernels.scalars import in_dimensions

REDUCTIONS = ("mean", "sum")


def stages(name: str, student, teacher) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a student's and a teacher's features: of one stage, or of as many as both give."""
    if isinstance(student, Tensor) != isinstance(teacher, Tensor):
        raise TypeError(
            f"{name}: student and teacher must both be tensors or both sequences of tensors, got "
            f"{type(student).__name__} and {type(teacher).__name__}."
        )
    if isinstance(student, Tensor):
        return [(student, teacher)]
    for argument, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Sequence) or not value:
            raise TypeError(
                f"{name}: {argument} must be a tensor or a sequence of tensors, got {value!r}."
            )
    if len(student) != len(teacher):
        raise ValueError(
            f"{name}: teacher must have the student's number of stages {len(student)}, got "
            f"{len(teacher)}."
        )
    return list(zip(student, teacher, strict=True))


def pair(
    name: str,
    student: Tensor,
    teacher: Tensor,
    *,
    shape: str,
    same: Sequence[int] | None = None,
) -> None:
    """Floating-point features of a documented shape such as "(B, C, H, W)", on one device.

    ``same``: dimensions that must agree, by default all of them; no dimension may be empty but the
    batch.
    """
    dims = shape.count(",") + 1 if "..." not in shape else None
    for argument, value in (("student", student), ("teacher", teacher)):
        checks.floats(name, argument, value)
        wrong = value.dim() < 2 if dims is None else value.dim() != dims
        if wrong or 0 in value.shape[1:]:
            raise ValueError(
                f"{name}: {argument} must have shape {shape} with no empty dimension but the "
                f"batch, got {tuple(value.shape)}."
            )
    if same is None:
        agree = student.shape == teacher.shape
    else:
        agree = student.dim() == teacher.dim() and all(
            student.shape[d] == teacher.shape[d] for d in same
        )
    if not agree:
        where = "" if same is None else in_dimensions(same)
        raise ValueError(
            f"{name}: teacher must have the student's shape {tuple(student.shape)}{where}, got "
            f"{tuple(teacher.shape)}."
        )
    checks.same_device(name, "teacher", teacher, student)


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Maps (B, C, H, W), the larger one (by its height, as the suites have it) pooled to the other.

    Adaptive average pooling, differentiable.
    """
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    if student.shape[2] > teacher.shape[2]:
        return F.adaptive_avg_pool2d(student, teacher.shape[2:]), teacher
    return student, F.adaptive_avg_pool2d(teacher, student.shape[2:])
