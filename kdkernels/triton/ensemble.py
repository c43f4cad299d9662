# SPDX-License-Identifier: Apache-2.0
"""``ensemble_triton``: launches the kernel of the ensemble family and registers it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import ops
from kdkernels.divergences import REDUCTIONS, Choices, Numbers
from kdkernels.ops.ensemble import GRAD_WEIGHTS, compute_dtype
from kdkernels.ops.rowwise import GRAD_ROWS, GRAD_STUDENT, GRAD_TEACHER
from kdkernels.triton import scale  # noqa: F401  (registers scale_rows_)
from kdkernels.triton.ensemble_kernel import ensemble_kernel
from kdkernels.triton.layout import addressable, common_unit, options, row_layout, tile


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
    classes = student.shape[-1]
    rows, count = student.numel() // classes, len(teachers)
    dtype = compute_dtype(student, teachers)
    shape = tile(classes, dtype)
    ce = numbers.ce_weight != 0
    probabilities = ce and labels.dtype != torch.int64
    s_layout, t_layout = row_layout(student), row_layout(teachers[0])
    l_layout = row_layout(labels) if probabilities else s_layout
    unit = common_unit(s_layout, t_layout, l_layout)
    same = numbers.teacher_temperature == 0
    if same:
        numbers = numbers._replace(teacher_temperature=numbers.temperature)
        teacher_temperatures = temperatures
    reduction = REDUCTIONS[choices.reduction]
    divisor = classes if reduction == "mean" else 1
    valid_rows = None
    if reduction in ("batchmean", "mean"):
        if valid is None:
            divisor *= max(rows, 1)
        else:
            valid_rows = valid.sum()
    return {
        "student": student,
        "teachers": tuple(teachers),
        "labels": labels if ce else None,
        "valid": valid,
        "row_weight": row_weight,
        "weights": weights,
        "temperatures": temperatures,
        "teacher_temperatures": teacher_temperatures,
        "count": valid_rows,
        "loss": student.new_empty(rows, dtype=dtype),
        "grad_student": student.new_empty(student.shape) if grads & GRAD_STUDENT else None,
        "grad_teachers": teachers[0].new_empty((count, *student.shape))
        if grads & GRAD_TEACHER
        else None,
        "row_grads": student.new_empty((4 + count, rows), dtype=dtype)
        if grads & GRAD_ROWS
        else None,
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
        "normaliser": 1.0 / divisor,
        "M": count,
        "MIXTURE": mixture,
        "ALL": bool(grads & GRAD_WEIGHTS),
        "CE": ce,
        "PROBABILITIES": probabilities,
        "SAME": same,
        "T2": bool(choices.t2),
        "SCALAR_S": temperatures is not None and temperatures.numel() == 1,
        "SCALAR_T": teacher_temperatures is not None and teacher_temperatures.numel() == 1,
        "SCALAR_W": weights is not None and weights.shape[1] == 1,
        "HALF_S": student.dtype == torch.float16,
        "HALF_T": teachers[0].dtype == torch.float16,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "CLASSES": classes,
        "UNIT": unit,
        "ROWS": shape.rows,
        "TILE": shape.classes,
        **options(shape),
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
    valid = mask
    if labels is not None and labels.dtype == torch.int64:
        counts = labels != choices.ignore_index
        valid = counts if mask is None else mask & counts
    elif labels is not None:
        labels = addressable(labels)
    with torch.cuda.device_of(student):
        launch = arguments(
            addressable(student), _alike(teachers), labels, valid, row_weight, temperatures,
            teacher_temperatures, weights, mixture, numbers, choices, grads,
        )  # fmt: skip
        if launch["rows"]:
            ensemble_kernel[(triton.cdiv(launch["rows"], launch["ROWS"]),)](**launch)
    loss = launch["loss"]
    loss = loss.view(student.shape[:-1]) if REDUCTIONS[choices.reduction] == "none" else loss.sum()
    outputs = (launch[name] for name in ("grad_student", "grad_teachers", "row_grads"))
    empties = (student.new_empty(0), teachers[0].new_empty(0), launch["loss"].new_empty(0))
    return loss, *(x if x is not None else e for x, e in zip(outputs, empties, strict=True))


for _key in ("CUDA", "CPU") if ops.triton_interpreted() else ("CUDA",):
    torch.library.impl("kdkernels::ensemble_triton", _key, _ensemble)
