# SPDX-License-Identifier: Apache-2.0
"""``sparse_triton``: launches the kernel of the sparse family and registers it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import ops
from kdkernels.divergences import (
    KINDS,
    LEAST_TAIL,
    MISSING,
    REDUCTIONS,
    TopKChoices,
    TopKNumbers,
)
from kdkernels.ops.rowwise import GRAD_ROWS, GRAD_STUDENT, GRAD_TEACHER, compute_dtype
from kdkernels.triton import scale  # noqa: F401  (registers scale_rows_)
from kdkernels.triton.layout import SWEEP, Tile, common_unit, options, row_layout
from kdkernels.triton.rows import labels_and_valid, normaliser
from kdkernels.triton.sparse_kernel import sparse_kernel


def _tile(classes: int, accumulator: torch.dtype) -> Tile:
    """A program's part of its row, never several rows: fewer warps for a short one."""
    words = accumulator.itemsize // 4
    width = min(SWEEP.classes, max(256, triton.next_power_of_2(classes * words)))
    return Tile(1, width // words, SWEEP.warps * width // SWEEP.classes)


def arguments(
    student: Tensor,  # (..., C), rows as layout.row_layout takes them
    values: Tensor,  # (..., k), contiguous
    indices: Tensor,  # (N, k) int64, contiguous
    valid: Tensor | None,  # (N,) bool
    row_weight: Tensor | None,  # (N,)
    temperatures: Tensor | None,  # (1,) or (N,)
    teacher_temperatures: Tensor | None,
    logsumexp: Tensor | None,  # (N,)
    numbers: TopKNumbers,
    choices: TopKChoices,
    grads: int,
) -> dict:
    """Everything a launch takes but the grid, outputs included."""
    classes, k = student.shape[-1], values.shape[-1]
    rows = student.numel() // classes
    dtype = compute_dtype(student, values)
    shape = _tile(classes, dtype)
    layout = row_layout(student)
    unit = common_unit(layout)
    if numbers.teacher_temperature == 0:
        numbers = numbers._replace(teacher_temperature=numbers.temperature)
        teacher_temperatures = temperatures
    divisor, count = normaliser(choices.reduction, rows, classes, valid)
    words = triton.cdiv(classes, 32)
    return {
        "student": student,
        "values": values,
        "indices": indices,
        "seen": student.new_zeros((rows, words), dtype=torch.int32),
        "valid": valid,
        "row_weight": row_weight,
        "temperatures": temperatures,
        "teacher_temperatures": teacher_temperatures,
        "logsumexp": logsumexp,
        "count": count,
        "loss": student.new_empty(rows, dtype=dtype),
        "grad_student": student.new_empty(student.shape) if grads & GRAD_STUDENT else None,
        "grad_values": values.new_empty(values.shape) if grads & GRAD_TEACHER else None,
        "row_grads": student.new_empty((5, rows), dtype=dtype) if grads & GRAD_ROWS else None,
        "rows": rows,
        "s_inner": layout.inner,
        "s_outer_stride": layout.outer_stride // unit,
        "s_inner_stride": layout.inner_stride // unit,
        "temperature": numbers.temperature,
        "teacher_temperature": numbers.teacher_temperature,
        "normaliser": 1.0 / divisor,
        "KIND": KINDS[choices.kind],
        "BETA": numbers.beta,
        "MISSING": MISSING[choices.missing],
        "SPREAD": bool(choices.spread),
        "LEAST_TAIL": LEAST_TAIL,
        "T2": bool(choices.t2),
        "SCALAR_S": temperatures is not None and temperatures.numel() == 1,
        "SCALAR_T": teacher_temperatures is not None and teacher_temperatures.numel() == 1,
        "HALF_S": student.dtype == torch.float16,
        "HALF_T": values.dtype == torch.float16,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "CLASSES": classes,
        "UNIT": unit,
        "TILE": shape.classes,
        "WORDS": words,
        "K": k,
        "LANES": triton.next_power_of_2(k + 1),
        **options(shape),
    }


def _sparse(
    student, values, indices, numbers, choices, grads, labels=None, mask=None, row_weight=None,
    temperatures=None, teacher_temperatures=None, logsumexp=None,
):  # fmt: skip
    """Run the kernel; return its outputs, those not asked for of size 0."""
    numbers, choices = TopKNumbers(*numbers), TopKChoices(*choices)
    _, valid = labels_and_valid(labels, mask, choices.ignore_index)
    if row_layout(student) is None:
        student = student.contiguous()
    with torch.cuda.device_of(student):
        launch = arguments(
            student, values.contiguous(), indices, valid, row_weight, temperatures,
            teacher_temperatures, logsumexp, numbers, choices, grads,
        )  # fmt: skip
        if launch["rows"]:
            sparse_kernel[(launch["rows"],)](**launch)
    loss = launch["loss"]
    loss = loss.view(student.shape[:-1]) if REDUCTIONS[choices.reduction] == "none" else loss.sum()
    outputs = (launch[name] for name in ("grad_student", "grad_values", "row_grads"))
    empties = (student.new_empty(0), values.new_empty(0), launch["loss"].new_empty(0))
    return loss, *(x if x is not None else e for x, e in zip(outputs, empties, strict=True))


for _key in ("CUDA", "CPU") if ops.triton_interpreted() else ("CUDA",):
    torch.library.impl("kdkernels::sparse_triton", _key, _sparse)
