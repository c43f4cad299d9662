# SPDX-License-Identifier: Apache-2.0
"""The first steps of a program of the rowwise family: reading its rows and measuring them."""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels import divergences
from kdkernels.triton.sweep import (
    HALF_BOOST,
    STAGES,
    centred,
    exp_change,
    finite_top,
    load,
    row_max,
    row_sum,
)

STANDARD_EPS = tl.constexpr(divergences.STANDARD_EPS)


@triton.jit
def load_both(
    s_row, t_row, start, live, KD: tl.constexpr, T_FIRST: tl.constexpr, T_LAST: tl.constexpr,
    ACC: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Without a divergence the teacher is not looked at, whatever it holds."""
    s = load(s_row, start, live, -float("inf"), ACC, CLASSES, TILE)
    t = load(t_row, start, live, -float("inf"), ACC, T_LAST, TILE, T_FIRST) if KD else s
    return s, t


@triton.jit
def visible(
    s, t, start, at, ratio, TARGET: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
    CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Both rows as the divergence sees them: of its classes, and with the target in its place."""
    column = start + tl.arange(0, TILE)[None, :]
    if TARGET == "decoupled" or TARGET == "separate":
        off = column == at
        s, t = tl.where(off, -float("inf"), s), tl.where(off, -float("inf"), t)
    elif TARGET == "tempered":
        t = tl.where(column == at, t * ratio, t)
    if LAST - FIRST < CLASSES:
        off = (column < FIRST) | (column >= LAST)
        s, t = tl.where(off, -float("inf"), s), tl.where(off, -float("inf"), t)
    return s, t


@triton.jit
def describe(
    ptr, live, FIRST: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Of a row that is to be standardised, over its finite classes.

    A logit, and the mean less this; what the temperature is multiplied by; 1 / ((n - 1) std), 0 for
    a row that does not vary.
    """
    anchor, mean = tl.zeros_like(live.to(ACC)), tl.zeros_like(live.to(ACC))
    count, squares = tl.zeros_like(mean), tl.zeros_like(mean)
    for start in tl.range(0, CLASSES, TILE, num_stages=STAGES):
        z = load(ptr, start, live, -float("inf"), ACC, LAST, TILE, FIRST)
        on = z != -float("inf")
        anchor = tl.where(count == 0, finite_top(row_max(z)), anchor)
        here = row_sum(tl.where(on, 1.0, tl.zeros_like(z)))
        centre = row_sum(tl.where(on, z - anchor, 0.0)) / tl.maximum(here, 1)
        away = tl.where(on, (z - anchor) - centre, 0.0)
        total = tl.maximum(count + here, 1)
        move = centre - mean
        squares += row_sum(away * away) + move * move * (count * here / total)
        mean += move * (here / total)
        count += here
    free = tl.maximum(count - 1, 1)
    std = tl.sqrt(squares / free)
    varies = std > 0
    return (
        anchor,
        mean,
        tl.where(varies, STANDARD_EPS + std, 1.0),
        tl.where(varies, 1 / (free * tl.where(varies, std, 1.0)), 0.0),
    )


@triton.jit
def from_mean(z, start, anchor, mean, FIRST: tl.constexpr, LAST: tl.constexpr, TILE: tl.constexpr):
    """A tile's distances from the mean; 0 where a class has no part in it."""
    column = start + tl.arange(0, TILE)[None, :]
    on = (z != -float("inf")) & (column >= FIRST) & (column < LAST)
    return tl.where(on, (z - anchor) - mean, 0.0)


@triton.jit
def _grow(raw, exps, z):
    """Maxima, and sums of exponentials about them (per lane), by one more tile."""
    old = raw
    raw = tl.maximum(raw, row_max(z))
    return raw, exps * tl.exp(old - finite_top(raw)) + tl.exp(z - finite_top(raw))


@triton.jit
def _lowest(z):
    """The smallest finite logit of each lane."""
    return tl.where(z == -float("inf"), float("inf"), z)


@triton.jit
def measure(
    s_row, t_row, live, at, ratio, inv_s, inv_t,
    KD: tl.constexpr, TARGET: tl.constexpr, SAME: tl.constexpr, FIRST: tl.constexpr,
    LAST: tl.constexpr, T_FIRST: tl.constexpr, T_LAST: tl.constexpr, ACC: tl.constexpr,
    CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The first tile; maxima, sums of exponentials, and the sum of their differences.

    Then maxima and sums at temperature 1 over all classes, and the lowest finite logits; what
    a launch does not use the compiler drops. A later tile moves the centres; the difference of the
    two rows' moves is formed first here too.
    """
    s, t = load_both(s_row, t_row, 0, live, KD, T_FIRST, T_LAST, ACC, CLASSES, TILE)
    seen_s, seen_t = visible(s, t, 0, at, ratio, TARGET, FIRST, LAST, CLASSES, TILE)
    raw_s, raw_t, all_s, all_t = row_max(seen_s), row_max(seen_t), row_max(s), row_max(t)
    top_s, top_t = finite_top(raw_s), finite_top(raw_t)
    us, ut, dz = centred(seen_s, seen_t, top_s, top_t, inv_s, inv_t, SAME)
    es, et = tl.exp(us), tl.exp(ut)
    changes = exp_change(es, et, dz)
    plain_s, plain_t = tl.exp(s - finite_top(all_s)), tl.exp(t - finite_top(all_t))
    low_s, low_t = _lowest(seen_s), _lowest(seen_t)
    for start in tl.range(TILE, CLASSES, TILE, num_stages=STAGES):
        s_tile, t_tile = load_both(
            s_row, t_row, start, live, KD, T_FIRST, T_LAST, ACC, CLASSES, TILE
        )  # fmt: skip
        all_s, plain_s = _grow(all_s, plain_s, s_tile)
        all_t, plain_t = _grow(all_t, plain_t, t_tile)
        s_tile, t_tile = visible(
            s_tile, t_tile, start, at, ratio, TARGET, FIRST, LAST, CLASSES, TILE
        )  # fmt: skip
        low_s, low_t = tl.minimum(low_s, _lowest(s_tile)), tl.minimum(low_t, _lowest(t_tile))
        old_s, old_t, centre = raw_s, raw_t, raw_t - raw_s
        raw_s, raw_t = tl.maximum(raw_s, row_max(s_tile)), tl.maximum(raw_t, row_max(t_tile))
        top_s, top_t = finite_top(raw_s), finite_top(raw_t)
        move_s, move_t = (old_s - top_s) * inv_s, (old_t - top_t) * inv_t
        fs, ft = tl.exp(move_s), tl.exp(move_t)
        move = (centre - (top_t - top_s)) * inv_s if SAME else move_t - move_s
        step = exp_change(fs, ft, move)
        us, ut, dz = centred(s_tile, t_tile, top_s, top_t, inv_s, inv_t, SAME)
        tile_s, tile_t = tl.exp(us), tl.exp(ut)
        changes = changes * ft + es * step + exp_change(tile_s, tile_t, dz)
        es, et = es * fs + tile_s, et * ft + tile_t
    return (
        s, t, top_s, top_t, row_sum(es), row_sum(et), row_sum(changes),
        finite_top(all_s), row_sum(plain_s), finite_top(all_t), row_sum(plain_t),
        tl.min(low_s, axis=1, keep_dims=True), tl.min(low_t, axis=1, keep_dims=True),
    )  # fmt: skip


@triton.jit
def half_boost(
    kd, ce, own_weight, shift_s, shift_t, scale, inv_s, inv_t, range_s, range_t,
    BOUNDED: tl.constexpr, STANDARDIZE: tl.constexpr,
):  # fmt: skip
    """What a row's fp16 gradients are multiplied by: less than usual where that might overflow."""
    # Of a class's log-ratio, by which its gradient is bounded; infinite, it leaves no gradient.
    spread = tl.maximum(tl.maximum(range_s * inv_s, range_t * inv_t), 0.0)
    spread = 1.0 if BOUNDED else 1 + tl.where(spread < 1e5, spread, 1e5)
    through_std: tl.constexpr = 2 if STANDARDIZE else 1
    share = tl.abs(kd) + through_std * tl.maximum(tl.abs(shift_s), tl.abs(shift_t))
    largest = share * through_std * scale * tl.maximum(inv_s, inv_t) * spread
    return tl.minimum(HALF_BOOST, 32768 / (largest + tl.abs(ce) + tl.abs(own_weight)))
