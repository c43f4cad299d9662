# SPDX-License-Identifier: Apache-2.0
"""``elementwise_triton``: losses that are a sum over the elements of two maps.

Fuses the formula, its sum and every gradient: both maps are read once and each gradient written
once (fp32: 12 bytes an element with the student's). A program takes a tile and leaves one number,
so that sums have one order; torch adds these up, a thousandth of the maps.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import ops
from kdkernels.ops.features import compute_dtype, gradient_like
from kdkernels.ops.maps.elementwise import KINDS, Choices, Numbers
from kdkernels.triton import scale  # noqa: F401  (registers scale_rows_)
from kdkernels.triton.layout import options, tile
from kdkernels.triton.maps.formulas import terms


@triton.jit(do_not_specialize=["rows", "p_inner", "p_outer_stride", "p_inner_stride"])
def elementwise_kernel(
    student,  # (rows, LENGTH)
    teacher,
    parameter,  # where row r starts at r // p_inner * p_outer_stride + ..., or None
    loss,  # (programs,)
    grad_student,  # (rows, LENGTH) or None
    grad_teacher,
    row_slope,  # (tiles of a row, rows) or None: to the parameter
    column_slope,  # (blocks of rows, LENGTH) or None
    rows, p_inner, p_outer_stride, p_inner_stride,
    # fp64, so that fp64 maps are not held to fp32 numbers.
    margin: tl.float64, factor: tl.float64,
    KIND: tl.constexpr, ALONG: tl.constexpr,  # ALONG: the parameter differs along a row
    ACC: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    block, part = tl.program_id(0), tl.program_id(1)
    row = (block * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = (part * TILE + tl.arange(0, TILE))[None, :]
    inside = (row < rows) & (column < LENGTH)
    at = row * LENGTH + column
    s = tl.load(student + at, mask=inside, other=0).to(ACC)
    t = tl.load(teacher + at, mask=inside, other=0).to(ACC)
    c = None
    if parameter is not None:
        start = parameter + (row // p_inner) * p_outer_stride + (row % p_inner) * p_inner_stride
        if ALONG:
            c = tl.load(start + column, mask=inside, other=0)
        else:
            c = tl.load(start, mask=row < rows, other=0)
    value, to_s, to_t, slope = terms(s, t, c, tl.full((1, 1), margin, ACC), KIND)
    value = tl.where(inside, value, 0.0)
    tl.store(loss + block * tl.num_programs(1) + part, tl.sum(tl.sum(value, axis=1), axis=0))
    if grad_student is not None:
        tl.store(grad_student + at, to_s * tl.full((1, 1), factor, ACC), mask=inside)
    if grad_teacher is not None:
        tl.store(grad_teacher + at, to_t * tl.full((1, 1), factor, ACC), mask=inside)
    slope = tl.where(inside, slope, 0.0)
    if row_slope is not None:
        slope = tl.sum(slope, axis=1, keep_dims=True)
        tl.store(row_slope + part * rows.to(tl.int64) + row, slope, mask=row < rows)
    elif column_slope is not None:
        slope = tl.sum(slope, axis=0, keep_dims=True)
        to = column_slope + block.to(tl.int64) * LENGTH + column
        tl.store(to, slope, mask=column < LENGTH)


def _rows(maps: Tensor, parameter: Tensor | None) -> tuple[int, tuple[int, int, int], bool]:
    """Length of a row, how its parameter is found, and whether that differs along the row."""
    channels = maps.shape[1]
    pixels = math.prod(maps.shape[2:])
    by_channel = pixels > 1 and maps.is_contiguous()
    length = pixels if by_channel else channels
    if parameter is None:
        flat = math.gcd(maps.numel(), 1024)  # a row may be any part of the map
        return flat if flat >= 128 else length, (1, 0, 0), False
    strides = [s if n > 1 else 0 for n, s in zip(parameter.shape, parameter.stride(), strict=True)]
    of_batch, of_channel, *of_places = strides
    of_place = min((s for s in of_places if s), default=0)
    if by_channel:
        return length, (channels, of_batch, of_channel), of_place != 0
    return length, (pixels, of_batch, of_place), of_channel != 0


def arguments(
    student: Tensor,  # (B, C, ...), dense
    teacher: Tensor,
    parameter: Tensor | None,
    factor: float,
    numbers: Numbers,
    choices: Choices,
    grads: int,
) -> tuple[dict, tuple[int, int]]:
    """Everything a launch takes, outputs included, and its grid."""
    dtype = compute_dtype(student, teacher)
    length, (inner, outer_stride, inner_stride), along = _rows(student, parameter)
    rows = student.numel() // length
    shape = tile(length, dtype)
    grid = triton.cdiv(rows, shape.rows), triton.cdiv(length, shape.classes)

    def sums(*size):
        return student.new_empty(size, dtype=dtype)

    return {
        "student": student,
        "teacher": teacher,
        "parameter": parameter,
        "loss": sums(grid[0] * grid[1]),
        "grad_student": gradient_like(student) if grads & 1 else None,
        "grad_teacher": gradient_like(teacher) if grads & 2 else None,
        "row_slope": sums(grid[1], rows) if grads & 4 and not along else None,
        "column_slope": sums(grid[0], length) if grads & 4 and along else None,
        "rows": rows,
        "p_inner": inner,
        "p_outer_stride": outer_stride,
        "p_inner_stride": inner_stride,
        "margin": numbers.margin,
        "factor": factor,
        "KIND": KINDS[choices.kind],
        "ALONG": along,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "LENGTH": length,
        "ROWS": shape.rows,
        "TILE": shape.classes,
        **options(shape),
    }, grid


def _elementwise(student, teacher, parameter, factor, numbers, choices, grads):
    """Run the kernel; return its outputs, those not asked for of size 0."""
    numbers, choices = Numbers(*numbers), Choices(*choices)
    with torch.cuda.device_of(student):
        launch, grid = arguments(student, teacher, parameter, factor, numbers, choices, grads)
        if launch["rows"]:
            elementwise_kernel[grid](**launch)
    loss = launch["loss"]
    grad_parameter = None
    if grads & 4:
        slope = launch["column_slope"] if launch["ALONG"] else launch["row_slope"]
        by_channel = slope.view(slope.numel() // parameter.numel(), parameter.numel()).sum(0)
        grad_parameter = (by_channel * factor).view_as(parameter)
    gradients = launch["grad_student"], launch["grad_teacher"], grad_parameter
    return loss.sum() * factor, *(student.new_empty(0) if x is None else x for x in gradients)


for _key in ("CUDA", "CPU") if ops.triton_interpreted() else ("CUDA",):
    torch.library.impl("kdkernels::elementwise_triton", _key, _elementwise)
