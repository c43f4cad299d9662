# SPDX-License-Identifier: Apache-2.0
"""What kernels over rows of logits are launched with, how they begin, and what comes of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels.divergences import REDUCTIONS, Choices, Numbers
from kdkernels.ops.rowwise import GRAD_STUDENT
from kdkernels.triton.layout import addressable, common_unit, options, row_layout, tile


def labels_and_valid(labels: Tensor | None, mask: Tensor | None, ignore_index: int):
    """Labels as a kernel takes them, and which rows count (None: all)."""
    if labels is None:
        return None, mask
    if labels.dtype != torch.int64:
        return addressable(labels), mask
    counts = labels != ignore_index
    return labels, counts if mask is None else mask & counts


def normaliser(reduction: int, rows: int, width: int, valid: Tensor | None):
    """What a sum over rows of ``width`` classes is divided by: a number, and a count of rows."""
    name = REDUCTIONS[reduction]
    divisor = width if name == "mean" else 1
    if name not in ("batchmean", "mean"):
        return divisor, None
    return (divisor * max(rows, 1), None) if valid is None else (divisor, valid.sum())


def arguments(
    student: Tensor,  # (..., C), rows as layout.row_layout takes them
    teacher: Tensor,  # one of the teachers, likewise
    labels: Tensor | None,  # (N,) int64 or (..., C) probabilities
    valid: Tensor | None,  # (N,) bool
    row_weight: Tensor | None,  # (N,)
    temperatures: Tensor | None,  # (1,) or (N,)
    teacher_temperatures: Tensor | None,
    numbers: Numbers,
    choices: Choices,
    grads: int,
    dtype: torch.dtype,
) -> dict:
    """What every launch over rows takes but the grid and what it says of its teachers."""
    classes = student.shape[-1]
    rows = student.numel() // classes
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
    divisor, count = normaliser(choices.reduction, rows, choices.width or classes, valid)
    return {
        "student": student,
        "labels": labels if ce else None,
        "valid": valid,
        "row_weight": row_weight,
        "temperatures": temperatures,
        "teacher_temperatures": teacher_temperatures,
        "count": count,
        "loss": student.new_empty(rows, dtype=dtype),
        "grad_student": student.new_empty(student.shape) if grads & GRAD_STUDENT else None,
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
        "CE": ce,
        "PROBABILITIES": probabilities,
        "SAME": same,
        "T2": bool(choices.t2),
        "SCALAR_S": temperatures is not None and temperatures.numel() == 1,
        "SCALAR_T": teacher_temperatures is not None and teacher_temperatures.numel() == 1,
        "HALF_S": student.dtype == torch.float16,
        "HALF_T": teacher.dtype == torch.float16,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "CLASSES": classes,
        "UNIT": unit,
        "ROWS": shape.rows,
        "TILE": shape.classes,
        **options(shape),
    }


def run(kernel, launch: dict, teacher: Tensor, choices: Choices, of_teacher: str):
    """Launch; the operator's outputs, those not asked for of size 0."""
    student, loss = launch["student"], launch["loss"]
    if launch["rows"]:
        kernel[(triton.cdiv(launch["rows"], launch["ROWS"]),)](**launch)
    by_row = REDUCTIONS[choices.reduction] == "none"
    outputs = (launch[name] for name in ("grad_student", of_teacher, "row_grads"))
    empties = (x.new_empty(0) for x in (student, teacher, loss))
    return (
        loss.view(student.shape[:-1]) if by_row else loss.sum(),
        *(x if x is not None else e for x, e in zip(outputs, empties, strict=True)),
    )


@triton.jit
def rows_of_program(rows, valid, ROWS: tl.constexpr):
    """The program's rows, which of them exist, and which of these count."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = row < rows
    live = inside
    if valid is not None:
        live = inside & (tl.load(valid + row, mask=inside, other=0) != 0)
    return row, inside, live


@triton.jit
def numbers_of_rows(
    row, inside, row_weight, temperatures, teacher_temperatures, count, temperature,
    teacher_temperature, normaliser, SCALAR_S: tl.constexpr, SCALAR_T: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Weight, what the reduction multiplies by, and both temperatures."""
    weight = tl.full((1, 1), 1.0, ACC)
    if row_weight is not None:
        weight = tl.load(row_weight + row, mask=inside, other=0)
    tau_s = tl.full((1, 1), temperature, ACC)
    if temperatures is not None:
        tau_s = tl.load(temperatures + (row * 0 if SCALAR_S else row), mask=inside, other=1)
    tau_t = tl.full((1, 1), teacher_temperature, ACC)
    if teacher_temperatures is not None:
        at = row * 0 if SCALAR_T else row
        tau_t = tl.load(teacher_temperatures + at, mask=inside, other=1)
    norm = tl.full((1, 1), normaliser, ACC)
    if count is not None:
        norm = norm / tl.maximum(tl.load(count), 1).to(ACC)
    return weight, norm, tau_s, tau_t
