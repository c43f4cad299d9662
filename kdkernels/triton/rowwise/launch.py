# SPDX-License-Identifier: Apache-2.0
"""``rowwise_triton``: launches the kernel of the rowwise family and registers it."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import ops
from kdkernels.divergences import KINDS, TARGETS, Choices, Numbers
from kdkernels.ops.rowwise import (
    GRAD_PARTS,
    GRAD_ROWS,
    GRAD_STUDENT,
    GRAD_TEACHER,
    compute_dtype,
)
from kdkernels.triton import scale  # noqa: F401  (registers scale_rows_)
from kdkernels.triton.layout import addressable
from kdkernels.triton.rows import arguments as row_arguments
from kdkernels.triton.rows import labels_and_valid, run
from kdkernels.triton.rowwise.kernel import rowwise_kernel


def arguments(
    student: Tensor,  # (..., C), rows as layout.row_layout takes them
    teacher: Tensor,  # (..., C) or the divergence's classes, likewise
    labels: Tensor | None,  # (N,) int64 or (..., C) probabilities
    valid: Tensor | None,  # (N,) bool
    row_weight: Tensor | None,  # (N,)
    temperatures: Tensor | None,  # (1,) or (N,)
    teacher_temperatures: Tensor | None,
    targets: Tensor | None,  # (N,) int64, where they are not the labels
    numbers: Numbers,
    choices: Choices,
    grads: int,
    inplace: bool = False,
) -> dict:
    """Everything a launch takes but the grid, outputs included."""
    classes = student.shape[-1]
    dtype = compute_dtype(student, teacher)
    common = row_arguments(
        student, teacher, labels, valid, row_weight, temperatures, teacher_temperatures, numbers,
        choices, 0 if inplace else grads, dtype,
    )  # fmt: skip
    first, last = choices.first, choices.first + (choices.width or classes)
    # Without its weight the divergence is not looked at, and no target either.
    kd = numbers.kd_weight != 0 or numbers.target_weight != 0
    target = TARGETS[choices.target] if kd else "ordinary"
    narrow = teacher.shape[-1] != classes
    parts = bool(grads & GRAD_PARTS)
    if inplace and grads & GRAD_STUDENT:
        common["grad_student"] = student
    row_grads = None
    if grads & GRAD_ROWS:
        row_grads = student.new_empty((6 if parts else 4, common["rows"]), dtype=dtype)
    return common | {
        "teacher": teacher,
        "targets": None if target == "ordinary" else labels if targets is None else targets,
        "grad_teacher": teacher.new_empty(teacher.shape) if grads & GRAD_TEACHER else None,
        "row_grads": row_grads,
        "target_weight": numbers.target_weight,
        "target_temperature": numbers.target_temperature,
        "KIND": KINDS[choices.kind],
        "ALPHA": numbers.alpha,
        "BETA": numbers.beta,
        "TARGET": target,
        "STANDARDIZE": bool(choices.standardize),
        "FIRST": first,
        "LAST": last,
        "T_FIRST": first if narrow else 0,
        "T_LAST": last if narrow else classes,
        "KD": kd,
        # Standardised, the rows have temperatures of their own.
        "SAME": common["SAME"] and not choices.standardize,
        "PARTS": parts,
        "INPLACE": inplace,
    }


def _launch(
    student, teacher, numbers, choices, grads, labels=None, mask=None, row_weight=None,
    temperatures=None, teacher_temperatures=None, targets=None, *, inplace=False,
):  # fmt: skip
    """Run the kernel; return its outputs, those not asked for of size 0."""
    numbers, choices = Numbers(*numbers), Choices(*choices)
    labels, valid = labels_and_valid(labels, mask, choices.ignore_index)
    with torch.cuda.device_of(student):
        launch = arguments(
            addressable(student), addressable(teacher), labels, valid, row_weight,
            temperatures, teacher_temperatures, targets, numbers, choices, grads, inplace,
        )  # fmt: skip
        return run(rowwise_kernel, launch, teacher, choices, "grad_teacher")


def _rowwise(*args):
    return _launch(*args)


def _rowwise_inplace(student, *args):
    loss, grad_student, grad_teacher, rows = _launch(student, *args, inplace=True)
    if grad_student.data_ptr() != student.data_ptr():
        student.copy_(grad_student)
    return loss, grad_teacher, rows


for _key in ("CUDA", "CPU") if ops.triton_interpreted() else ("CUDA",):
    torch.library.impl("kdkernels::rowwise_triton", _key, _rowwise)
    torch.library.impl("kdkernels::rowwise_triton_inplace", _key, _rowwise_inplace)
