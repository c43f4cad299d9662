# SPDX-License-Identifier: Apache-2.0
"""The divergences of the rowwise family, per class: value and derivatives, without cancellation.

As in the reference a class contributes ``p f(x)``, where ``p`` is the larger of its two
probabilities and ``x <= 0`` the log-ratio of the other to it. A new divergence is one more branch
of :func:`terms`.
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
    phi,
    power_series,
)


@triton.constexpr_function
def _largest(alpha, gamma):
    return max(abs(alpha), abs(gamma))


@triton.jit
def _scaled_expm1(scale, log_scale, x):
    """``scale expm1(x)``, finite wherever the product is."""
    plain = scale * expm1(tl.where(x > 1, 1.0, x))
    return tl.where(x > 1, tl.exp(log_scale + x) - scale, plain)


@triton.jit
def terms(p, log_p, e, x, KIND: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """Of a class whose larger probability ``p`` is the student's: value, p_s dl/dp_s, p_t dl/dp_t.

    ``e = expm1(x)``, so that the teacher's is ``p (1 + e)``. The derivatives are those of a form
    that differs from the divergence by a multiple of ``p_t - p_s`` (which sums to zero), so that
    they vanish with x. To serve the classes where the teacher's is larger, the caller swaps the
    divergence's arguments.
    """
    if KIND == "forward_kl":
        return p * phi(e, x), -p * e, p * (1 + e) * x
    elif KIND == "reverse_kl":
        return p * expm1_minus(x, e), -p * x, p * e
    elif KIND == "jeffreys":
        return p * e * x, -p * (e + x), p * ((1 + e) * x + e)
    elif KIND == "tv":
        half = tl.where(e < 0, 0.5, 0.0) * p
        return -0.5 * p * e, half, -half * (1 + e)
    elif KIND == "js":
        log_m = log1p(BETA * e)
        value = p * (BETA * phi(e, x) - phi(BETA * e, log_m))
        return value, -(1 - BETA) * p * log_m, BETA * p * (1 + e) * (x - log_m)
    elif KIND == "skew_forward":
        # KL(t || m): forward KL from m's point of view, with m = p (1 + alpha e) in p's place.
        # 1 + ratio is (1 + e) / m, which keeps the closed form right where x is very negative.
        m = 1 + ALPHA * e
        log_m = log1p(ALPHA * e)
        ratio = (1 - ALPHA) * e / tl.where(m > 0, m, 1.0)
        closed = (1 + e) * (x - log_m) - (1 - ALPHA) * e
        value = tl.where(near_zero(ratio), m * phi(ratio, x - log_m), closed)
        return value * p, -(1 - ALPHA) * p * ratio, p * (1 + e) * (x - log_m - ALPHA * ratio)
    elif KIND == "skew_reverse":
        log_m = log1p((1 - ALPHA) * e)
        m = 1 + (1 - ALPHA) * e
        share = (1 - ALPHA) * e / tl.where(m > 0, m, 1.0)
        value = p * minus_log1p((1 - ALPHA) * e, log_m)
        return value, p * (ALPHA * share - log_m), (1 - ALPHA) * p * (1 + e) * share
    else:
        tl.static_assert(KIND == "ab")
        # Powers of p are taken in the log domain together with the ratio's, since one may
        # overflow where their product does not.
        GAMMA: tl.constexpr = ALPHA + BETA
        log_scale = GAMMA * tl.where(log_p == -float("inf"), 0.0, log_p)
        scale = tl.where(log_p == -float("inf"), 0.0, tl.exp(log_scale))
        by_alpha = _scaled_expm1(scale, log_scale, ALPHA * x)
        by_gamma = _scaled_expm1(scale, log_scale, GAMMA * x)
        closed = (ALPHA / GAMMA * by_gamma - by_alpha) / (ALPHA * BETA)
        near = near_zero(_largest(ALPHA, GAMMA) * x)
        value = tl.where(near, scale * power_series(x, ALPHA, GAMMA), closed)
        log_product = log_scale + ALPHA * x
        other = _scaled_expm1(tl.exp(log_product), log_product, BETA * x) / BETA
        return value, by_alpha / -ALPHA, tl.where(log_p == -float("inf"), 0.0, other)


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
