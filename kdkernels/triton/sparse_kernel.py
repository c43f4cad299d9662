# SPDX-License-Identifier: Apache-2.0
"""The kernel of the sparse family: divergences from a teacher stored as its top-k values.

A program takes one row. It marks the stored classes in a bit map, one bit a class; sweeps the
student's other logits, the tail, for their maximum and sum of exponentials; compares the k + 1
probabilities in fp64, k of them gathered; and sweeps once more to write the gradient. Per class 6
bytes in bf16 where the second sweep finds the row in the cache, and 8 where not; for the teacher
nothing as wide as the row but the bits.

Shapes below: LANES are the k stored classes and, at lane K, the tail.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.ops import rowwise as ops
from kdkernels.triton.divergences import terms
from kdkernels.triton.layout import row_start
from kdkernels.triton.math import expm1, log1p

STAGES = tl.constexpr(3)
HALF_BOOST = tl.constexpr(ops.HALF_BOOST)


@triton.jit
def _finite(top):
    """A maximum fit to be subtracted: 0 where there is no finite number."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _log_sum_exp(x):
    top = _finite(tl.max(x, axis=0))
    return tl.log(tl.sum(tl.exp(x - top), axis=0)) + top


@triton.jit
def _log_add(a, b):
    high, low = tl.maximum(a, b), tl.minimum(a, b)
    return high + log1p(tl.exp(low - _finite(high)))


@triton.jit
def _tail(s_row, seen, start, classes, ACC: tl.constexpr, TILE: tl.constexpr):
    """A tile of the student's logits, -inf for stored classes; and which these are."""
    column = start + tl.arange(0, TILE)
    s = tl.load(s_row + column, mask=column < classes, other=-float("inf")).to(ACC)
    bits = tl.load(seen + column // 32, mask=column < classes, other=0)
    stored = ((bits >> (column % 32)) & 1) != 0
    return tl.where(stored, -float("inf"), s), stored


@triton.jit(do_not_specialize=["rows", "s_inner", "s_outer_stride", "s_inner_stride"])
def sparse_kernel(
    student,  # (..., CLASSES)
    values,  # (rows, K)
    indices,  # (rows, K) int64
    seen,  # (rows, WORDS) int32, zeros
    valid,  # (rows,) bool or None
    row_weight,  # (rows,) or None
    temperatures,  # (1,), (rows,), or None: the number
    teacher_temperatures,
    logsumexp,  # (rows,) or None
    count,  # () int64: valid rows, or None: not divided by
    loss,  # (rows,)
    grad_student,  # (rows, CLASSES) or None
    grad_values,  # (rows, K) or None
    row_grads,  # (5, rows) or None
    rows, s_inner, s_outer_stride, s_inner_stride,
    temperature: tl.float64, teacher_temperature: tl.float64, normaliser: tl.float64,
    KIND: tl.constexpr, BETA: tl.constexpr, MISSING: tl.constexpr, SPREAD: tl.constexpr,
    LEAST_TAIL: tl.constexpr, T2: tl.constexpr, SCALAR_S: tl.constexpr, SCALAR_T: tl.constexpr,
    HALF_S: tl.constexpr, HALF_T: tl.constexpr,  # fp16: gradients un-normalised, times HALF_BOOST
    ACC: tl.constexpr, CLASSES: tl.constexpr, UNIT: tl.constexpr, TILE: tl.constexpr,
    WORDS: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    F64: tl.constexpr = tl.float64
    INFINITY: tl.constexpr = float("inf")
    WHOLE: tl.constexpr = MISSING != "renormalize"  # the student's softmax is over all classes
    row = tl.program_id(0).to(tl.int64)
    live = row < rows
    if valid is not None:
        live = tl.load(valid + row) != 0
    weight = tl.full((), 1.0, F64)
    if row_weight is not None:
        weight = tl.load(row_weight + row).to(F64)
    tau_s = tl.full((), temperature, F64)
    if temperatures is not None:
        tau_s = tl.load(temperatures + (row * 0 if SCALAR_S else row)).to(F64)
    tau_t = tl.full((), teacher_temperature, F64)
    if teacher_temperatures is not None:
        tau_t = tl.load(teacher_temperatures + (row * 0 if SCALAR_T else row)).to(F64)
    inv_s = 1 / tau_s
    norm = tl.full((), normaliser, F64)
    if count is not None:
        norm = norm / tl.maximum(tl.load(count), 1).to(F64)
    out = weight * norm
    scale = tau_s * tau_s if T2 else tl.full((), 1.0, F64)

    # The stored classes.
    lane = tl.arange(0, LANES)
    at_tail = lane == K
    at = row * K + lane
    k, classes = tl.where(live, K, 0), tl.where(live, CLASSES, 0)
    v = tl.load(values + at, mask=lane < k, other=-INFINITY).to(F64)
    present = v != -INFINITY
    index = tl.load(indices + at, mask=present, other=0)
    known = present & (index >= 0) & (index < CLASSES)
    stored_count = tl.sum(known.to(tl.int32), axis=0)
    sound = stored_count == tl.sum(present.to(tl.int32), axis=0)
    s_row = student + row_start(row, s_inner, s_outer_stride, s_inner_stride, UNIT)
    z = tl.load(s_row + index, mask=known, other=-INFINITY).to(F64)
    seen_row = seen + row * WORDS
    bit = tl.full((LANES,), 1, tl.int32) << (index % 32).to(tl.int32)
    tl.atomic_or(seen_row + index // 32, bit, mask=known)
    tl.debug_barrier()  # every thread sees every bit

    # Sweep 1: the tail's maximum and sum of exponentials; and how many bits there are, since an
    # index that is repeated sets one only.
    inverse = inv_s.to(ACC)
    top = tl.full((), -INFINITY, ACC)
    sums = tl.zeros((TILE,), ACC)
    bits = tl.zeros((TILE,), tl.int32)
    for start in tl.range(0, CLASSES, TILE, num_stages=STAGES):
        s, stored = _tail(s_row, seen_row, start, classes, ACC, TILE)
        bits += stored.to(tl.int32)
        if WHOLE:
            old = top
            top = tl.maximum(top, tl.max(s, axis=0))
            centre = _finite(top)
            sums = sums * tl.exp((old - centre) * inverse) + tl.exp((s - centre) * inverse)
    sound = sound & (tl.sum(bits, axis=0) == stored_count)
    sum_s = tl.sum(sums, axis=0)

    # Log-probabilities of both sides.
    outside = top.to(F64) * inv_s + tl.log(sum_s.to(F64))
    us = tl.where(at_tail, outside if WHOLE else -INFINITY, z * inv_s)
    total_s = _log_sum_exp(us)
    log_s = us - total_s
    ut = v / tau_t
    whole = tl.full((), 0.0, F64)
    log_tail = tl.full((), -INFINITY, F64)
    width = log_tail * 0
    has_tail = stored_count < 0
    if MISSING == "tail":
        inside = _log_sum_exp(ut)
        others = CLASSES - stored_count
        if logsumexp is not None:
            whole = tl.load(logsumexp + row, mask=live, other=0).to(F64)
            captured = inside - whole
            sound = sound & (whole < INFINITY)
        else:
            captured = _log_sum_exp(v)
        has_tail = (captured < 0) & (others > 0)
        captured = tl.where(has_tail, captured, -1.0)
        log_tail = tl.where(has_tail, tl.log(-expm1(captured)), -INFINITY)
        width = tl.log(tl.maximum(others, 1).to(F64)) if SPREAD else tl.full((), 0.0, F64)
        tail = whole + log_tail if logsumexp is not None else width + (log_tail - width) / tau_t
        if KIND == "reverse_kl":
            least = inside + tl.log(tl.full((), LEAST_TAIL, F64))
            tail = tl.where(has_tail | (others <= 0), tail, least)
        ut = tl.where(at_tail, tail, ut)
    total_t = _log_sum_exp(ut)
    log_t = ut - total_t
    sound = sound & (total_s > -INFINITY) & (total_s < INFINITY)
    sound = sound & (total_t > -INFINITY) & (total_t < INFINITY)

    # The value, and both gradients per du.
    off = (log_s == -INFINITY) & (log_t == -INFINITY)
    dz = tl.where(off, 0.0, log_t - log_s)
    zero = tl.full((), 0.0, F64)
    value, to_s, to_t, ps, pt = terms(
        log_s, log_t, dz, zero, zero, zero, zero + 1, zero + 1, KIND, 0.0, BETA
    )
    value = tl.sum(value, axis=0)
    infinite = sound & (value == INFINITY)
    if KIND != "forward_kl":  # whose sum is 0, and which is what remains of an infinite value
        to_s -= ps * tl.sum(to_s, axis=0)
    to_t = tl.where(infinite, 0.0, to_t - pt * tl.sum(tl.where(infinite, 0.0, to_t), axis=0))
    nan = tl.where(sound, 0.0, float("nan")).to(F64)
    value = tl.where(sound, value, nan)
    to_s, to_t = tl.where(off, 0.0, to_s) + nan, tl.where(off, 0.0, to_t) + nan
    s_tail = tl.sum(tl.where(at_tail, to_s, 0.0), axis=0)
    t_tail = tl.where(has_tail, tl.sum(tl.where(at_tail, to_t, 0.0), axis=0), 0.0)

    finite = scale * tl.where(infinite, 0.0, value)
    row_loss = finite * weight + tl.where(infinite & (weight != 0), INFINITY, 0.0)
    tl.store(loss + row, tl.where(live, row_loss * norm, 0.0))

    # Sweep 2: the gradient, in the tail a multiple of the exponential.
    slope = tl.zeros((TILE,), ACC)
    if grad_student is not None or row_grads is not None:
        times = scale * inv_s * (out if not HALF_S else tl.full((), HALF_BOOST, F64))
        each = tl.where(top == -INFINITY, 0.0, s_tail / sum_s.to(F64)) if WHOLE else nan
        each = tl.where(live, each * times, 0.0).to(ACC)
        for start in tl.range(0, CLASSES, TILE, num_stages=STAGES):
            s, stored = _tail(s_row, seen_row, start, classes, ACC, TILE)
            x = (s - _finite(top)) * inverse
            e = tl.exp(x) if WHOLE else tl.zeros((TILE,), ACC)
            slope += tl.where(x == -INFINITY, 0.0, e * x)
            if grad_student is not None:
                column = start + tl.arange(0, TILE)
                mask = (column < CLASSES) & (stored == 0)
                tl.store(grad_student + row * CLASSES + column, e * each, mask=mask)
        if grad_student is not None:  # the stored classes' places, which the sweep has left out
            grad = (to_s * times).to(ACC)
            tl.store(grad_student + row * CLASSES + index, grad, mask=known)

    # What the values and logsumexp are to the tail, and to the temperature.
    u = ut - whole if logsumexp is not None else v
    share = tl.exp(u - tl.where(has_tail, log_tail, INFINITY))
    through = tl.where(present, t_tail * share, 0.0)
    if grad_values is not None:
        times = scale / tau_t * (out if not HALF_T else tl.full((), HALF_BOOST, F64))
        grad = tl.where(present, (to_t - through) * times, 0.0)
        tl.store(grad_values + at, grad.to(ACC), mask=lane < K)
    if row_grads is not None:
        about = tl.max(tl.where(us == INFINITY, 0.0, us), axis=0)
        moved = tl.where(us == -INFINITY, 0.0, to_s * (us - about))
        slope_s = tl.sum(moved, axis=0)
        if WHOLE:
            mean = tl.sum(slope, axis=0).to(F64) / sum_s.to(F64)
            mean -= tl.log(sum_s.to(F64))  # of the tail's logits, about its logsumexp
            slope_s += tl.where(top == -INFINITY, 0.0, s_tail * mean)
        if logsumexp is not None:
            slope_t = tl.sum(tl.where(present, (to_t - through) * v, 0.0), axis=0)
        else:
            slope_t = tl.sum(tl.where(present, to_t * v, 0.0), axis=0)
            slope_t += tl.where(has_tail, t_tail * (log_tail - width), 0.0)
        own = 2 * tau_s * tl.where(infinite, 0.0, value) if T2 else zero
        to_tau_s = own - tl.where(infinite, 0.0, scale * inv_s * slope_s)
        to_whole = tl.where(has_tail, t_tail / tl.exp(log_tail), 0.0)
        at_row = row_grads + row
        stride = tl.full((), rows, tl.int64)
        tl.store(at_row, tl.where(live, finite * norm, 0.0))
        tl.store(at_row + stride, tl.where(live, out * to_tau_s, 0.0))
        tl.store(at_row + 2 * stride, tl.where(live, -out * scale / (tau_t * tau_t) * slope_t, 0.0))
        tl.store(at_row + 3 * stride, tl.where(live, out * scale * to_whole, 0.0))
        tl.store(at_row + 4 * stride, tl.where(live, out / HALF_BOOST, 0.0))
