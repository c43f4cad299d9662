# SPDX-License-Identifier: Apache-2.0
"""What kernels that sweep over rows of logits are made of.

Rows are (ROWS, 1), tiles (ROWS, TILE). Classes beyond the row's end are read as -inf, which is also
what a class that takes no part looks like.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.ops import rowwise as ops
from kdkernels.triton.math import expm1_minus

# Tiles in flight in a sweep: the next two are copied to shared memory while one is worked on.
STAGES = tl.constexpr(3)
HALF_BOOST = tl.constexpr(ops.HALF_BOOST)


@triton.jit
def load(
    ptr, start, live, other,
    ACC: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr, FIRST: tl.constexpr = 0,
):  # fmt: skip
    """Those of classes [start, start + TILE) that are in [FIRST, CLASSES)."""
    column = start + tl.arange(0, TILE)[None, :]
    mask = live & (column < CLASSES)
    if FIRST > 0:
        mask &= column >= FIRST
    return tl.load(ptr + column, mask=mask, other=other).to(ACC)


@triton.jit
def store(
    ptr, start, value, inside,
    CLASSES: tl.constexpr, TILE: tl.constexpr, FIRST: tl.constexpr = 0,
):  # fmt: skip
    column = start + tl.arange(0, TILE)[None, :]
    mask = inside & (column < CLASSES)
    if FIRST > 0:
        mask &= column >= FIRST
    tl.store(ptr + column, value, mask=mask)


@triton.jit
def row_max(x):
    return tl.max(x, axis=1, keep_dims=True)


@triton.jit
def row_sum(x):
    return tl.sum(x, axis=1, keep_dims=True)


@triton.jit
def half_scale(bound):
    """A power of two that brings numbers up to ``bound`` to where fp16 holds them best."""
    exponent = tl.floor(15.0 - tl.log2(tl.where(bound > 1e-15, bound, 1.0)))
    return tl.exp2(tl.where(exponent < -60.0, -60.0, exponent))


@triton.jit
def finite_top(top):
    """A maximum fit to be subtracted: 0 as long as the row has shown no finite class."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def centred(s, t, top_s, top_t, inv_s, inv_t, SAME: tl.constexpr):
    """Both rows about their maxima, over their temperatures, and the difference."""
    us, ut = (s - top_s) * inv_s, (t - top_t) * inv_t
    # The difference of the logits first: exact where student and teacher are close.
    dz = ((t - s) - (top_t - top_s)) * inv_s if SAME else ut - us
    off = (s == -float("inf")) & (t == -float("inf"))
    return us, ut, tl.where(off, 0.0, dz)


@triton.jit
def exp_change(exp_s, exp_t, x):
    """``exp_t - exp_s``, without cancellation, of which ``x`` is the log-ratio."""
    near = tl.abs(x) < 0.5
    x = tl.where(near, x, 0.0)
    return tl.where(near, exp_s * (x + expm1_minus(x)), exp_t - exp_s)
