# SPDX-License-Identifier: Apache-2.0
"""``rowwise_triton``: launches the kernel of the rowwise family and registers it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import ops
from kdkernels.divergences import KINDS, REDUCTIONS, TARGETS, Choices, Numbers
from kdkernels.ops.rowwise import (
    GRAD_PARTS,
    GRAD_ROWS,
    GRAD_STUDENT,
    GRAD_TEACHER,
    compute_dtype,
)
from kdkernels.triton import scale  # noqa: F401  (registers scale_rows_)
from kdkernels.triton.layout import addressable, common_unit, options, row_layout, tile
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
    rows = student.numel() // classes
    dtype = compute_dtype(student, teacher)
    shape = tile(classes, dtype)
    ce = numbers.ce_weight != 0
    probabilities = ce and labels.dtype != torch.int64
    s_layout, t_layout = row_layout(student), row_layout(teacher)
    l_layout = row_layout(labels) if probabilities else s_layout
    unit = common_unit(s_layout, t_layout, l_layout)
    same = numbers.teacher_temperature == 0
    if same:
        numbers = numbers._replace(teacher_temperature=numbers.temperature)
        teacher_temperatures = temperatures
    reduction = REDUCTIONS[choices.reduction]
    first, last = choices.first, choices.first + (choices.width or classes)
    divisor = last - first if reduction == "mean" else 1
    count = None
    if reduction in ("batchmean", "mean"):
        if valid is None:
            divisor *= max(rows, 1)
        else:
            count = valid.sum()
    # Without its weight the divergence is not looked at, and no target either.
    kd = numbers.kd_weight != 0 or numbers.target_weight != 0
    target = TARGETS[choices.target] if kd else "ordinary"
    narrow = teacher.shape[-1] != classes
    parts = bool(grads & GRAD_PARTS)
    grad_student = None
    if grads & GRAD_STUDENT:
        grad_student = student if inplace else student.new_empty(student.shape)
    return {
        "student": student,
        "teacher": teacher,
        "labels": labels if ce else None,
        "targets": None if target == "ordinary" else labels if targets is None else targets,
        "valid": valid,
        "row_weight": row_weight,
        "temperatures": temperatures,
        "teacher_temperatures": teacher_temperatures,
        "count": count,
        "loss": student.new_empty(rows, dtype=dtype),
        "grad_student": grad_student,
        "grad_teacher": teacher.new_empty(teacher.shape) if grads & GRAD_TEACHER else None,
        "row_grads": (
            student.new_empty((6 if parts else 4, rows), dtype=dtype) if grads & GRAD_ROWS else None
        ),
        "rows": rows,
        **{
            f"{side}_{name}": value
            for side, layout in (("s", s_layout), ("t", t_layout), ("l", l_layout))
            for name, value in (
                ("inner", layout.inner),
                ("outer_stride", layout.outer_stride // unit),
                ("inner_stride", layout.inner_stride // unit),
            )
        },
        "temperature": numbers.temperature,
        "teacher_temperature": numbers.teacher_temperature,
        "kd_weight": numbers.kd_weight,
        "ce_weight": numbers.ce_weight,
        "smoothing": numbers.label_smoothing,
        "target_weight": numbers.target_weight,
        "target_temperature": numbers.target_temperature,
        "normaliser": 1.0 / divisor,
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
        "CE": ce,
        "PROBABILITIES": probabilities,
        # Standardised, the rows have temperatures of their own.
        "SAME": same and not choices.standardize,
        "T2": bool(choices.t2),
        "SCALAR_S": temperatures is not None and temperatures.numel() == 1,
        "SCALAR_T": teacher_temperatures is not None and teacher_temperatures.numel() == 1,
        "PARTS": parts,
        "HALF_S": student.dtype == torch.float16,
        "HALF_T": teacher.dtype == torch.float16,
        "INPLACE": inplace,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "CLASSES": classes,
        "UNIT": unit,
        "ROWS": shape.rows,
        "TILE": shape.classes,
        **options(shape),
    }


def _launch(
    student, teacher, numbers, choices, grads, labels=None, mask=None, row_weight=None,
    temperatures=None, teacher_temperatures=None, targets=None, *, inplace=False,
):  # fmt: skip
    """Run the kernel; return its outputs, those not asked for of size 0."""
    numbers, choices = Numbers(*numbers), Choices(*choices)
    valid = mask
    if labels is not None and labels.dtype == torch.int64:
        counts = labels != choices.ignore_index
        valid = counts if mask is None else mask & counts
    elif labels is not None:
        labels = addressable(labels)
    with torch.cuda.device_of(student):
        launch = arguments(
            addressable(student), addressable(teacher), labels, valid, row_weight,
            temperatures, teacher_temperatures, targets, numbers, choices, grads, inplace,
        )  # fmt: skip
        if launch["rows"]:
            rowwise_kernel[(triton.cdiv(launch["rows"], launch["ROWS"]),)](**launch)
    loss = launch["loss"]
    loss = loss.view(student.shape[:-1]) if REDUCTIONS[choices.reduction] == "none" else loss.sum()
    outputs = (launch[name] for name in ("grad_student", "grad_teacher", "row_grads"))
    empties = (student.new_empty(0), teacher.new_empty(0), launch["loss"].new_empty(0))
    return loss, *(x if x is not None else e for x, e in zip(outputs, empties, strict=True))


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
