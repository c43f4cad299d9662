# SPDX-License-Identifier: Apache-2.0
"""The kernel of the rowwise family: softmax divergences mixed with cross-entropy.

Fuses both softmaxes, the divergence, the cross-entropy, temperatures, weights, mask, what a loss
does with its target class and every gradient, which eager does in 10 to 30 kernels. A program takes
one row, or several short ones. A row that fits a tile is held in registers and read once: per class
6 bytes in bf16 and 12 in fp32, the least there is. A longer one is swept tile by tile: for the
maxima and sums, then for the loss and, where no sum over the row is missing, the gradient (10 bytes
in bf16), and otherwise a third time for the gradients (14 bytes). Standardised rows are swept once
before that, and once more for the slopes that go through their deviations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.divergences import gradients, renyi_grow, renyi_log_sum, terms
from kdkernels.triton.layout import row_start
from kdkernels.triton.math import log1p
from kdkernels.triton.rows import numbers_of_rows, rows_of_program
from kdkernels.triton.rowwise.cross_entropy import (
    label_probabilities,
    store_student,
    with_target,
)
from kdkernels.triton.rowwise.row import (
    describe,
    from_mean,
    half_boost,
    load_both,
    measure,
    visible,
)
from kdkernels.triton.rowwise.target import account, distil, read_target, teacher_moved, with_shift
from kdkernels.triton.sweep import HALF_BOOST, STAGES, centred, row_sum, store


@triton.jit(
    do_not_specialize=[
        "rows", "s_inner", "s_outer_stride", "s_inner_stride", "t_inner", "t_outer_stride",
        "t_inner_stride", "l_inner", "l_outer_stride", "l_inner_stride",
    ]
)  # fmt: skip
def rowwise_kernel(
    student,  # (..., CLASSES)
    teacher,  # (..., CLASSES), or the divergence's classes
    labels,  # (rows,) int64, (..., CLASSES) PROBABILITIES, or None
    targets,  # (rows,) int64 or None
    valid,  # (rows,) bool or None
    row_weight,  # (rows,) or None
    temperatures,  # (1,), (rows,), or None: the number
    teacher_temperatures,
    count,  # () int64: valid rows, or None: not divided by
    loss,  # (rows,)
    grad_student,  # (rows, CLASSES) or None; the student itself if INPLACE
    grad_teacher,  # (rows, the teacher's classes) or None
    row_grads,  # (4, rows), with PARTS (6, rows), or None
    rows,
    s_inner, s_outer_stride, s_inner_stride,
    t_inner, t_outer_stride, t_inner_stride,
    l_inner, l_outer_stride, l_inner_stride,
    # fp64, so that fp64 logits are not held to fp32 parameters.
    temperature: tl.float64, teacher_temperature: tl.float64,
    kd_weight: tl.float64, ce_weight: tl.float64, smoothing: tl.float64,
    target_weight: tl.float64, target_temperature: tl.float64, normaliser: tl.float64,
    KIND: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, TARGET: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr,  # the divergence's classes
    T_FIRST: tl.constexpr, T_LAST: tl.constexpr,  # the teacher's, by the student's numbers
    KD: tl.constexpr, CE: tl.constexpr, PROBABILITIES: tl.constexpr, SAME: tl.constexpr,
    T2: tl.constexpr, SCALAR_S: tl.constexpr, SCALAR_T: tl.constexpr, PARTS: tl.constexpr,
    HALF_S: tl.constexpr, HALF_T: tl.constexpr,  # fp16: gradients un-normalised, times the boost
    INPLACE: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ONE_TILE: tl.constexpr = CLASSES <= TILE
    RENYI: tl.constexpr = KIND == "renyi"
    # Their student gradient is a multiple of p_s - p_t: it survives an infinite loss, and needs
    # no sum over the row.
    SUMLESS: tl.constexpr = KIND == "forward_kl" or KIND == "cross_entropy"
    HIDDEN: tl.constexpr = TARGET == "decoupled" or TARGET == "separate"
    SEPARATE: tl.constexpr = TARGET == "separate"
    GRAD_TAU_S: tl.constexpr = KD and row_grads is not None and temperatures is not None
    GRAD_TAU_T: tl.constexpr = KD and row_grads is not None and teacher_temperatures is not None
    TEACHER_SIDE: tl.constexpr = KD and (grad_teacher is not None or GRAD_TAU_T)
    STUDENT_SIDE: tl.constexpr = grad_student is not None or GRAD_TAU_S
    MERGED: tl.constexpr = not KD or (
        SUMLESS and not TEACHER_SIDE and not GRAD_TAU_S and not STANDARDIZE
    )
    BOUNDED: tl.constexpr = (SUMLESS and grad_teacher is None) or KIND == "tv" or KIND == "js"
    LAST_PHASE: tl.constexpr = 1 if STANDARDIZE else 0

    row, inside, live = rows_of_program(rows, valid, ROWS)
    weight, norm, tau_s, tau_t = numbers_of_rows(
        row, inside, row_weight, temperatures, teacher_temperatures, count, temperature,
        teacher_temperature, normaliser, SCALAR_S, SCALAR_T, ACC,
    )  # fmt: skip
    per_tau_s, per_tau_t = 1 / tau_s, 1 / tau_t
    inv_s, inv_t = per_tau_s, per_tau_t  # of standardised rows, by the deviation too
    out = weight * norm
    kd = tl.full((1, 1), kd_weight, ACC)
    ce = tl.full((1, 1), ce_weight, ACC)
    smooth = tl.full((1, 1), smoothing, ACC)
    scale = tau_s * tau_s if T2 else tl.full((1, 1), 1.0, ACC)
    zero = tl.zeros((ROWS, 1), ACC)

    s_offset = row_start(row, s_inner, s_outer_stride, s_inner_stride, UNIT)
    s_row = student + s_offset
    t_row = teacher + row_start(row, t_inner, t_outer_stride, t_inner_stride, UNIT) - T_FIRST
    label = row
    l_row = labels
    if CE:
        if PROBABILITIES:
            l_row = labels + row_start(row, l_inner, l_outer_stride, l_inner_stride, UNIT)
        else:
            label = tl.load(labels + row, mask=live, other=0)
    target, known, z_s, z_t, ratio = row, live, zero, zero, tau_t
    if TARGET != "ordinary":
        # WSLD looks at its target at temperature 1, where every class is seen.
        SEEN_FROM: tl.constexpr = 0 if TARGET == "weighting" else FIRST
        SEEN_TO: tl.constexpr = CLASSES if TARGET == "weighting" else LAST
        target, known, z_s, z_t = read_target(
            targets + row, s_row, t_row, live, SEEN_FROM, SEEN_TO, ACC
        )
        ratio = tau_t / tl.full((1, 1), target_temperature, ACC)
    if STANDARDIZE:
        anchor_s, mean_s, divisor_s, rate_s = describe(
            s_row, live, FIRST, LAST, ACC, CLASSES, TILE
        )  # fmt: skip
        anchor_t, mean_t, divisor_t, rate_t = describe(
            t_row, live, FIRST, LAST, ACC, CLASSES, TILE
        )  # fmt: skip
        inv_s, inv_t = inv_s / divisor_s, inv_t / divisor_t

    # Sweep 1.
    s, t, top_s, top_t, sum_s, sum_t, changes, top_1, sum_1, top_1t, sum_1t, low_s, low_t = measure(
        s_row, t_row, live, target, ratio, inv_s, inv_t, KD, TARGET, SAME, FIRST, LAST, T_FIRST,
        T_LAST, ACC, CLASSES, TILE,
    )  # fmt: skip
    log_s, log_t = tl.log(sum_s), tl.log(sum_t)
    growth = changes / sum_s
    delta = tl.where(tl.abs(growth) < 0.5, log1p(growth), log_t - log_s)
    inv_sum_s, inv_sum_t, inv_sum_1 = 1 / sum_s, 1 / sum_t, 1 / sum_1
    target_sum = tl.full((1, 1), 1.0, ACC)
    if CE and PROBABILITIES:
        totals = tl.zeros((ROWS, TILE), ACC)
        for start in tl.range(0, CLASSES, TILE, num_stages=STAGES):
            totals += label_probabilities(
                l_row, label, start, live, smooth, True, ACC, CLASSES, TILE
            )  # fmt: skip
        target_sum = row_sum(totals)

    # What the target has of its own; what gradients to tempered logits still lack, of DKD nothing.
    own, own_1, shift_s, shift_t, slope_s, slope_t = zero, zero, zero, zero, zero, zero
    sound = (sum_s > 0) & (sum_t > 0)
    compared, looked = sound, sound
    outer = kd
    own_weight = tl.full((1, 1), target_weight, ACC)
    if TARGET != "ordinary":
        kd, outer, own, own_1, shift_s, shift_t, slope_s, slope_t, sound, compared = account(
            z_s, z_t, known, top_s, top_t, inv_s, inv_t, sum_s, sum_t, delta, top_1, sum_1, top_1t,
            sum_1t, kd, own_weight, TARGET, SAME,
        )  # fmt: skip
        looked = ~sound | (compared & (kd != 0))  # else its gradient is 0, and may be anything
        if HIDDEN:
            inv_sum_s = tl.where(sum_s > 0, inv_sum_s, 0.0)
            inv_sum_t = tl.where(sum_t > 0, inv_sum_t, 0.0)

    boost = tl.full((1, 1), HALF_BOOST, ACC)
    if HALF_S or HALF_T:
        boost = half_boost(
            kd, ce, own_weight, shift_s, shift_t, scale, inv_s, inv_t, top_s - low_s, top_t - low_t,
            BOUNDED, STANDARDIZE,
        )  # fmt: skip
    saved = tl.where(weight == 0, 0.0, boost)  # 0 times what has overflowed is not 0
    factor = saved if HALF_S else out
    kd_factor, ce_factor = outer * scale * inv_s * factor, ce * factor
    t_factor = outer * scale * inv_t * (saved if HALF_T else out)
    own_factor = own_weight * own_1 * factor
    mass = target_sum
    if SEPARATE:
        mass = target_sum * ce_factor + own_factor if CE else own_factor
    if STANDARDIZE:
        kd_factor = tl.where(rate_s > 0, kd_factor, 0.0)
        t_factor = tl.where(rate_t > 0, t_factor, 0.0)
    s_grad = grad_student
    if grad_student is not None:
        s_grad = grad_student + (s_offset if INPLACE else row.to(tl.int64) * CLASSES)
    t_grad = grad_teacher
    if grad_teacher is not None:
        t_grad = grad_teacher + row.to(tl.int64) * (T_LAST - T_FIRST) - T_FIRST

    # Sweep 2: the loss, and the sums that gradients take; with MERGED the gradient as well.
    values = tl.zeros((ROWS, TILE), ACC)
    own_s = tl.zeros((ROWS, TILE), ACC)
    own_t = tl.zeros((ROWS, TILE), ACC)
    products = tl.zeros((ROWS, TILE), ACC)
    top_mix = tl.full((ROWS, 1), -float("inf"), ACC)
    sum_mix = tl.zeros((ROWS, 1), ACC)
    for start in tl.range(0, CLASSES, TILE, num_stages=STAGES):
        s_tile, t_tile = s, t
        if not ONE_TILE:
            s_tile, t_tile = load_both(
                s_row, t_row, start, live, KD, T_FIRST, T_LAST, ACC, CLASSES, TILE
            )  # fmt: skip
        gu, y = s_tile, s_tile
        if CE:
            y = label_probabilities(
                l_row, label, start, live, smooth, PROBABILITIES, ACC, CLASSES, TILE
            )  # fmt: skip
            products += tl.where(y != 0, y * (s_tile - top_1), 0.0)
        if KD:
            seen_s, seen_t = visible(
                s_tile, t_tile, start, target, ratio, TARGET, FIRST, LAST, CLASSES, TILE
            )  # fmt: skip
            us, ut, dz = centred(seen_s, seen_t, top_s, top_t, inv_s, inv_t, SAME)
            value, gu, gv, ps, _ = terms(
                us, ut, dz, delta, log_s, log_t, inv_sum_s, inv_sum_t, KIND, ALPHA, BETA
            )
            values += value
            if STUDENT_SIDE and not SUMLESS:
                own_s += gu
            if TEACHER_SIDE and not RENYI:
                own_t += gv
            if RENYI:
                top_mix, sum_mix = renyi_grow(top_mix, sum_mix, us - log_s, ut - log_t, ALPHA)
            if MERGED:
                gu = with_shift(gu, ps, start, target, looked, kd, shift_s, TARGET, TILE)
        if MERGED and grad_student is not None:
            if SEPARATE:
                y = with_target(y, start, target, ce_factor, own_factor, CE, TILE)
            store_student(
                s_grad, start, s_tile, gu, y, kd_factor, 1.0 if SEPARATE else ce_factor, top_1,
                inv_sum_1, mass, row < 0, live, inside, KD, CE or SEPARATE, CLASSES, TILE,
            )  # fmt: skip

    # The row's loss. Where a term is infinite, only that remains of it.
    finite, others, distilled, log_sum = zero, zero, zero, zero
    infinite, too_large = row < 0, row < 0
    if KD:
        value = row_sum(values)
        if RENYI:
            log_sum = renyi_log_sum(value, top_mix, sum_mix, ALPHA)
            value = log_sum / (ALPHA - 1)
        others, distilled, infinite = distil(
            value, sound, compared, kd, own, own_weight, TARGET
        )  # fmt: skip
        finite += scale * distilled
    if SEPARATE:
        too_large |= (own == float("inf")) & (own_weight != 0)
        finite += own_weight * tl.where(own == float("inf"), 0.0, own)
    if CE:
        cross_entropy = tl.log(sum_1) * target_sum - row_sum(products)
        too_large |= cross_entropy == float("inf")
        finite += ce * tl.where(cross_entropy == float("inf"), 0.0, cross_entropy)
    row_loss = finite * weight
    row_loss += tl.where((infinite | too_large) & (weight != 0), float("inf"), 0.0)
    tl.store(loss + row, tl.where(live, row_loss * norm, 0.0), mask=inside)

    # Sweep 3: the gradients of what could not be merged. Standardised rows are swept for their
    # slopes first, of which every class's gradient has a part.
    if (STUDENT_SIDE or TEACHER_SIDE) and not MERGED:
        sum_gs, sum_gt = row_sum(own_s), row_sum(own_t)
        lean_s, lean_t = zero, zero
        if STANDARDIZE:
            slope_s, slope_t = zero, zero  # the target is among the classes
        for phase in tl.static_range(LAST_PHASE + 1):
            for start in tl.range(0, CLASSES, TILE, num_stages=STAGES):
                s_tile, t_tile = s, t
                if not ONE_TILE:
                    s_tile, t_tile = load_both(
                        s_row, t_row, start, live, KD, T_FIRST, T_LAST, ACC, CLASSES, TILE
                    )  # fmt: skip
                seen_s, seen_t = visible(
                    s_tile, t_tile, start, target, ratio, TARGET, FIRST, LAST, CLASSES, TILE
                )  # fmt: skip
                us, ut, dz = centred(seen_s, seen_t, top_s, top_t, inv_s, inv_t, SAME)
                gu, gv, ps, pt = gradients(
                    us, ut, dz, delta, log_s, log_t, inv_sum_s, inv_sum_t, sum_gs, sum_gt, log_sum,
                    KIND, ALPHA, BETA,
                )  # fmt: skip
                gu = with_shift(gu, ps, start, target, looked, kd, shift_s, TARGET, TILE)
                gv = with_shift(gv, pt, start, target, looked, kd, shift_t, TARGET, TILE)
                if STANDARDIZE:
                    away_s = from_mean(s_tile, start, anchor_s, mean_s, FIRST, LAST, TILE)
                    away_t = from_mean(t_tile, start, anchor_t, mean_t, FIRST, LAST, TILE)
                    if phase == 0:
                        slope_s += row_sum(gu * away_s) * inv_s
                        slope_t += row_sum(gv * away_t) * inv_t
                    else:
                        gu -= lean_s * away_s
                        gv -= lean_t * away_t
                elif GRAD_TAU_S:
                    slope_s += row_sum(tl.where(us == -float("inf"), 0.0, gu * us))
                if GRAD_TAU_T and not STANDARDIZE:
                    moved = teacher_moved(ut, start, target, top_t * inv_t, TARGET, TILE)
                    slope_t += row_sum(tl.where(ut == -float("inf"), 0.0, gv * moved))
                if phase == LAST_PHASE and grad_student is not None:
                    y = s_tile
                    if CE:
                        y = label_probabilities(
                            l_row, label, start, live, smooth, PROBABILITIES, ACC, CLASSES, TILE
                        )  # fmt: skip
                    if SEPARATE:
                        y = with_target(y, start, target, ce_factor, own_factor, CE, TILE)
                    store_student(
                        s_grad, start, s_tile, gu, y, kd_factor, 1.0 if SEPARATE else ce_factor,
                        top_1, inv_sum_1, mass, infinite & (not SUMLESS), live, inside, KD,
                        CE or SEPARATE, CLASSES, TILE,
                    )  # fmt: skip
                if phase == LAST_PHASE and grad_teacher is not None:
                    if TARGET == "tempered":
                        column = start + tl.arange(0, TILE)[None, :]
                        gv = tl.where(column == target, gv * ratio, gv)
                    grad = tl.where(live & ~infinite, gv * t_factor, 0.0)
                    store(t_grad, start, grad, inside, T_LAST, TILE, T_FIRST)
            if STANDARDIZE and phase == 0:
                lean_s = tl.where(infinite, 0.0, slope_s * tau_s * rate_s)
                lean_t = tl.where(infinite, 0.0, slope_t * tau_t * rate_t)
    elif grad_teacher is not None:
        for start in tl.range(0, CLASSES, TILE, num_stages=STAGES):  # no divergence, no gradient
            store(t_grad, start, tl.zeros((ROWS, TILE), ACC), inside, T_LAST, TILE, T_FIRST)

    if row_grads is not None:
        to_tau_s, to_tau_t = zero, zero
        if GRAD_TAU_S:
            to_tau_s = -outer * scale * slope_s * per_tau_s
            if T2:
                to_tau_s += 2 * tau_s * distilled
        if GRAD_TAU_T:
            to_tau_t = -outer * scale * slope_t * per_tau_t
        moving = live & ~infinite
        at = row_grads + row
        stride = rows.to(tl.int64)
        tl.store(at, tl.where(live, finite * norm, 0.0), mask=inside)
        tl.store(at + stride, tl.where(moving, out * to_tau_s, 0.0), mask=inside)
        tl.store(at + 2 * stride, tl.where(moving, out * to_tau_t, 0.0), mask=inside)
        tl.store(at + 3 * stride, tl.where(live, out / boost, 0.0), mask=inside)
        if PARTS:
            counts = live & (weight != 0)
            of_target = own * scale if TARGET == "decoupled" else own
            tl.store(at + 4 * stride, tl.where(counts, out * of_target, 0.0), mask=inside)
            tl.store(at + 5 * stride, tl.where(counts, out * scale * others, 0.0), mask=inside)
