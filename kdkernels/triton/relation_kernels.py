# SPDX-License-Identifier: Apache-2.0
"""The relation family's kernels: between Gram matrices and the matrices that give gradients.

RKD's angles are computed in registers from two B x B matrices in fp64, twice: once for what belongs
to a pair of samples, once for the sum over vertices; nothing of size B^3 is stored and no sum
depends on an order. Of a Gram matrix the other kernels take a row a program: read twice, written
once. Algebra and names are those of csrc/kd/cpu/relation.

Shapes below: columns (1, TILE), rows (ROWS, 1).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.math import log1p


@triton.jit
def _clamp(x):
    # Comparisons, which let NaN through.
    x = tl.where(x < -1.0, -1.0, x)
    return tl.where(x > 1.0, 1.0, x)


@triton.jit
def _angle(gram, inverse, i, j, k, at_j, at_k, SIZE):
    """``u_ij . u_ik`` of tiles of j and k, and ``1 / d_ij``, ``1 / d_ik``."""
    own = tl.load(gram + i * SIZE + i)
    g_ij = tl.load(gram + i * SIZE + j, mask=at_j, other=0.0)
    g_ik = tl.load(gram + i * SIZE + k, mask=at_k, other=0.0)
    g_jk = tl.load(gram + j * SIZE + k, mask=at_j & at_k, other=0.0)
    r_ij = tl.load(inverse + i * SIZE + j, mask=at_j, other=0.0)
    r_ik = tl.load(inverse + i * SIZE + k, mask=at_k, other=0.0)
    return ((g_jk - g_ik) + (own - g_ij)) * r_ik * r_ij, r_ij, r_ik


@triton.jit(do_not_specialize=["rows"])
def rkd_turns_kernel(
    gram, inverse, other_gram, other_inverse,  # (rows, rows) fp64, as all here
    turns,  # (rows, rows): t_ij
    loss,  # (rows, rows): of the triples (i, j, .)
    rows, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    size = rows.to(tl.int64)
    j = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    at_j = j < size
    total, turn, near = (
        tl.zeros((ROWS, 1), tl.float64), tl.zeros((ROWS, 1), tl.float64),
        tl.zeros((ROWS, 1), tl.float64),
    )  # fmt: skip
    r = tl.load(inverse + i * size + j, mask=at_j, other=0.0)
    for start in range(0, rows, TILE):
        k = (start + tl.arange(0, TILE))[None, :].to(tl.int64)
        at_k = k < size
        angle, _, r_ik = _angle(gram, inverse, i, j, k, at_j, at_k, size)
        other, _, _ = _angle(other_gram, other_inverse, i, j, k, at_j, at_k, size)
        x = angle - other
        c = _clamp(x)
        total += tl.sum(c * (x - 0.5 * c), axis=1, keep_dims=True)
        turn += tl.sum(c * angle, axis=1, keep_dims=True)
        near += tl.sum(c * r_ik, axis=1, keep_dims=True)
    tl.store(turns + i * size + j, 2.0 * r * (turn * r - near), mask=at_j)
    tl.store(loss + i * size + j, total, mask=at_j)


@triton.jit(do_not_specialize=["rows"])
def rkd_edges_kernel(
    gram, inverse, other_gram, other_inverse, turns,  # (rows, rows)
    edges,  # (rows, rows): w_jk, j != k
    rows, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    size = rows.to(tl.int64)
    j = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    k = (tl.program_id(1) * TILE + tl.arange(0, TILE))[None, :].to(tl.int64)
    at_j, at_k = j < size, k < size
    sums = tl.zeros((ROWS, TILE), tl.float64)
    for vertex in range(0, rows):
        i = size * 0 + vertex
        angle, r_ij, r_ik = _angle(gram, inverse, i, j, k, at_j, at_k, size)
        other, _, _ = _angle(other_gram, other_inverse, i, j, k, at_j, at_k, size)
        sums += _clamp(angle - other) * r_ij * r_ik
    inside = at_j & at_k
    sums = 2.0 * sums + tl.load(turns + j * size + k, mask=inside, other=0.0)
    sums += tl.load(turns + k * size + j, mask=inside, other=0.0)
    tl.store(edges + j * size + k, tl.where(j == k, 0.0, sums), mask=inside)


@triton.jit
def _similarity(gram, scales, i, k, at_k, SIZE):
    """(x_i . x_k m_i m_k + 1) / 2, 0 beyond the rows."""
    g = tl.load(gram + i * SIZE + k, mask=at_k, other=0.0)
    cosine = g * tl.load(scales + i) * tl.load(scales + k, mask=at_k, other=0.0)
    return tl.where(at_k, 0.5 * (cosine + 1.0), 0.0), g


@triton.jit
def _pkt_slope(s, t, eps, SIDE: tl.constexpr):
    if SIDE == 0:
        return -t / (s + eps)
    return log1p((t - s) / (s + eps)) + t / (t + eps)


@triton.jit(do_not_specialize=["rows"])
def pkt_rows_kernel(
    gram_s, gram_t,  # (rows, rows) fp64, as all here
    scale_s, scale_t,  # (rows,): m
    stats,  # (4, rows): one over the rows' sums of either side, slopes of either side
    loss,  # (rows,)
    rows, eps: tl.float64, TILE: tl.constexpr,
):  # fmt: skip
    i, size = tl.program_id(0).to(tl.int64), rows.to(tl.int64)
    sum_s, sum_t = tl.zeros((1, TILE), tl.float64), tl.zeros((1, TILE), tl.float64)
    for start in range(0, rows, TILE):
        k = (start + tl.arange(0, TILE))[None, :].to(tl.int64)
        s, _ = _similarity(gram_s, scale_s, i, k, k < size, size)
        t, _ = _similarity(gram_t, scale_t, i, k, k < size, size)
        sum_s, sum_t = sum_s + s, sum_t + t
    of_s, of_t = 1.0 / tl.sum(sum_s), 1.0 / tl.sum(sum_t)
    total = tl.zeros((1, TILE), tl.float64)
    slope_s, slope_t = tl.zeros((1, TILE), tl.float64), tl.zeros((1, TILE), tl.float64)
    for start in range(0, rows, TILE):
        k = (start + tl.arange(0, TILE))[None, :].to(tl.int64)
        s, _ = _similarity(gram_s, scale_s, i, k, k < size, size)
        t, _ = _similarity(gram_t, scale_t, i, k, k < size, size)
        s, t = s * of_s, t * of_t
        total += t * log1p((t - s) / (s + eps))
        slope_s += _pkt_slope(s, t, eps, 0) * s
        slope_t += _pkt_slope(s, t, eps, 1) * t
    tl.store(loss + i, tl.sum(total))
    tl.store(stats + i, of_s)
    tl.store(stats + size + i, of_t)
    tl.store(stats + 2 * size + i, tl.sum(slope_s))
    tl.store(stats + 3 * size + i, tl.sum(slope_t))


@triton.jit(do_not_specialize=["rows"])
def pkt_edges_kernel(
    gram_s, gram_t, scale_s, scale_t, stats,  # as above
    edges,  # (rows, rows)
    taken,  # (rows,): what the norm's derivative takes off the diagonal
    rows, eps: tl.float64, SIDE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    i, size = tl.program_id(0).to(tl.int64), rows.to(tl.int64)
    scales = scale_t if SIDE else scale_s
    m = tl.load(scales + i)
    s_i, t_i = tl.load(stats + i), tl.load(stats + size + i)
    total_i = tl.load(stats + (2 + SIDE) * size + i)
    along = tl.zeros((1, TILE), tl.float64)
    for start in range(0, rows, TILE):
        k = (start + tl.arange(0, TILE))[None, :].to(tl.int64)
        at_k = k < size
        s, of_s = _similarity(gram_s, scale_s, i, k, at_k, size)
        t, of_t = _similarity(gram_t, scale_t, i, k, at_k, size)
        s_k = tl.load(stats + k, mask=at_k, other=0.0)
        t_k = tl.load(stats + size + k, mask=at_k, other=0.0)
        total_k = tl.load(stats + (2 + SIDE) * size + k, mask=at_k, other=0.0)
        # Of entry (i, k), and of (k, i), whose similarities are the same.
        row = (_pkt_slope(s * s_i, t * t_i, eps, SIDE) - total_i) * (t_i if SIDE else s_i)
        column = (_pkt_slope(s * s_k, t * t_k, eps, SIDE) - total_k) * (t_k if SIDE else s_k)
        e = 0.5 * m * (row + column) * tl.load(scales + k, mask=at_k, other=0.0)
        e = tl.where(at_k, e, 0.0)
        along += e * (of_t if SIDE else of_s)
        tl.store(edges + i * size + k, e, mask=at_k)
    gram = gram_t if SIDE else gram_s
    length = tl.sqrt(tl.load(gram + i * size + i))
    tl.store(taken + i, tl.where(length > 0, m * tl.sum(along) / length, 0.0))
