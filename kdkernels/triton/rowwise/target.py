# SPDX-License-Identifier: Apache-2.0
"""What a loss does with a row's target class: a few scalars per row.

The sweeps see the target as a class that is off (decoupled, separate) or at another temperature
(tempered); see :func:`kdkernels.triton.rowwise.row.visible`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels import divergences
from kdkernels.triton.math import expm1, log1p, minus_log1p
from kdkernels.triton.sweep import centred

WEIGHTING_EPS = tl.constexpr(divergences.WEIGHTING_EPS)


@triton.jit
def read_target(
    ptr, s_row, t_row, live, FIRST: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr
):
    """The target class, -1 where it is none of the divergence's; whether it is; its logits."""
    target = tl.load(ptr, mask=live, other=FIRST)
    known = (target >= FIRST) & (target < LAST)
    at = tl.where(known, target, FIRST)
    z_s = tl.load(s_row + at, mask=live, other=0).to(ACC)
    z_t = tl.load(t_row + at, mask=live, other=0).to(ACC)
    return tl.where(known, target, -1).to(tl.int32), known, z_s, z_t


@triton.jit
def _sigmoid(x):
    """Of x and of -x, and the logarithms of both."""
    e = tl.exp(-tl.abs(x))
    large, small = 1 / (1 + e), e / (1 + e)
    log_large = -log1p(e)
    log_small = log_large - tl.abs(x)
    negative = x < 0
    return (
        tl.where(negative, small, large),
        tl.where(negative, large, small),
        tl.where(negative, log_small, log_large),
        tl.where(negative, log_large, log_small),
    )


@triton.jit
def _phi(e, log1p_e):
    """``(1 + e) log(1 + e) - e``."""
    return e * e - (1 + e) * minus_log1p(e, log1p_e)


@triton.jit
def _decoupled(x_s, x_t, dx):
    """DKD's KL between (b, 1 - b) of teacher and student, and its derivatives to both log-odds.

    ``x_s``, ``x_t``: the log-odds of the target; ``dx``: their difference, where these are finite.
    """
    inf = float("inf")
    both_finite = (tl.abs(x_s) < inf) & (tl.abs(x_t) < inf)
    d = tl.where(both_finite, dx, tl.where(x_s == x_t, 0.0, x_t - x_s))
    b_s, c_s, log_b_s, log_c_s = _sigmoid(x_s)
    b_t, c_t, log_b_t, log_c_t = _sigmoid(x_t)
    # With m = b_t / (1 - b_t) over b_s / (1 - b_s), less 1: nothing cancels.
    near = tl.abs(d) <= 1
    x = tl.where(near, d, 0.0)
    m = expm1(x)
    w = log1p(b_s * m)
    e_1, e_0 = c_s * m / (1 + b_s * m), -b_s * m / (1 + b_s * m)
    close = b_s * _phi(e_1, x - w) + c_s * _phi(e_0, -w)
    far = tl.where(b_t > 0, b_t * (log_b_t - log_b_s), 0.0)
    far += tl.where(c_t > 0, c_t * (log_c_t - log_c_s), 0.0)
    value = tl.where(near, close, far)
    slope_s = tl.where(near, -b_s * e_1, tl.where(x_s > 0, c_t - c_s, b_s - b_t))
    spread = b_t * c_t
    slope_t = tl.where((spread == 0) | (value == inf), 0.0, spread * d)
    nan = (x_s != x_s) | (x_t != x_t)
    return tl.where(nan, float("nan"), value), slope_s, slope_t


@triton.jit
def _omega(log_s, log_t):
    """WSLD's weight of a row, from the target's log-probabilities at temperature 1."""
    ratio = tl.where(log_t == -float("inf"), 0.0, -log_s / (WEIGHTING_EPS - log_t))
    return -expm1(-ratio)


@triton.jit
def with_shift(
    grad, p, start, at, looked, share, shift,
    TARGET: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile's gradients to tempered logits, by what the target makes of the divergence's."""
    if TARGET != "ordinary":
        grad = tl.where(looked, grad, 0.0)
    if TARGET == "decoupled":
        column = start + tl.arange(0, TILE)[None, :]
        grad = tl.where(column == at, shift, share * grad - p * shift)
    return grad


@triton.jit
def teacher_moved(ut, start, at, top, TARGET: tl.constexpr, TILE: tl.constexpr):
    """What the teacher's temperature divides: not a target that has its own."""
    if TARGET == "tempered":
        ut = tl.where(start + tl.arange(0, TILE)[None, :] == at, -top, ut)
    return ut


@triton.jit
def account(
    z_s, z_t, known, top_s, top_t, inv_s, inv_t, sum_s, sum_t, delta, top_1, sum_1, top_1t, sum_1t,
    kd, own_weight, TARGET: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """What a measured row's target has of its own, and makes of the divergence's share.

    The share; what gradients to tempered logits still lack; the target's value, its weight by the
    teacher; its gradients to tempered logits (times u for temperatures); whether the row is not
    NaN, and there are others to compare.
    """
    own, own_1 = tl.zeros_like(z_s), tl.zeros_like(z_s)
    shift_s, shift_t, slope_s, slope_t = own, own, own, own
    sound = (sum_s > 0) & (sum_t > 0)
    compared = sound
    inf = float("inf")
    if TARGET == "decoupled" or TARGET == "separate":
        sound = (sum_s >= 0) & (sum_t >= 0) & (z_s < inf) & (z_t < inf)
        sound &= ((sum_s > 0) | (z_s > -inf)) & ((sum_t > 0) | (z_t > -inf))
    if TARGET == "separate" or TARGET == "weighting":
        log_s, log_t = z_s - top_1 - tl.log(sum_1), z_t - top_1t - tl.log(sum_1t)
        if TARGET == "weighting":
            kd = kd * _omega(log_s, log_t)
        else:
            own_1 = tl.exp(log_t)
            own = tl.where(own_1 == 0, 0.0, -own_1 * log_s)
    if TARGET == "decoupled":
        us, ut, du = centred(z_s, z_t, top_s, top_t, inv_s, inv_t, SAME)
        own, shift_s, shift_t = _decoupled(us - tl.log(sum_s), ut - tl.log(sum_t), du - delta)
        shift_s, shift_t = shift_s * own_weight, shift_t * own_weight
        slope_s = tl.where(us == -inf, 0.0, shift_s * us)
        slope_t = tl.where(ut == -inf, 0.0, shift_t * ut)
    sound &= known & (own == own)
    compared |= ~sound  # where NaN is all there is
    kd = tl.where(sound, kd, float("nan"))
    shift_s = tl.where(sound, shift_s, float("nan"))
    outer = tl.full((1, 1), 1.0, kd.dtype) if TARGET == "decoupled" else kd
    return kd, outer, own, own_1, shift_s, shift_t, slope_s, slope_t, sound, compared


@triton.jit
def distil(value, sound, compared, kd, own, own_weight, TARGET: tl.constexpr):
    """The divergence, be it NaN or infinite; what is finite of the weighted sum with the target's;
    whether the row is infinite."""
    inf = float("inf")
    if TARGET == "decoupled" or TARGET == "separate":
        value = tl.where(compared, value, 0.0)
    infinite = value == inf
    value = tl.where(sound, value, float("nan"))
    distilled = kd * tl.where(infinite, 0.0, value)
    if TARGET != "ordinary":
        infinite &= sound & (kd != 0)
    if TARGET == "decoupled":
        infinite |= sound & (own == inf) & (own_weight != 0)
        distilled += own_weight * tl.where(own == inf, 0.0, own)
        distilled = tl.where(infinite, 0.0, distilled)
    return value, distilled, infinite
