# SPDX-License-Identifier: Apache-2.0
"""``ensemble_triton``: launches the kernel of the ensemble family and registers it."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import ops
from kdkernels.divergences import Choices, Numbers
from kdkernels.ops.ensemble import GRAD_WEIGHTS, compute_dtype
from kdkernels.ops.rowwise import GRAD_ROWS, GRAD_TEACHER
from kdkernels.triton import scale  # noqa: F401  (registers scale_rows_)
from kdkernels.triton.ensemble_kernel import ensemble_kernel
from kdkernels.triton.layout import addressable, row_layout
from kdkernels.triton.rows import arguments as row_arguments
from kdkernels.triton.rows import labels_and_valid, run


def arguments(
    student: Tensor,  # (..., C), rows as layout.row_layout takes them
    teachers: tuple[Tensor, ...],  # M of (..., C), likewise, with the same strides
    labels: Tensor | None,  # (N,) int64 or (..., C) probabilities
    valid: Tensor | None,  # (N,) bool
    row_weight: Tensor | None,  # (N,)
    temperatures: Tensor | None,  # (1,) or (N,)
    teacher_temperatures: Tensor | None,
    weights: Tensor | None,  # (M, 1) or (M, N)
    mixture: bool,
    numbers: Numbers,
    choices: Choices,
    grads: int,
) -> dict:
    """Everything a launch takes but the grid, outputs included."""
    rows, count = student.numel() // student.shape[-1], len(teachers)
    dtype, teacher = compute_dtype(student, teachers), teachers[0]
    common = row_arguments(
        student, teacher, labels, valid, row_weight, temperatures, teacher_temperatures, numbers,
        choices, grads, dtype,
    )  # fmt: skip
    grad_teachers = row_grads = None
    if grads & GRAD_TEACHER:
        grad_teachers = teacher.new_empty((count, *student.shape))
    if grads & GRAD_ROWS:
        row_grads = student.new_empty((4 + count, rows), dtype=dtype)
    return common | {
        "teachers": tuple(teachers),
        "weights": weights,
        "grad_teachers": grad_teachers,
        "row_grads": row_grads,
        "M": count,
        "MIXTURE": mixture,
        "ALL": bool(grads & GRAD_WEIGHTS),
        "SCALAR_W": weights is not None and weights.shape[1] == 1,
    }


def _alike(teachers: list[Tensor]) -> tuple[Tensor, ...]:
    """The teachers with rows in one layout: as they are, or copied."""
    layouts = {row_layout(x) for x in teachers}
    if len(layouts) == 1 and None not in layouts:
        return tuple(teachers)
    return tuple(x.contiguous() for x in teachers)


def _ensemble(
    student, teachers, mixture, numbers, choices, grads, labels=None, mask=None, row_weight=None,
    temperatures=None, teacher_temperatures=None, weights=None,
):  # fmt: skip
    """Run the kernel; return its outputs, those not asked for of size 0."""
    numbers, choices = Numbers(*numbers), Choices(*choices)
    labels, valid = labels_and_valid(labels, mask, choices.ignore_index)
    with torch.cuda.device_of(student):
        launch = arguments(
            addressable(student), _alike(teachers), labels, valid, row_weight, temperatures,
            teacher_temperatures, weights, mixture, numbers, choices, grads,
        )  # fmt: skip
        return run(ensemble_kernel, launch, teachers[0], choices, "grad_teachers")


for _key in ("CUDA", "CPU") if ops.triton_interpreted() else ("CUDA",):
    torch.library.impl("kdkernels::ensemble_triton", _key, _ensemble)
