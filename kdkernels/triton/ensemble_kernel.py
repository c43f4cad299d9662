# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF005  (Triton knows no starred tuples)
"""The kernel of the ensemble family: M teachers, or their mixture, and cross-entropy.

Fuses all softmaxes, the divergences, weights, temperatures, mask and every gradient. A program
takes one row, or several short ones, of the student and of all teachers; of a row that fits a tile
every logit is read from memory once and every gradient written once (fp32: 4 M + 8 bytes a class),
since what is loaded again lies in the cache. A longer row is swept for the student's normaliser,
once more with each teacher for theirs, then for the losses with the student's gradient, and, where
teachers or numbers per row need one, again for those.

Shapes below: rows are (ROWS, 1), tiles (ROWS, TILE). Classes beyond the row's end are read as -inf.
A teacher that is not looked at is read as the student, from which it does not differ.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.divergences import terms
from kdkernels.triton.layout import row_start
from kdkernels.triton.math import log1p, minus_log1p
from kdkernels.triton.rows import numbers_of_rows, rows_of_program
from kdkernels.triton.rowwise.cross_entropy import label_probabilities, store_student
from kdkernels.triton.sweep import (
    HALF_BOOST,
    centred,
    exp_change,
    finite_top,
    load,
    row_max,
    row_sum,
    store,
)


@triton.jit
def _student(s_row, live, inv_s, ACC: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr):
    """The student's maximum, and its sums of exponentials at its temperature and at 1."""
    s = load(s_row, 0, live, -float("inf"), ACC, CLASSES, TILE)
    raw = row_max(s)
    es, e1 = tl.exp((s - finite_top(raw)) * inv_s), tl.exp(s - finite_top(raw))
    for start in range(TILE, CLASSES, TILE):
        s = load(s_row, start, live, -float("inf"), ACC, CLASSES, TILE)
        old = raw
        raw = tl.maximum(raw, row_max(s))
        top = finite_top(raw)
        es = es * tl.exp((old - top) * inv_s) + tl.exp((s - top) * inv_s)
        e1 = e1 * tl.exp(old - top) + tl.exp(s - top)
    return finite_top(raw), row_sum(es), row_sum(e1)


@triton.jit
def _teacher(t_row, start, s, look, live, ACC: tl.constexpr, CLASSES: tl.constexpr,
             TILE: tl.constexpr):  # fmt: skip
    return tl.where(look, load(t_row, start, live & look, -float("inf"), ACC, CLASSES, TILE), s)


@triton.jit
def _measure(
    s_row, t_row, look, live, top_s, sum_s, inv_s, inv_t,
    SAME: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A teacher's maximum and sum of exponentials, and the difference of the log-normalisers."""
    s = load(s_row, 0, live, -float("inf"), ACC, CLASSES, TILE)
    t = _teacher(t_row, 0, s, look, live, ACC, CLASSES, TILE)
    raw = row_max(t)
    top = finite_top(raw)
    us, ut, dz = centred(s, t, top_s, top, inv_s, inv_t, SAME)
    es, et = tl.exp(us), tl.exp(ut)
    change = exp_change(es, et, dz)
    for start in range(TILE, CLASSES, TILE):
        s = load(s_row, start, live, -float("inf"), ACC, CLASSES, TILE)
        t = _teacher(t_row, start, s, look, live, ACC, CLASSES, TILE)
        old = raw
        raw = tl.maximum(raw, row_max(t))
        top = finite_top(raw)
        move = (old - top) * inv_t
        factor = tl.exp(move)
        us, ut, dz = centred(s, t, top_s, top, inv_s, inv_t, SAME)
        tile_s, tile_t = tl.exp(us), tl.exp(ut)
        change = change * factor + es * exp_change(1.0 + 0 * factor, factor, move)
        change += exp_change(tile_s, tile_t, dz)
        es, et = es + tile_s, et * factor + tile_t
    sum_t = row_sum(et)
    ratio = row_sum(change) / sum_s
    close = tl.abs(ratio) < 0.5
    delta = tl.where(close, log1p(tl.where(close, ratio, 0.0)), tl.log(sum_t) - tl.log(sum_s))
    return top, sum_t, delta


@triton.jit
def _mixed(us, log_s, inv_sum_s, q, gap):
    """Of the mixture q: its log-ratio to p_s, bounded, and the divergence's term."""
    lowest: tl.constexpr = 1e-300 if q.dtype == tl.float64 else 1e-30
    p = tl.exp(us) * inv_sum_s
    divisor = tl.where(p > lowest, p, 1.0)
    e = gap / divisor
    near = (p > lowest) & (tl.abs(e) < 0.25)
    e = tl.where(near, e, 0.0)
    log_near = log1p(e)
    on = us != -float("inf")
    log_q = tl.log(tl.where(q > lowest, q, lowest))
    far = tl.where(p > lowest, tl.log(tl.where(q > lowest, q, lowest) / divisor),
                   log_q - (us - log_s))  # fmt: skip
    d = tl.where(near, log_near, tl.where(on, far, 0.0))
    value = tl.where(near, p * (e * log_near - minus_log1p(e, log_near)), q * d - gap)
    return d, tl.where(on | (q == 0), value, float("inf"))


@triton.jit(
    do_not_specialize=[
        "rows", "s_inner", "s_outer_stride", "s_inner_stride", "t_inner", "t_outer_stride",
        "t_inner_stride", "l_inner", "l_outer_stride", "l_inner_stride",
    ]
)  # fmt: skip
def ensemble_kernel(
    student,  # (..., CLASSES)
    teachers,  # M of (..., CLASSES), all with the same strides
    labels,  # (rows,) int64, (..., CLASSES) PROBABILITIES, or None
    valid,  # (rows,) bool or None
    row_weight,  # (rows,) or None
    weights,  # (M, 1), (M, rows), or None: 1 / M
    temperatures,  # (1,), (rows,), or None: the number
    teacher_temperatures,
    count,  # () int64: valid rows, or None: not divided by
    loss,  # (rows,)
    grad_student,  # (rows, CLASSES) or None
    grad_teachers,  # (M, rows, CLASSES) or None
    row_grads,  # (4 + M, rows) or None
    rows,
    s_inner, s_outer_stride, s_inner_stride,
    t_inner, t_outer_stride, t_inner_stride,
    l_inner, l_outer_stride, l_inner_stride,
    # fp64, so that fp64 logits are not held to fp32 parameters.
    temperature: tl.float64, teacher_temperature: tl.float64,
    kd_weight: tl.float64, ce_weight: tl.float64, smoothing: tl.float64, normaliser: tl.float64,
    M: tl.constexpr, MIXTURE: tl.constexpr, ALL: tl.constexpr,  # ALL: look at those without weight
    CE: tl.constexpr, PROBABILITIES: tl.constexpr, SAME: tl.constexpr, T2: tl.constexpr,
    SCALAR_S: tl.constexpr, SCALAR_T: tl.constexpr, SCALAR_W: tl.constexpr,
    HALF_S: tl.constexpr, HALF_T: tl.constexpr,  # fp16: gradients un-normalised, times HALF_BOOST
    ACC: tl.constexpr, CLASSES: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    TEACHER_SIDE: tl.constexpr = grad_teachers is not None or row_grads is not None

    row, inside, live = rows_of_program(rows, valid, ROWS)
    weight, norm, tau_s, tau_t = numbers_of_rows(
        row, inside, row_weight, temperatures, teacher_temperatures, count, temperature,
        teacher_temperature, normaliser, SCALAR_S, SCALAR_T, ACC,
    )  # fmt: skip
    inv_s, inv_t = 1 / tau_s, 1 / tau_t
    out = weight * norm
    scale = tl.full((1, 1), kd_weight, ACC) * (tau_s * tau_s if T2 else 1.0)
    ce = tl.full((1, 1), ce_weight, ACC)
    smooth = tl.full((1, 1), smoothing, ACC)

    s_row = student + row_start(row, s_inner, s_outer_stride, s_inner_stride, UNIT)
    t_offset = row_start(row, t_inner, t_outer_stride, t_inner_stride, UNIT)
    label = row
    l_row = labels
    if CE:
        if PROBABILITIES:
            l_row = labels + row_start(row, l_inner, l_outer_stride, l_inner_stride, UNIT)
        else:
            label = tl.load(labels + row, mask=live, other=0)

    top_s, sum_s, sum_1 = _student(s_row, live, inv_s, ACC, CLASSES, TILE)
    log_s, inv_sum_s, inv_sum_1 = tl.log(sum_s), 1 / sum_s, 1 / sum_1
    sound = (sum_s > 0) & (sum_s < float("inf"))
    ws, looks, tops, logs, invs, deltas, values, centres = (), (), (), (), (), (), (), ()
    for m in tl.static_range(M):
        w = tl.full((ROWS, 1), 1.0 / M, ACC)
        if weights is not None:
            w_at = row * 0 + m if SCALAR_W else row + m * rows.to(tl.int64)
            w = tl.load(weights + w_at, mask=inside, other=0)
        look = inside if ALL else w != 0
        top, total, delta = _measure(
            s_row, teachers[m] + t_offset, look, live, top_s, sum_s, inv_s, inv_t, SAME, ACC,
            CLASSES, TILE,
        )  # fmt: skip
        kept = (total > 0) & (total < float("inf"))
        sound = sound & (kept | (w == 0))
        look = look & (kept | (w != 0))
        total = tl.where(look, total, sum_s)
        ws, looks, tops = ws + (w,), looks + (look,), tops + (tl.where(look, top, top_s),)
        logs, invs = logs + (tl.log(total),), invs + (1 / total,)
        deltas = deltas + (tl.where(look, delta, 0.0),)
        values, centres = (
            values + (tl.zeros((ROWS, 1), ACC),),
            centres + (tl.zeros((ROWS, 1), ACC),),
        )
    target_sum = tl.full((1, 1), 1.0, ACC)
    if CE and PROBABILITIES:
        totals = tl.zeros((ROWS, TILE), ACC)
        for start in range(0, CLASSES, TILE):
            totals += label_probabilities(
                l_row, label, start, live, smooth, True, ACC, CLASSES, TILE
            )  # fmt: skip
        target_sum = row_sum(totals)

    factor = out if not HALF_S else tl.full((1, 1), HALF_BOOST, ACC)
    nothing = row < 0
    mixture_value = tl.zeros((ROWS, 1), ACC)
    products = tl.zeros((ROWS, TILE), ACC)
    slope_s = tl.zeros((ROWS, 1), ACC)
    for start in range(0, CLASSES, TILE):
        s = load(s_row, start, live, -float("inf"), ACC, CLASSES, TILE)
        target = s
        if CE:
            target = label_probabilities(
                l_row, label, start, live, smooth, PROBABILITIES, ACC, CLASSES, TILE
            )  # fmt: skip
            products += tl.where(target != 0, target * (s - top_s), 0.0)
        gap = tl.zeros((ROWS, TILE), ACC)
        q = tl.zeros((ROWS, TILE), ACC)
        for m in tl.static_range(M):
            t = _teacher(teachers[m] + t_offset, start, s, looks[m], live, ACC, CLASSES, TILE)
            us, ut, dz = centred(s, t, top_s, tops[m], inv_s, inv_t, SAME)
            value, gs, gt, _, pt = terms(
                us, ut, dz, deltas[m], log_s, logs[m], inv_sum_s, invs[m], "forward_kl", 0.0, 0.0
            )
            gap -= ws[m] * gs
            if MIXTURE:
                q += ws[m] * pt
            else:
                values = _put(values, m, row_sum(value), M)
                if TEACHER_SIDE:
                    centres = _put(centres, m, row_sum(gt), M)
        if MIXTURE:
            us = (s - top_s) * inv_s
            d, value = _mixed(us, log_s, inv_sum_s, q, gap)
            mixture_value += row_sum(value)
            if TEACHER_SIDE:
                slope_s -= row_sum(tl.where(us == -float("inf"), 0.0, gap * us))
                for m in tl.static_range(M):
                    t = _teacher(
                        teachers[m] + t_offset, start, s, looks[m], live, ACC, CLASSES, TILE
                    )
                    us, ut, dz = centred(s, t, top_s, tops[m], inv_s, inv_t, SAME)
                    _, gs, _, _, pt = terms(
                        us, ut, dz, deltas[m], log_s, logs[m], inv_sum_s, invs[m], "forward_kl",
                        0.0, 0.0,
                    )  # fmt: skip
                    values = _put(values, m, row_sum(-gs * d), M)
                    centres = _put(centres, m, row_sum(pt * d), M)
        if grad_student is not None:
            store_student(
                grad_student + row.to(tl.int64) * CLASSES, start, s, -gap, target,
                scale * inv_s * factor, ce * factor, top_s, inv_sum_1, target_sum, nothing, live,
                inside, True, CE, CLASSES, TILE,
            )  # fmt: skip

    finite = tl.zeros((ROWS, 1), ACC)
    infinite = nothing
    if MIXTURE:
        infinite = mixture_value == float("inf")
        finite = tl.where(infinite, 0.0, mixture_value)
    else:
        for m in tl.static_range(M):
            beyond = values[m] == float("inf")
            infinite = infinite | (beyond & (ws[m] != 0))
            finite += tl.where(beyond, 0.0, ws[m] * values[m])
    kd_value = tl.where(sound, finite, float("nan"))
    finite = scale * kd_value
    too_large = nothing
    if CE:
        cross_entropy = tl.log(sum_1) * target_sum - row_sum(products)
        too_large = cross_entropy == float("inf")
        finite += ce * tl.where(too_large, 0.0, cross_entropy)
    row_loss = finite * weight
    row_loss += tl.where((infinite | too_large) & (weight != 0), float("inf"), 0.0)
    tl.store(loss + row, tl.where(live, row_loss * norm, 0.0), mask=inside)

    if TEACHER_SIDE:
        t_factor = scale * inv_t * (out if not HALF_T else tl.full((1, 1), HALF_BOOST, ACC))
        slope_t = tl.zeros((ROWS, 1), ACC)
        slope_s = tl.where(infinite, 0.0, slope_s)
        for start in range(0, CLASSES, TILE):
            s = load(s_row, start, live, -float("inf"), ACC, CLASSES, TILE)
            d = s
            if MIXTURE:
                gap = tl.zeros((ROWS, TILE), ACC)
                q = tl.zeros((ROWS, TILE), ACC)
                for m in tl.static_range(M):
                    t = _teacher(
                        teachers[m] + t_offset, start, s, looks[m], live, ACC, CLASSES, TILE
                    )
                    us, ut, dz = centred(s, t, top_s, tops[m], inv_s, inv_t, SAME)
                    _, gs, _, _, pt = terms(
                        us, ut, dz, deltas[m], log_s, logs[m], inv_sum_s, invs[m], "forward_kl",
                        0.0, 0.0,
                    )  # fmt: skip
                    gap -= ws[m] * gs
                    q += ws[m] * pt
                d, _ = _mixed((s - top_s) * inv_s, log_s, inv_sum_s, q, gap)
            for m in tl.static_range(M):
                t = _teacher(teachers[m] + t_offset, start, s, looks[m], live, ACC, CLASSES, TILE)
                us, ut, dz = centred(s, t, top_s, tops[m], inv_s, inv_t, SAME)
                value, gs, gt, _, pt = terms(
                    us, ut, dz, deltas[m], log_s, logs[m], inv_sum_s, invs[m], "forward_kl", 0.0,
                    0.0,
                )  # fmt: skip
                moves = ~infinite if MIXTURE else values[m] != float("inf")
                moves = moves & looks[m]
                gv = (pt * d if MIXTURE else gt) - pt * centres[m]
                gv = tl.where(moves, ws[m] * gv, 0.0)
                slope_t += row_sum(tl.where(ut == -float("inf"), 0.0, gv * ut))
                if not MIXTURE:
                    gu = tl.where(moves, ws[m] * gs, 0.0)
                    slope_s += row_sum(tl.where(us == -float("inf"), 0.0, gu * us))
                if grad_teachers is not None:
                    t_grad = grad_teachers + (row + m * rows.to(tl.int64)) * CLASSES
                    grad = tl.where(live & moves, gv * t_factor, 0.0)
                    store(t_grad, start, grad, inside, CLASSES, TILE)
        if row_grads is not None:
            at = row_grads + row
            stride = rows.to(tl.int64)
            to_tau_s = -inv_s * scale * slope_s
            if T2:
                to_tau_s += 2 * inv_s * scale * kd_value
            tl.store(at, tl.where(live, finite * norm, 0.0), mask=inside)
            tl.store(at + stride, tl.where(live, out * to_tau_s, 0.0), mask=inside)
            to_tau_t = -out * inv_t * scale * slope_t
            tl.store(at + 2 * stride, tl.where(live, to_tau_t, 0.0), mask=inside)
            tl.store(at + 3 * stride, tl.where(live, out / HALF_BOOST, 0.0), mask=inside)
            for m in tl.static_range(M):
                moves = ~infinite if MIXTURE else values[m] != float("inf")
                grad = tl.where(live & moves & looks[m], out * scale * values[m], 0.0)
                tl.store(at + (4 + m) * stride, grad, mask=inside)


@triton.jit
def _put(xs, m: tl.constexpr, x, M: tl.constexpr):
    """The tuple with x added to its m-th."""
    out = ()
    for k in tl.static_range(M):
        out = out + (xs[k] + x if k == m else xs[k],)
    return out
