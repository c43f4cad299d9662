# SPDX-License-Identifier: Apache-2.0
"""The kernel of the rowwise family: softmax divergences mixed with cross-entropy.

Fuses both softmaxes, the divergence, the cross-entropy, temperatures, weights, mask and every
gradient, which eager does in 10 to 30 kernels. A program takes one row, or several short ones. A
row that fits a tile is held in registers and read once: per class 6 bytes in bf16 and 12 in fp32,
the least there is. A longer one is swept tile by tile: for the maxima and sums, then for the loss
and, where no sum over the row is missing, the gradient (10 bytes in bf16), and otherwise a third
time for the gradients (14 bytes).

Shapes below: rows are (ROWS, 1), tiles (ROWS, TILE). Classes beyond the row's end are read as -inf,
which is also what a class that takes no part looks like.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.ops import rowwise as ops
from kdkernels.triton.divergences import renyi_gradients, renyi_mixture, terms
from kdkernels.triton.layout import row_start
from kdkernels.triton.math import expm1_minus, log1p

# Tiles in flight in a sweep: the next two are copied to shared memory while one is worked on.
STAGES = tl.constexpr(3)
HALF_BOOST = tl.constexpr(ops.HALF_BOOST)


@triton.jit
def _load(ptr, start, live, other, ACC: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr):
    column = start + tl.arange(0, TILE)[None, :]
    return tl.load(ptr + column, mask=live & (column < CLASSES), other=other).to(ACC)


@triton.jit
def _store(ptr, start, value, inside, CLASSES: tl.constexpr, TILE: tl.constexpr):
    column = start + tl.arange(0, TILE)[None, :]
    tl.store(ptr + column, value, mask=inside & (column < CLASSES))


@triton.jit
def _max(x):
    return tl.max(x, axis=1, keep_dims=True)


@triton.jit
def _sum(x):
    return tl.sum(x, axis=1, keep_dims=True)


@triton.jit
def _finite(top):
    """A maximum fit to be subtracted: 0 as long as the row has shown no finite class."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _centred(s, t, top_s, top_t, inv_s, inv_t, SAME: tl.constexpr):
    """Both rows about their maxima, over their temperatures, and the difference."""
    us, ut = (s - top_s) * inv_s, (t - top_t) * inv_t
    # The difference of the logits first: exact where student and teacher are close.
    dz = ((t - s) - (top_t - top_s)) * inv_s if SAME else ut - us
    off = (s == -float("inf")) & (t == -float("inf"))
    return us, ut, tl.where(off, 0.0, dz)


@triton.jit
def _change(exp_s, exp_t, x):
    """``exp_t - exp_s``, without cancellation, of which ``x`` is the log-ratio."""
    near = tl.abs(x) < 0.5
    x = tl.where(near, x, 0.0)
    return tl.where(near, exp_s * (x + expm1_minus(x)), exp_t - exp_s)


@triton.jit
def _target(
    labels, label, start, live, smoothing,
    PROBABILITIES: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Smoothed target probabilities, 0 beyond the row; NaN for a label that is no class."""
    column = start + tl.arange(0, TILE)[None, :]
    if PROBABILITIES:
        target = _load(labels, start, live, 0.0, ACC, CLASSES, TILE)
    else:
        others = tl.where((label >= 0) & (label < CLASSES), 0.0, float("nan"))
        target = tl.where(column == label, 1.0, others)
    target = (1 - smoothing) * target + smoothing / CLASSES
    return tl.where(column < CLASSES, target, 0.0)


@triton.jit
def _store_student(
    ptr, start, s, gu, target, kd_factor, ce_factor, top_s, inv_sum_1, target_sum, drop, live,
    inside, KD: tl.constexpr, CE: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write kd_factor gu (0 where dropped) + ce_factor (p - target); 0 in rows not live."""
    grad = tl.zeros_like(s)
    if KD:
        grad = tl.where(drop, 0.0, gu * kd_factor)
    if CE:
        p = tl.exp(s - top_s) * inv_sum_1
        grad += (p * target_sum - target) * ce_factor
    _store(ptr, start, tl.where(live, grad, 0.0), inside, CLASSES, TILE)


@triton.jit(
    do_not_specialize=[
        "rows", "s_inner", "s_outer_stride", "s_inner_stride", "t_inner", "t_outer_stride",
        "t_inner_stride", "l_inner", "l_outer_stride", "l_inner_stride",
    ]
)  # fmt: skip
def rowwise_kernel(
    student,  # (..., CLASSES)
    teacher,  # (..., CLASSES)
    labels,  # (rows,) int64, (..., CLASSES) PROBABILITIES, or None
    valid,  # (rows,) bool or None
    row_weight,  # (rows,) or None
    temperatures,  # (1,), (rows,), or None: the number
    teacher_temperatures,
    count,  # () int64: valid rows, or None: not divided by
    loss,  # (rows,)
    grad_student,  # (rows, CLASSES) or None; the student itself if INPLACE
    grad_teacher,  # (rows, CLASSES) or None
    row_grads,  # (4, rows) or None
    rows,
    s_inner, s_outer_stride, s_inner_stride,
    t_inner, t_outer_stride, t_inner_stride,
    l_inner, l_outer_stride, l_inner_stride,
    # fp64, so that fp64 logits are not held to fp32 parameters.
    temperature: tl.float64, teacher_temperature: tl.float64,
    kd_weight: tl.float64, ce_weight: tl.float64, smoothing: tl.float64, normaliser: tl.float64,
    KIND: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
    KD: tl.constexpr, CE: tl.constexpr, PROBABILITIES: tl.constexpr, SAME: tl.constexpr,
    T2: tl.constexpr, SCALAR_S: tl.constexpr, SCALAR_T: tl.constexpr,
    HALF_S: tl.constexpr, HALF_T: tl.constexpr,  # fp16: gradients un-normalised, times HALF_BOOST
    INPLACE: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ONE_TILE: tl.constexpr = CLASSES <= TILE
    RENYI: tl.constexpr = KIND == "renyi"
    # Their student gradient is a multiple of p_s - p_t: it survives an infinite loss, and needs
    # no sum over the row.
    SUMLESS: tl.constexpr = KIND == "forward_kl" or KIND == "cross_entropy"
    GRAD_TAU_S: tl.constexpr = KD and row_grads is not None and temperatures is not None
    GRAD_TAU_T: tl.constexpr = KD and row_grads is not None and teacher_temperatures is not None
    TEACHER_SIDE: tl.constexpr = KD and (grad_teacher is not None or GRAD_TAU_T)
    STUDENT_SIDE: tl.constexpr = grad_student is not None or GRAD_TAU_S
    MERGED: tl.constexpr = (not KD or SUMLESS) and not TEACHER_SIDE and not GRAD_TAU_S

    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = row < rows
    live = inside
    if valid is not None:
        live = inside & (tl.load(valid + row, mask=inside, other=0) != 0)
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
    inv_s, inv_t = 1 / tau_s, 1 / tau_t
    norm = tl.full((1, 1), normaliser, ACC)
    if count is not None:
        norm = norm / tl.maximum(tl.load(count), 1).to(ACC)
    out = weight * norm
    kd = tl.full((1, 1), kd_weight, ACC)
    ce = tl.full((1, 1), ce_weight, ACC)
    smooth = tl.full((1, 1), smoothing, ACC)
    scale = tau_s * tau_s if T2 else tl.full((1, 1), 1.0, ACC)

    s_offset = row_start(row, s_inner, s_outer_stride, s_inner_stride, UNIT)
    s_row = student + s_offset
    t_row = teacher + row_start(row, t_inner, t_outer_stride, t_inner_stride, UNIT)
    label = row
    l_row = labels
    if CE:
        if PROBABILITIES:
            l_row = labels + row_start(row, l_inner, l_outer_stride, l_inner_stride, UNIT)
        else:
            label = tl.load(labels + row, mask=live, other=0)

    # Sweep 1: maxima, sums of exponentials, and the sum of their differences. A later tile moves
    # the centres; the difference of the two rows' moves is formed first here too.
    s = _load(s_row, 0, live, -float("inf"), ACC, CLASSES, TILE)
    t = _load(t_row, 0, live, -float("inf"), ACC, CLASSES, TILE) if KD else s
    raw_s, raw_t = _max(s), _max(t)
    top_s, top_t = _finite(raw_s), _finite(raw_t)
    us, ut, dz = _centred(s, t, top_s, top_t, inv_s, inv_t, SAME)
    es, et = tl.exp(us), tl.exp(ut)
    change = _change(es, et, dz)
    e1 = tl.exp(s - top_s)
    for start in tl.range(TILE, CLASSES, TILE, num_stages=STAGES):
        s_tile = _load(s_row, start, live, -float("inf"), ACC, CLASSES, TILE)
        t_tile = _load(t_row, start, live, -float("inf"), ACC, CLASSES, TILE) if KD else s_tile
        old_s, old_t, centre = raw_s, raw_t, raw_t - raw_s
        raw_s, raw_t = tl.maximum(raw_s, _max(s_tile)), tl.maximum(raw_t, _max(t_tile))
        top_s, top_t = _finite(raw_s), _finite(raw_t)
        move_s, move_t = (old_s - top_s) * inv_s, (old_t - top_t) * inv_t
        fs, ft = tl.exp(move_s), tl.exp(move_t)
        move = (centre - (top_t - top_s)) * inv_s if SAME else move_t - move_s
        step = _change(fs, ft, move)
        us, ut, dz = _centred(s_tile, t_tile, top_s, top_t, inv_s, inv_t, SAME)
        tile_s, tile_t = tl.exp(us), tl.exp(ut)
        change = change * ft + es * step + _change(tile_s, tile_t, dz)
        es, et = es * fs + tile_s, et * ft + tile_t
        e1 = e1 * tl.exp(old_s - top_s) + tl.exp(s_tile - top_s)
    sum_s, sum_t, sum_1 = _sum(es), _sum(et), _sum(e1)
    log_s, log_t = tl.log(sum_s), tl.log(sum_t)
    ratio = _sum(change) / sum_s
    delta = tl.where(tl.abs(ratio) < 0.5, log1p(ratio), log_t - log_s)
    inv_sum_s, inv_sum_t, inv_sum_1 = 1 / sum_s, 1 / sum_t, 1 / sum_1
    target_sum = tl.full((1, 1), 1.0, ACC)
    if CE and PROBABILITIES:
        totals = tl.zeros((ROWS, TILE), ACC)
        for start in tl.range(0, CLASSES, TILE, num_stages=STAGES):
            totals += _target(l_row, label, start, live, smooth, True, ACC, CLASSES, TILE)
        target_sum = _sum(totals)

    factor = out if not HALF_S else tl.full((1, 1), HALF_BOOST, ACC)
    kd_factor, ce_factor = kd * scale * inv_s * factor, ce * factor
    s_grad = grad_student
    if grad_student is not None:
        s_grad = grad_student + (s_offset if INPLACE else row.to(tl.int64) * CLASSES)

    # Sweep 2: the loss, and the sums that gradients take; with MERGED the gradient as well.
    values = tl.zeros((ROWS, TILE), ACC)
    own_s = tl.zeros((ROWS, TILE), ACC)
    own_t = tl.zeros((ROWS, TILE), ACC)
    products = tl.zeros((ROWS, TILE), ACC)
    top_mix = tl.full((ROWS, 1), -float("inf"), ACC)
    sum_mix = tl.zeros((ROWS, 1), ACC)
    for start in tl.range(0, CLASSES, TILE, num_stages=STAGES):
        s_tile = s if ONE_TILE else _load(s_row, start, live, -float("inf"), ACC, CLASSES, TILE)
        gs, target = s_tile, s_tile
        if CE:
            target = _target(
                l_row, label, start, live, smooth, PROBABILITIES, ACC, CLASSES, TILE
            )  # fmt: skip
            products += tl.where(target != 0, target * (s_tile - top_s), 0.0)
        if KD:
            t_tile = t if ONE_TILE else _load(t_row, start, live, -float("inf"), ACC, CLASSES, TILE)
            us, ut, dz = _centred(s_tile, t_tile, top_s, top_t, inv_s, inv_t, SAME)
            value, gs, gt, _, _ = terms(
                us, ut, dz, delta, log_s, log_t, inv_sum_s, inv_sum_t, KIND, ALPHA, BETA
            )
            values += value
            if STUDENT_SIDE and not SUMLESS:
                own_s += gs
            if TEACHER_SIDE and not RENYI:
                own_t += gt
            if RENYI:
                mix = renyi_mixture(us - log_s, ut - log_t, ALPHA)
                old_mix = top_mix
                top_mix = tl.maximum(top_mix, _max(mix))
                centre_mix = tl.where(tl.abs(top_mix) == float("inf"), 0.0, top_mix)
                sum_mix = sum_mix * tl.exp(old_mix - centre_mix) + _sum(tl.exp(mix - centre_mix))
        if MERGED and grad_student is not None:
            _store_student(
                s_grad, start, s_tile, gs, target, kd_factor, ce_factor, top_s, inv_sum_1,
                target_sum, row < 0, live, inside, KD, CE, CLASSES, TILE,
            )  # fmt: skip

    # The row's loss. Where a term is infinite, only that remains of it.
    finite = tl.zeros((ROWS, 1), ACC)
    infinite = row < 0
    too_large = row < 0
    value = finite
    log_sum = finite
    if KD:
        value = _sum(values)
        if RENYI:
            excess = ALPHA * (ALPHA - 1) * value
            centre_mix = tl.where(tl.abs(top_mix) == float("inf"), 0.0, top_mix)
            log_sum = tl.where(tl.abs(excess) < 0.5, log1p(excess), centre_mix + tl.log(sum_mix))
            value = log_sum / (ALPHA - 1)
        infinite = value == float("inf")
        value = tl.where(infinite, 0.0, value)
        value = tl.where((sum_s > 0) & (sum_t > 0), value, float("nan"))
        finite += kd * scale * value
    if CE:
        cross_entropy = tl.log(sum_1) * target_sum - _sum(products)
        too_large = cross_entropy == float("inf")
        finite += ce * tl.where(too_large, 0.0, cross_entropy)
    row_loss = finite * weight
    row_loss += tl.where((infinite | too_large) & (weight != 0), float("inf"), 0.0)
    tl.store(loss + row, tl.where(live, row_loss * norm, 0.0), mask=inside)

    # Sweep 3: the gradients of what could not be merged.
    tau_s_sum = tl.zeros((ROWS, 1), ACC)
    tau_t_sum = tl.zeros((ROWS, 1), ACC)
    if (STUDENT_SIDE or TEACHER_SIDE) and not MERGED:
        sum_gs, sum_gt = _sum(own_s), _sum(own_t)
        t_factor = kd * scale * inv_t * (out if not HALF_T else tl.full((1, 1), HALF_BOOST, ACC))
        for start in tl.range(0, CLASSES, TILE, num_stages=STAGES):
            s_tile, t_tile = s, t
            if not ONE_TILE:
                s_tile = _load(s_row, start, live, -float("inf"), ACC, CLASSES, TILE)
                t_tile = _load(t_row, start, live, -float("inf"), ACC, CLASSES, TILE)
            us, ut, dz = _centred(s_tile, t_tile, top_s, top_t, inv_s, inv_t, SAME)
            if RENYI:
                gu, gv = renyi_gradients(us - log_s, ut - log_t, dz - delta, log_sum, ALPHA)
            else:
                _, gs, gt, ps, pt = terms(
                    us, ut, dz, delta, log_s, log_t, inv_sum_s, inv_sum_t, KIND, ALPHA, BETA
                )
                gu, gv = gs if SUMLESS else gs - ps * sum_gs, gt - pt * sum_gt
            if GRAD_TAU_S:
                tau_s_sum += _sum(tl.where(us == -float("inf"), 0.0, gu * us))
            if GRAD_TAU_T:
                tau_t_sum += _sum(tl.where(ut == -float("inf"), 0.0, gv * ut))
            if grad_student is not None:
                target = s_tile
                if CE:
                    target = _target(
                        l_row, label, start, live, smooth, PROBABILITIES, ACC, CLASSES, TILE
                    )
                _store_student(
                    s_grad, start, s_tile, gu, target, kd_factor, ce_factor, top_s, inv_sum_1,
                    target_sum, infinite & (not SUMLESS), live, inside, KD, CE, CLASSES, TILE,
                )  # fmt: skip
            if grad_teacher is not None:
                grad = tl.where(live & ~infinite, gv * t_factor, 0.0)
                t_grad = grad_teacher + row.to(tl.int64) * CLASSES
                _store(t_grad, start, grad, inside, CLASSES, TILE)
    elif grad_teacher is not None:
        for start in tl.range(0, CLASSES, TILE, num_stages=STAGES):  # no divergence, no gradient
            t_grad = grad_teacher + row.to(tl.int64) * CLASSES
            _store(t_grad, start, tl.zeros((ROWS, TILE), ACC), inside, CLASSES, TILE)

    if row_grads is not None:
        to_tau_s = -scale * inv_s * tau_s_sum
        if T2 and GRAD_TAU_S:
            to_tau_s += 2 * tau_s * value
        to_tau_s = tl.where(live & ~infinite, out * kd * to_tau_s, 0.0)
        to_tau_t = tl.where(live & ~infinite, -out * kd * scale * inv_t * tau_t_sum, 0.0)
        at = row_grads + row
        stride = rows.to(tl.int64)
        tl.store(at, tl.where(live, finite * norm, 0.0), mask=inside)
        tl.store(at + stride, to_tau_s, mask=inside)
        tl.store(at + 2 * stride, to_tau_t, mask=inside)
        tl.store(at + 3 * stride, tl.where(live, out / HALF_BOOST, 0.0), mask=inside)
