# SPDX-License-Identifier: Apache-2.0
"""MLKD's kernels, around its matrix products.

Both softmaxes of a row at every temperature, their difference without cancellation and the
divergence; and from the relations' gradient to that of the logits. Per temperature 8 bytes an
element written, then 12 read, twice.

Shapes below: rows are (ROWS, 1), tiles (ROWS, TILE). Classes beyond the row's end are read as -inf.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.layout import row_start
from kdkernels.triton.math import expm1_minus, log1p
from kdkernels.triton.rows import rows_of_program
from kdkernels.triton.sweep import (
    centred,
    exp_change,
    finite_top,
    half_scale,
    load,
    row_max,
    row_sum,
    store,
)


@triton.jit(
    do_not_specialize=["rows", "s_inner", "s_outer", "s_stride", "t_inner", "t_outer", "t_stride"]
)
def mlkd_softmax_kernel(
    student, teacher,  # (..., CLASSES)
    valid,  # (rows,) bool or None
    soft,  # (2, rows, CLASSES) of one temperature: p_s, p_s - p_t
    kl,  # (rows,): sum of T^2 KL(p_t || p_s), begun or added to
    rows, s_inner, s_outer, s_stride, t_inner, t_outer, t_stride,
    temperature: tl.float64,
    BEGIN: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, inside, live = rows_of_program(rows, valid, ROWS)
    tau = tl.full((1, 1), temperature, ACC)
    inv = 1 / tau
    s_row = student + row_start(row, s_inner, s_outer, s_stride, UNIT)
    t_row = teacher + row_start(row, t_inner, t_outer, t_stride, UNIT)
    top_s = tl.full((ROWS, 1), -float("inf"), ACC)
    top_t = tl.full((ROWS, 1), -float("inf"), ACC)
    for start in tl.range(0, CLASSES, TILE):
        top_s = tl.maximum(
            top_s, row_max(load(s_row, start, live, -float("inf"), ACC, CLASSES, TILE))
        )
        top_t = tl.maximum(
            top_t, row_max(load(t_row, start, live, -float("inf"), ACC, CLASSES, TILE))
        )
    top_s, top_t = finite_top(top_s), finite_top(top_t)
    sum_s, sum_t = tl.zeros((ROWS, 1), ACC), tl.zeros((ROWS, 1), ACC)
    excess = tl.zeros((ROWS, 1), ACC)
    for start in tl.range(0, CLASSES, TILE):
        s = load(s_row, start, live, -float("inf"), ACC, CLASSES, TILE)
        t = load(t_row, start, live, -float("inf"), ACC, CLASSES, TILE)
        us, ut, d = centred(s, t, top_s, top_t, inv, inv, True)
        exp_s, exp_t = tl.exp(us), tl.exp(ut)
        sum_s, sum_t = sum_s + row_sum(exp_s), sum_t + row_sum(exp_t)
        excess += row_sum(exp_change(exp_s, exp_t, d))
    ratio = excess / sum_s
    close = tl.abs(ratio) < 0.5
    delta = tl.where(close, log1p(tl.where(close, ratio, 0.0)), tl.log(sum_t / sum_s))
    inv_s, inv_t = 1 / sum_s, 1 / tl.where(close, sum_s + excess, sum_t)
    total = tl.zeros((ROWS, 1), ACC)
    to_p = soft + row.to(tl.int64) * CLASSES
    to_d = to_p + rows.to(tl.int64) * CLASSES
    for start in tl.range(0, CLASSES, TILE):
        s = load(s_row, start, live, -float("inf"), ACC, CLASSES, TILE)
        t = load(t_row, start, live, -float("inf"), ACC, CLASSES, TILE)
        us, ut, d = centred(s, t, top_s, top_t, inv, inv, True)
        off = (s == -float("inf")) & (t == -float("inf"))
        d = tl.where(off, 0.0, d - delta)
        p, q = tl.exp(us) * inv_s, tl.exp(ut) * inv_t
        near = tl.abs(d) < 0.5
        small = tl.where(near, d, 0.0)
        bend = expm1_minus(small)
        gap = tl.where(near, p * (small + bend), q - p)
        value = tl.where(
            near, p * ((small + bend) * small - bend), tl.where(q == 0, 0.0, q * d) - gap
        )
        total += row_sum(value)
        store(to_p, start, tl.where(live, p, 0.0), inside, CLASSES, TILE)
        store(to_d, start, tl.where(live, -gap, 0.0), inside, CLASSES, TILE)
    total = tl.where(total < 0, 0.0, total) * tau * tau
    if not BEGIN:
        total += tl.load(kl + row, mask=inside, other=0.0)
    tl.store(kl + row, tl.where(live, total, 0.0), mask=inside)


@triton.jit
def _mlkd_terms(
    soft, relations, row, start, live, size, J: tl.constexpr, OF_TEACHER: tl.constexpr,
    ACC: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """This side's p, d loss / d p up to what is the same for all classes, and p_s - p_t.

    The teacher's gradient of the KL is the rowwise family's: mlkd_loss in kdkernels/functional.
    """
    at = row.to(tl.int64) * CLASSES
    p = load(soft + 2 * J * size + at, start, live, 0.0, ACC, CLASSES, TILE)
    d = load(soft + (2 * J + 1) * size + at, start, live, 0.0, ACC, CLASSES, TILE)
    g = tl.zeros_like(p)
    if relations is not None:
        g = load(relations + J * size + at, start, live, 0.0, ACC, CLASSES, TILE)
    if OF_TEACHER:
        p -= d
    return p, g, d


@triton.jit(do_not_specialize=["rows"])
def mlkd_dots_kernel(
    soft,  # (T, 2, rows, CLASSES)
    relations,  # (T, rows, CLASSES) or None
    row_weight,  # (rows,): of T^2 KL; unused for the teacher
    valid,
    dots,  # (T, rows): sum p g
    row_factor,  # (rows,) or None: what an fp16 gradient lacks
    rows,
    TEMPERATURES: tl.constexpr, OF_TEACHER: tl.constexpr, ACC: tl.constexpr,
    CLASSES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, inside, live = rows_of_program(rows, valid, ROWS)
    size = rows.to(tl.int64) * CLASSES
    bound = tl.zeros((ROWS, 1), ACC)
    if not OF_TEACHER:
        weight = tl.load(row_weight + row, mask=live, other=0.0)
    for j in tl.static_range(len(TEMPERATURES)):
        dot, largest = tl.zeros((ROWS, 1), ACC), tl.zeros((ROWS, 1), ACC)
        for start in tl.range(0, CLASSES, TILE):
            p, g, _ = _mlkd_terms(
                soft, relations, row, start, live, size, j, OF_TEACHER, ACC, CLASSES, TILE
            )
            dot += row_sum(p * g)
            largest = tl.maximum(largest, row_max(tl.abs(g)))
        tl.store(dots + j * rows.to(tl.int64) + row, dot, mask=inside)
        bound += 2 * largest / TEMPERATURES[j]
        if not OF_TEACHER:
            bound += tl.abs(weight) * TEMPERATURES[j]
    if row_factor is not None:
        tl.store(row_factor + row, tl.where(live, 1 / half_scale(bound), 0.0), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def mlkd_gradient_kernel(
    soft, relations, row_weight, valid, dots, row_factor,  # as above
    grad,  # (rows, CLASSES)
    rows,
    TEMPERATURES: tl.constexpr, OF_TEACHER: tl.constexpr, ACC: tl.constexpr,
    CLASSES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, inside, live = rows_of_program(rows, valid, ROWS)
    size = rows.to(tl.int64) * CLASSES
    if not OF_TEACHER:
        weight = tl.load(row_weight + row, mask=live, other=0.0)
    scale = tl.full((ROWS, 1), 1.0, ACC)
    if row_factor is not None:
        scale /= tl.load(row_factor + row, mask=live, other=1.0)
    for start in tl.range(0, CLASSES, TILE):
        dz = tl.zeros((ROWS, TILE), ACC)
        for j in tl.static_range(len(TEMPERATURES)):
            dot = tl.load(dots + j * rows.to(tl.int64) + row, mask=live, other=0.0)
            p, g, d = _mlkd_terms(
                soft, relations, row, start, live, size, j, OF_TEACHER, ACC, CLASSES, TILE
            )
            dz += p * (g - dot) * (1 / TEMPERATURES[j])
            if not OF_TEACHER:
                dz += d * (weight * TEMPERATURES[j])
        dz = tl.where(live, dz * scale, 0.0)
        store(grad + row.to(tl.int64) * CLASSES, start, dz, inside, CLASSES, TILE)
