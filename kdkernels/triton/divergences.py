# SPDX-License-Identifier: Apache-2.0
"""The divergences of the rowwise family, per class: value and derivatives, without cancellation.

With ``d = log(p_t / p_s)`` and ``e = expm1(d)``, a class with ``|d| < 1/2`` is `near`: there all is
``p_s`` times functions of d that vanish with it, the change ``p_t - p_s = p_s e`` first. Elsewhere
plain differences of the two probabilities lose nothing. Derivatives are those of a form that
differs from the divergence by a multiple of ``p_t - p_s``, which sums to zero, so that they vanish
with d as well. A new divergence is one more branch of :func:`terms`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.math import (
    expm1,
    expm1_minus,
    log1p,
    minus_log1p,
    near_zero,
    power_series,
)


@triton.jit
def _times(p, x):
    """``p x``, where no mass makes any x nothing."""
    return tl.where(p == 0, 0.0, p * x)


@triton.jit
def terms(
    us, ut, dz, delta, log_s, log_t, inv_sum_s, inv_sum_t,
    KIND: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """Per class: value, p_s dl/dp_s, p_t dl/dp_t, p_s, p_t."""
    d = dz - delta
    ps, pt = tl.exp(us) * inv_sum_s, tl.exp(ut) * inv_sum_t
    near = tl.abs(d) < 0.5
    x = tl.where(near, d, 0.0)
    w = expm1_minus(x)
    e = x + w
    change = tl.where(near, ps * e, pt - ps)
    if KIND == "forward_kl":
        to_t = _times(pt, d)
        return tl.where(near, ps * (e * x - w), to_t - change), -change, to_t, ps, pt
    elif KIND == "cross_entropy":
        # Any multiple of pt may be left out of the derivative: without log_s it cancels less.
        return _times(pt, log_s - us), -change, _times(pt, -us), ps, pt
    elif KIND == "reverse_kl":
        to_s = -_times(ps, d)
        return tl.where(near, ps * w, to_s + change), to_s, change, ps, pt
    elif KIND == "jeffreys":
        to_s, to_t = _times(ps, d), _times(pt, d)
        value = tl.where(near, change * x, to_t - to_s)
        return value, -change - to_s, to_t + change, ps, pt
    elif KIND == "tv":
        half = tl.where(change < 0, 0.5, tl.where(change > 0, -0.5, 0.0))
        return tl.abs(change) * 0.5, ps * half, -pt * half, ps, pt
    elif KIND == "js":
        m, y = ps + BETA * change, BETA * e
        log_y, log_m = log1p(y), tl.log(m)
        to_s = (1 - BETA) * _times(ps, tl.where(near, -log_y, us - log_s - log_m))
        to_t = BETA * _times(pt, tl.where(near, d - log_y, ut - log_t - log_m))
        # phi(e) - phi(y), phi(y) = (1 + y) log(1 + y) - y, by what is left of the logarithms.
        bregman = BETA * (e * x - w) - (y * y - (1 + y) * minus_log1p(y, log_y))
        return tl.where(near, ps * bregman, to_s + to_t), to_s, to_t, ps, pt
    elif KIND == "skew_forward" or KIND == "skew_reverse":
        # KL(p || m) for p the teacher (forward) or the student, m = alpha p + (1 - alpha) q.
        if KIND == "skew_forward":
            p, q, away = pt, ps, (1 - ALPHA) * change  # p - m
            m = ps + ALPHA * change
            log_ratio = tl.where(near, d - log1p(ALPHA * e), ut - log_t - tl.log(m))
        else:
            p, q, away = ps, pt, -(1 - ALPHA) * change
            m = ps - away
            log_ratio = tl.where(near, -log1p((1 - ALPHA) * e), us - log_s - tl.log(m))
        share = away / tl.where(m == 0, 1.0, m)
        close = m * (share * share - (1 + share) * minus_log1p(share, log_ratio))
        to_p = _times(p, log_ratio)
        value = tl.where(near, close, to_p - away)
        to_p -= ALPHA * p * share
        to_q = -(1 - ALPHA) * q * share
        if KIND == "skew_forward":
            return value, to_q, to_p, ps, pt
        return value, to_p, to_q, ps, pt
    else:
        # Renyi's is a function of the alpha divergence, which is `ab`.
        tl.static_assert(KIND == "ab" or KIND == "renyi")
        student = d <= 0
        log_p = tl.where(student, us - log_s, ut - log_t)
        x = tl.where(tl.abs(d) > 1e30, -1e30, -tl.abs(d))
        value_s, own_s, other_s = _ab(log_p, x, ALPHA, BETA)
        value_t, own_t, other_t = _ab(log_p, x, BETA, ALPHA)
        to_s, to_t = tl.where(student, own_s, other_t), tl.where(student, other_s, own_t)
        return tl.where(student, value_s, value_t), to_s, to_t, ps, pt


@triton.constexpr_function
def _largest(alpha, gamma):
    return max(abs(alpha), abs(gamma))


@triton.jit
def _scaled_expm1(scale, log_scale, x):
    """``scale expm1(x)``, finite wherever the product is."""
    plain = scale * expm1(tl.where(x > 1, 1.0, x))
    return tl.where(x > 1, tl.exp(log_scale + x) - scale, plain)


@triton.jit
def _ab(log_p, x, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """Of a class whose larger probability p is the first side's: value and both derivatives.

    The other side's is ``p exp(x)``, x <= 0. Powers are taken in the log domain, since one may
    overflow where the product does not; whatever the exponents, none is met as a difference.
    """
    GAMMA: tl.constexpr = ALPHA + BETA
    off = log_p == -float("inf")
    log_scale = GAMMA * tl.where(off, 0.0, log_p)
    scale = tl.where(off, 0.0, tl.exp(log_scale))
    by_alpha = _scaled_expm1(scale, log_scale, ALPHA * x)
    by_gamma = _scaled_expm1(scale, log_scale, GAMMA * x)
    value = tl.where(
        near_zero(_largest(ALPHA, GAMMA) * x),
        scale * power_series(x, ALPHA, GAMMA),
        (ALPHA / GAMMA * by_gamma - by_alpha) / (ALPHA * BETA),
    )
    if ALPHA < 0 or GAMMA < 0:  # mass that stands alone
        value = tl.where((x == -1e30) & (log_p != -float("inf")), float("inf"), value)
    log_product = log_scale + ALPHA * x
    other = _scaled_expm1(tl.exp(log_product), log_product, BETA * x) / BETA
    return value, by_alpha / -ALPHA, tl.where(off, 0.0, other)


@triton.jit
def renyi_mixture(log_ps, log_pt, ALPHA: tl.constexpr):
    """``log(t^alpha s^(1-alpha))``; +inf where only the teacher has mass and alpha > 1."""
    one_sided = (log_ps == -float("inf")) | (log_pt == -float("inf"))
    mixture = tl.where(one_sided, -float("inf"), ALPHA * log_pt + (1 - ALPHA) * log_ps)
    if ALPHA > 1:
        teacher_alone = (log_ps == -float("inf")) & (tl.exp(log_pt) > 0)
        mixture = tl.where(teacher_alone, float("inf"), mixture)
    return mixture


@triton.jit
def _renyi_centre(top):
    return tl.where(tl.abs(top) == float("inf"), 0.0, top)


@triton.jit
def renyi_grow(top, total, log_ps, log_pt, ALPHA: tl.constexpr):
    """The mixture's maximum, and its sum about that, by one more tile."""
    mix = renyi_mixture(log_ps, log_pt, ALPHA)
    old = top
    top = tl.maximum(top, tl.max(mix, axis=1, keep_dims=True))
    centre = _renyi_centre(top)
    total = total * tl.exp(old - centre) + tl.sum(tl.exp(mix - centre), axis=1, keep_dims=True)
    return top, total


@triton.jit
def renyi_log_sum(alpha_divergence, top, total, ALPHA: tl.constexpr):
    """Of the whole mixture; by the alpha divergence where student and teacher are close."""
    excess = ALPHA * (ALPHA - 1) * alpha_divergence
    return tl.where(tl.abs(excess) < 0.5, log1p(excess), _renyi_centre(top) + tl.log(total))


@triton.jit
def renyi_gradients(log_ps, log_pt, d, log_sum, ALPHA: tl.constexpr):
    """Per class to both (tempered) logits: ``p_s - w`` and ``alpha / (alpha - 1) (w - p_t)``.

    ``w`` is the mixture over its sum. Each difference is the larger side times an expm1.
    """
    ps, pt = tl.exp(log_ps), tl.exp(log_pt)
    w = tl.exp(renyi_mixture(log_ps, log_pt, ALPHA) - log_sum)
    to_s, to_t = ALPHA * d - log_sum, (ALPHA - 1) * d - log_sum  # log(w / ps), log(w / pt)
    gu = tl.where(to_s <= 0, -ps, w) * expm1(-tl.abs(to_s))
    gv = tl.where(to_t <= 0, pt, -w) * expm1(-tl.abs(to_t))
    return gu, ALPHA / (ALPHA - 1) * gv


@triton.jit
def gradients(
    us, ut, dz, delta, log_s, log_t, inv_sum_s, inv_sum_t, sum_s, sum_t, log_sum,
    KIND: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """Per class: to both (tempered) logits, by the sums of the row's derivatives; p_s, p_t."""
    if KIND == "renyi":
        gu, gv = renyi_gradients(us - log_s, ut - log_t, dz - delta, log_sum, ALPHA)
        ps, pt = tl.exp(us) * inv_sum_s, tl.exp(ut) * inv_sum_t
    else:
        _, gu, gv, ps, pt = terms(
            us, ut, dz, delta, log_s, log_t, inv_sum_s, inv_sum_t, KIND, ALPHA, BETA
        )
        gv -= pt * sum_t
        if KIND != "forward_kl" and KIND != "cross_entropy":  # whose sum is 0
            gu -= ps * sum_s
    return gu, gv, ps, pt
