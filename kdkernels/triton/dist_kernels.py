# SPDX-License-Identifier: Apache-2.0
"""DIST's kernels.

Three: rows (softmax statistics and correlations), columns (two passes over the batch, which the
cache holds, for means and centred moments) and gradients; eager takes 80. The logits are read from
memory three times and a gradient written once: 28 bytes an element in fp32. Compiled without fused
multiply-add: probabilities must be rounded before their rounded mean is taken off them, or constant
columns would not come out as 0.

Shapes below: rows are (ROWS, 1), tiles (ROWS, TILE). Classes beyond the row's end are read as -inf.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.layout import row_start
from kdkernels.triton.rows import rows_of_program
from kdkernels.triton.sweep import finite_top, half_scale, load, row_max, row_sum, store

EPS = tl.constexpr(1e-8)


@triton.jit
def _pearson(ss, tt, st, CLAMP: tl.constexpr):
    """Correlation of centred sums, and its derivatives: x t - y_s s to s, likewise to t."""
    s, t = tl.sqrt(ss), tl.sqrt(tt)
    if CLAMP:
        # Comparisons, which let NaN through.
        low_s, low_t = tl.where(s < EPS, EPS, s), tl.where(t < EPS, EPS, t)
        product = low_s * low_t
        y_s = tl.where(s < EPS, 0.0, st / product / product * low_t / s)
        y_t = tl.where(t < EPS, 0.0, st / product / product * low_s / t)
    else:
        product = s * t + EPS
        y_s = tl.where(s == 0, 0.0, st / product / product * t / s)
        y_t = tl.where(t == 0, 0.0, st / product / product * s / t)
    return st / product, 1 / product, y_s, y_t


@triton.jit
def _temperature(temperatures, temperature, ACC: tl.constexpr):
    tau = tl.full((1, 1), temperature, ACC)
    if temperatures is not None:
        tau = tl.zeros((1, 1), ACC) + tl.load(temperatures).to(ACC)
    return tau


@triton.jit
def _probabilities(
    ptr, start, live, top, inv_sum, inv_tau,
    ACC: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    z = load(ptr, start, live, -float("inf"), ACC, CLASSES, TILE)
    return tl.exp((z - top) * inv_tau) * inv_sum


@triton.jit(
    do_not_specialize=["rows", "s_inner", "s_outer", "s_stride", "t_inner", "t_outer", "t_stride"]
)
def dist_rows_kernel(
    student, teacher,  # (..., CLASSES)
    valid,  # (rows,) bool or None
    count,  # () rows that take part, or None: all
    temperatures,  # (1,) or None
    stats,  # (9, rows): maxima, 1 / sums, means, x, y_s, y_t
    loss,  # (rows,)
    rows, s_inner, s_outer, s_stride, t_inner, t_outer, t_stride,
    temperature: tl.float64, weight: tl.float64,
    T2: tl.constexpr, CLAMP: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, inside, live = rows_of_program(rows, valid, ROWS)
    tau = _temperature(temperatures, temperature, ACC)
    scale = tl.full((1, 1), weight, ACC)
    if T2:
        scale *= tau * tau
    if count is not None:
        scale /= tl.load(count).to(ACC)
    inv = 1 / tau
    s_row = student + row_start(row, s_inner, s_outer, s_stride, UNIT)
    t_row = teacher + row_start(row, t_inner, t_outer, t_stride, UNIT)
    top_s = tl.full((ROWS, 1), -float("inf"), ACC)
    top_t = tl.full((ROWS, 1), -float("inf"), ACC)
    sum_s, sum_t = tl.zeros((ROWS, 1), ACC), tl.zeros((ROWS, 1), ACC)
    for start in tl.range(0, CLASSES, TILE):
        s = load(s_row, start, live, -float("inf"), ACC, CLASSES, TILE)
        t = load(t_row, start, live, -float("inf"), ACC, CLASSES, TILE)
        new_s, new_t = tl.maximum(top_s, row_max(s)), tl.maximum(top_t, row_max(t))
        sum_s *= tl.exp((top_s - finite_top(new_s)) * inv)
        sum_t *= tl.exp((top_t - finite_top(new_t)) * inv)
        top_s, top_t = new_s, new_t
        sum_s += row_sum(tl.exp((s - finite_top(top_s)) * inv))
        sum_t += row_sum(tl.exp((t - finite_top(top_t)) * inv))
    top_s, top_t = finite_top(top_s), finite_top(top_t)
    mean_s, mean_t = sum_s / CLASSES, sum_t / CLASSES
    ss, tt, st = tl.zeros((ROWS, 1), ACC), tl.zeros((ROWS, 1), ACC), tl.zeros((ROWS, 1), ACC)
    for start in tl.range(0, CLASSES, TILE):
        within = start + tl.arange(0, TILE)[None, :] < CLASSES
        s = _probabilities(s_row, start, live, top_s, 1.0, inv, ACC, CLASSES, TILE) - mean_s
        t = _probabilities(t_row, start, live, top_t, 1.0, inv, ACC, CLASSES, TILE) - mean_t
        s, t = tl.where(within, s, 0.0), tl.where(within, t, 0.0)
        ss, tt, st = ss + row_sum(s * s), tt + row_sum(t * t), st + row_sum(s * t)
    inv_s, inv_t = 1 / sum_s, 1 / sum_t
    correlation, x, y_s, y_t = _pearson(
        ss * inv_s * inv_s, tt * inv_t * inv_t, st * inv_s * inv_t, CLAMP
    )
    at = stats + row
    stride = rows.to(tl.int64)
    tl.store(at, top_s, mask=inside)
    tl.store(at + stride, top_t, mask=inside)
    tl.store(at + 2 * stride, inv_s, mask=inside)
    tl.store(at + 3 * stride, inv_t, mask=inside)
    tl.store(at + 4 * stride, mean_s * inv_s, mask=inside)
    tl.store(at + 5 * stride, mean_t * inv_t, mask=inside)
    tl.store(at + 6 * stride, -scale * x, mask=inside)
    tl.store(at + 7 * stride, -scale * y_s, mask=inside)
    tl.store(at + 8 * stride, -scale * y_t, mask=inside)
    tl.store(loss + row, tl.where(live, scale * (1 - correlation), 0.0), mask=inside)


@triton.jit(
    do_not_specialize=["rows", "s_inner", "s_outer", "s_stride", "t_inner", "t_outer", "t_stride"]
)
def dist_columns_kernel(
    student, teacher, valid, count, temperatures, stats,  # as above
    pivot,  # () index of a row that takes part, or None: 0
    columns,  # (5, CLASSES): means, x, y_s, y_t
    loss,  # (CLASSES,)
    rows, s_inner, s_outer, s_stride, t_inner, t_outer, t_stride,
    temperature: tl.float64, weight: tl.float64,
    T2: tl.constexpr, CLAMP: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * TILE
    column = start + tl.arange(0, TILE)
    within = column < CLASSES
    tau = _temperature(temperatures, temperature, ACC)
    inv = 1 / tau
    stride = rows.to(tl.int64)
    number = rows.to(ACC)
    if count is not None:
        number = tl.load(count).to(ACC)
    first = tl.zeros((1, 1), tl.int64)
    if pivot is not None:
        first += tl.load(pivot)
    some = first < rows
    pivot_s = _probabilities(
        student + row_start(first, s_inner, s_outer, s_stride, UNIT), start, some,
        tl.load(stats + first), tl.load(stats + 2 * stride + first), inv, ACC, CLASSES, TILE,
    )  # fmt: skip
    pivot_t = _probabilities(
        teacher + row_start(first, t_inner, t_outer, t_stride, UNIT), start, some,
        tl.load(stats + stride + first), tl.load(stats + 3 * stride + first), inv, ACC, CLASSES,
        TILE,
    )  # fmt: skip
    mean_s, mean_t = tl.zeros((1, TILE), ACC), tl.zeros((1, TILE), ACC)
    ss, tt, st = tl.zeros((1, TILE), ACC), tl.zeros((1, TILE), ACC), tl.zeros((1, TILE), ACC)
    for about_mean in tl.static_range(2):
        for base in tl.range(0, rows, ROWS):
            row = (base + tl.arange(0, ROWS))[:, None]
            live = row < rows
            if valid is not None:
                live = live & tl.load(valid + row, mask=live, other=0).to(tl.int1)
            at = stats + row
            s = _probabilities(
                student + row_start(row, s_inner, s_outer, s_stride, UNIT), start, live,
                tl.load(at, mask=live, other=0.0),
                tl.load(at + 2 * stride, mask=live, other=0.0), inv, ACC, CLASSES, TILE,
            )  # fmt: skip
            t = _probabilities(
                teacher + row_start(row, t_inner, t_outer, t_stride, UNIT), start, live,
                tl.load(at + stride, mask=live, other=0.0),
                tl.load(at + 3 * stride, mask=live, other=0.0), inv, ACC, CLASSES, TILE,
            )  # fmt: skip
            if about_mean:
                s = tl.where(live, (s - pivot_s) - mean_s, 0.0)
                t = tl.where(live, (t - pivot_t) - mean_t, 0.0)
                ss += tl.sum(s * s, axis=0, keep_dims=True)
                tt += tl.sum(t * t, axis=0, keep_dims=True)
                st += tl.sum(s * t, axis=0, keep_dims=True)
            else:
                mean_s += tl.sum(tl.where(live, s - pivot_s, 0.0), axis=0, keep_dims=True)
                mean_t += tl.sum(tl.where(live, t - pivot_t, 0.0), axis=0, keep_dims=True)
        if not about_mean:
            mean_s, mean_t = mean_s / number, mean_t / number
    correlation, x, y_s, y_t = _pearson(ss, tt, st, CLAMP)
    scale = tl.full((1, 1), weight, ACC)
    if T2:
        scale *= tau * tau
    at, within = columns + column[None, :], within[None, :]
    tl.store(at, pivot_s + mean_s, mask=within)
    tl.store(at + CLASSES, pivot_t + mean_t, mask=within)
    tl.store(at + 2 * CLASSES, -scale * x, mask=within)
    tl.store(at + 3 * CLASSES, -scale * y_s, mask=within)
    tl.store(at + 4 * CLASSES, -scale * y_t, mask=within)
    tl.store(loss + column[None, :], scale * (1 - correlation), mask=within)


@triton.jit
def _dist_gradient(own, other, start, mean_own, mean_other, x, y, columns, OWN: tl.constexpr,
                   CLASSES: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """d loss / d p of one side, OWN 0 for the student's and 1 for the teacher's."""
    column = start + tl.arange(0, TILE)[None, :]
    within = column < CLASSES
    at = columns + column
    centre_own = tl.load(at + OWN * CLASSES, mask=within, other=0.0)
    centre_other = tl.load(at + (1 - OWN) * CLASSES, mask=within, other=0.0)
    of_x = tl.load(at + 2 * CLASSES, mask=within, other=0.0)
    of_y = tl.load(at + (3 + OWN) * CLASSES, mask=within, other=0.0)
    g = (other - mean_other) * x - (own - mean_own) * y
    g += (other - centre_other) * of_x - (own - centre_own) * of_y
    return tl.where(within, g, 0.0)


@triton.jit(
    do_not_specialize=["rows", "s_inner", "s_outer", "s_stride", "t_inner", "t_outer", "t_stride"]
)
def dist_gradient_kernel(
    student, teacher, valid, temperatures, stats, columns,  # as above
    grad,  # (rows, CLASSES) of one side, or None
    row_factor,  # (rows,) or None: what an fp16 gradient lacks
    slope,  # (rows,) or None: sum dz z
    rows, s_inner, s_outer, s_stride, t_inner, t_outer, t_stride,
    temperature: tl.float64,
    SIDE: tl.constexpr, HALF: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row, inside, live = rows_of_program(rows, valid, ROWS)
    tau = _temperature(temperatures, temperature, ACC)
    inv = 1 / tau
    stride = rows.to(tl.int64)
    at = stats + row
    top_s = tl.load(at, mask=live, other=0.0)
    top_t = tl.load(at + stride, mask=live, other=0.0)
    inv_s = tl.load(at + 2 * stride, mask=live, other=0.0)
    inv_t = tl.load(at + 3 * stride, mask=live, other=0.0)
    mean_own = tl.load(at + (4 + SIDE) * stride, mask=live, other=0.0)
    mean_other = tl.load(at + (5 - SIDE) * stride, mask=live, other=0.0)
    x = tl.load(at + 6 * stride, mask=live, other=0.0)
    y = tl.load(at + (7 + SIDE) * stride, mask=live, other=0.0)
    s_row = student + row_start(row, s_inner, s_outer, s_stride, UNIT)
    t_row = teacher + row_start(row, t_inner, t_outer, t_stride, UNIT)
    dot, largest = tl.zeros((ROWS, 1), ACC), tl.zeros((ROWS, 1), ACC)
    for start in tl.range(0, CLASSES, TILE):
        s = _probabilities(s_row, start, live, top_s, inv_s, inv, ACC, CLASSES, TILE)
        t = _probabilities(t_row, start, live, top_t, inv_t, inv, ACC, CLASSES, TILE)
        own, other = (t, s) if SIDE else (s, t)
        g = _dist_gradient(
            own, other, start, mean_own, mean_other, x, y, columns, SIDE, CLASSES, TILE
        )
        dot += row_sum(own * g)
        largest = tl.maximum(largest, row_max(tl.abs(g)))
    scale = tl.full((ROWS, 1), 1.0, ACC)
    if HALF:
        scale = half_scale(2 * largest * inv)
    slopes = tl.zeros((ROWS, 1), ACC)
    for start in tl.range(0, CLASSES, TILE):
        s = _probabilities(s_row, start, live, top_s, inv_s, inv, ACC, CLASSES, TILE)
        t = _probabilities(t_row, start, live, top_t, inv_t, inv, ACC, CLASSES, TILE)
        own, other = (t, s) if SIDE else (s, t)
        g = _dist_gradient(
            own, other, start, mean_own, mean_other, x, y, columns, SIDE, CLASSES, TILE
        )
        dz = tl.where(live, own * (g - dot) * inv, 0.0)
        if slope is not None:
            z = load(t_row if SIDE else s_row, start, live, 0.0, ACC, CLASSES, TILE)
            z = tl.where(z == -float("inf"), 0.0, z - (top_t if SIDE else top_s))
            slopes += row_sum(dz * z)
        if grad is not None:
            store(grad + row.to(tl.int64) * CLASSES, start, dz * scale, inside, CLASSES, TILE)
    if row_factor is not None:
        tl.store(row_factor + row, tl.where(live, 1 / scale, 0.0), mask=inside)
    if slope is not None:
        tl.store(slope + row, slopes, mask=inside)
