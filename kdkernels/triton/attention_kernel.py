# SPDX-License-Identifier: Apache-2.0
"""The kernels of the attention family: classes attend to classes, and the gradients.

Scores are formed from a K x K matrix per head and rank-one terms (see ``csrc/kd/attention.h``),
used in registers and never stored: eager moves several N x K x K maps, about 12 of them forward and
backward, these kernels the matrix once per block of samples, which L2 serves, and N x K numbers.
Sums run in the order of the samples and classes; no atomics.

    forward       a block of classes in a few samples, over all classes as keys: online softmax
    coefficients  a tile of the K x K matrix, over all samples (or a share of them): its gradient,
                  and its part of the gradients to the rank-one terms
    teacher       a block of classes in one sample, over all others in both roles; only for
                  a teacher, or a temperature, that requires a gradient
"""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.layout import row_start


@triton.jit
def _soft(ptr, mask, inv_tau, ACC: tl.constexpr):
    """Softened logits, 0 where a class takes no part; and where it does."""
    z = tl.load(ptr, mask=mask, other=-float("inf")).to(ACC)
    on = z != -float("inf")
    return tl.where(on, z * inv_tau, 0.0), on


@triton.jit
def _taus(temperatures, temperature, sample, SCALAR: tl.constexpr, ACC: tl.constexpr):
    tau = tl.full((1, 1), temperature, ACC)
    if temperatures is not None:
        tau = tl.load(temperatures + (sample * 0 if SCALAR else sample))
    return tau


@triton.jit(do_not_specialize=["rows", "inner", "outer_stride", "inner_stride"])
def forward_kernel(
    teacher,  # (N, CLASSES)
    scores,  # (HEADS, CLASSES + 1, CLASSES + 1)
    values,  # (HEADS, CLASSES + 1)
    temperatures,  # (1,) or (N,), or None
    out,  # (N, CLASSES)
    stats,  # (4, HEADS, N, CLASSES) or None
    rows, inner, outer_stride, inner_stride, temperature,
    RESIDUAL: tl.constexpr, SCALAR: tl.constexpr, HEADS: tl.constexpr, ACC: tl.constexpr,
    CLASSES: tl.constexpr, UNIT: tl.constexpr, SAMPLES: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs take the same rows of the matrix.
    sample = (tl.program_id(0) * SAMPLES + tl.arange(0, SAMPLES))[:, None, None]
    i = (tl.program_id(1) * QUERIES + tl.arange(0, QUERIES))[None, :, None]
    inside = sample < rows
    mask = inside & (i < CLASSES)
    width: tl.constexpr = CLASSES + 1
    known = tl.minimum(sample, rows - 1)  # which has a temperature
    tau = _taus(temperatures, temperature, known, SCALAR, ACC)
    row = teacher + row_start(sample, inner, outer_stride, inner_stride, UNIT)
    s_i, on_i = _soft(row + i, mask, 1 / tau, ACC)
    attended = tl.zeros((SAMPLES, QUERIES, 1), ACC)
    at = sample.to(tl.int64) * CLASSES + i
    plane = rows.to(tl.int64) * CLASSES
    for head in range(HEADS):
        matrix = scores + head * width * width
        value = values + head * width
        by_logit = tl.load(value + CLASSES)
        c_i = tl.load(matrix + i * width + CLASSES, mask=i < CLASSES, other=0.0)
        slope = tl.load(matrix + CLASSES * width + CLASSES) * s_i + c_i
        top = tl.full((SAMPLES, QUERIES, 1), -float("inf"), ACC)
        total = tl.zeros((SAMPLES, QUERIES, 1), ACC)
        mean_s = tl.zeros((SAMPLES, QUERIES, 1), ACC)
        mean_v = tl.zeros((SAMPLES, QUERIES, 1), ACC)
        for start in range(0, CLASSES, KEYS):
            j = (start + tl.arange(0, KEYS))[None, None, :]
            s_j, on_j = _soft(row + j, inside & (j < CLASSES), 1 / tau, ACC)
            b_j = tl.load(matrix + CLASSES * width + j, mask=j < CLASSES, other=0.0)
            v_j = tl.load(value + j, mask=j < CLASSES, other=0.0)
            pairs = tl.load(matrix + i * width + j, mask=(i < CLASSES) & (j < CLASSES), other=0.0)
            score = tl.where(on_j, pairs + s_j * slope + b_j * s_i, -float("inf"))
            old = top
            top = tl.maximum(top, tl.max(score, axis=2, keep_dims=True))
            shift = tl.where(top == -float("inf"), 0.0, top)
            e, fade = tl.exp(score - shift), tl.exp(old - shift)
            total = total * fade + tl.sum(e, axis=2, keep_dims=True)
            mean_s = mean_s * fade + tl.sum(e * s_j, axis=2, keep_dims=True)
            mean_v = mean_v * fade + tl.sum(e * v_j, axis=2, keep_dims=True)
        total = tl.where(total == 0, 1.0, total)  # no class takes part, or there is no such row
        mean_s, mean_v = mean_s / total, mean_v / total
        attended += by_logit * mean_s + mean_v
        if stats is not None:
            stat = stats + head * plane + at
            step = HEADS * plane
            tl.store(stat, top, mask=mask)
            tl.store(stat + step, total, mask=mask)
            tl.store(stat + 2 * step, mean_s, mask=mask)
            tl.store(stat + 3 * step, mean_v, mask=mask)
    result = tau * attended
    if RESIDUAL:
        result += tl.load(row + i, mask=mask, other=0.0).to(ACC)
    tl.store(out + at, tl.where(on_i, result, -float("inf")), mask=mask)


@triton.jit
def _saved(upstream, stats, plane, at, mask, on, step, tau, by_logit):
    """Of queries: shift, upstream over the sum of exponentials, and the softmax's mean value."""
    stat = stats + plane + at
    shift = tl.load(stat, mask=mask, other=0.0)
    total = tl.load(stat + step, mask=mask, other=1.0)
    mean_s = tl.load(stat + 2 * step, mask=mask, other=0.0)
    mean_v = tl.load(stat + 3 * step, mask=mask, other=0.0)
    weight = tl.load(upstream + at, mask=mask, other=0.0) * tau / total
    # A class that is off has no result to pass a gradient on from.
    return tl.where(on, shift, 0.0), tl.where(on, weight, 0.0), by_logit * mean_s + mean_v


@triton.jit(do_not_specialize=["rows", "share", "inner", "outer_stride", "inner_stride"])
def coefficients_kernel(
    upstream,  # (N, CLASSES)
    teacher,  # (N, CLASSES)
    scores,  # (HEADS, CLASSES + 1, CLASSES + 1)
    values,  # (HEADS, CLASSES + 1)
    stats,  # (4, HEADS, N, CLASSES)
    temperatures,
    grad_scores,  # (SHARES, HEADS, CLASSES + 1, CLASSES + 1): the first CLASSES of either
    by_query,  # (SHARES, HEADS, column tiles, CLASSES)
    by_key,  # (SHARES, HEADS, row tiles, CLASSES)
    by_both,  # (SHARES, HEADS, row tiles, column tiles)
    by_value,  # (SHARES, HEADS, row tiles, CLASSES)
    rows, share, inner, outer_stride, inner_stride, temperature,
    SCALAR: tl.constexpr, HEADS: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr,
    UNIT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    which = tl.program_id(2).to(tl.int64)  # share * HEADS + head
    head = which % HEADS
    i = (row_tile * QUERIES + tl.arange(0, QUERIES))[:, None]
    j = (column_tile * KEYS + tl.arange(0, KEYS))[None, :]
    width: tl.constexpr = CLASSES + 1
    matrix = scores + head * width * width
    value = values + head * width
    pairs = tl.load(matrix + i * width + j, mask=(i < CLASSES) & (j < CLASSES), other=0.0)
    a = tl.load(matrix + CLASSES * width + CLASSES)
    b_j = tl.load(matrix + CLASSES * width + j, mask=j < CLASSES, other=0.0)
    c_i = tl.load(matrix + i * width + CLASSES, mask=i < CLASSES, other=0.0)
    by_logit = tl.load(value + CLASSES)
    v_j = tl.load(value + j, mask=j < CLASSES, other=0.0)
    plane = rows.to(tl.int64) * CLASSES

    to_pairs = tl.zeros((QUERIES, KEYS), ACC)
    to_query = tl.zeros((QUERIES, KEYS), ACC)
    to_key = tl.zeros((QUERIES, KEYS), ACC)
    to_both = tl.zeros((QUERIES, KEYS), ACC)
    to_value = tl.zeros((QUERIES, KEYS), ACC)
    first = (which // HEADS).to(tl.int32) * share
    for sample in range(first, tl.minimum(first + share, rows)):
        here = tl.full((1, 1), 0, tl.int32) + sample
        tau = _taus(temperatures, temperature, here, SCALAR, ACC)
        row = teacher + row_start(here, inner, outer_stride, inner_stride, UNIT)
        s_i, on_i = _soft(row + i, i < CLASSES, 1 / tau, ACC)
        s_j, on_j = _soft(row + j, j < CLASSES, 1 / tau, ACC)
        shift, weight, centre = _saved(
            upstream, stats, head * plane, here.to(tl.int64) * CLASSES + i, i < CLASSES, on_i,
            HEADS * plane, tau, by_logit,
        )  # fmt: skip
        score = pairs + s_j * (a * s_i + c_i) + b_j * s_i
        p = tl.where(on_j, tl.exp(score - shift), 0.0) * weight
        grad = p * (by_logit * s_j + v_j - centre)
        to_pairs += grad
        to_value += p
        to_key += grad * s_i
        grad *= s_j
        to_query += grad
        to_both += grad * s_i

    at = grad_scores + which * width * width + i * width + j
    tl.store(at, to_pairs, mask=(i < CLASSES) & (j < CLASSES))
    at = (which * tl.num_programs(1) + column_tile) * CLASSES + i
    tl.store(by_query + at, tl.sum(to_query, axis=1, keep_dims=True), mask=i < CLASSES)
    at = (which * tl.num_programs(0) + row_tile) * CLASSES + j
    tl.store(by_key + at, tl.sum(to_key, axis=0, keep_dims=True), mask=j < CLASSES)
    tl.store(by_value + at, tl.sum(to_value, axis=0, keep_dims=True), mask=j < CLASSES)
    at = (which * tl.num_programs(0) + row_tile) * tl.num_programs(1) + column_tile
    tl.store(by_both + at, tl.sum(tl.sum(to_both, axis=1), axis=0))


@triton.jit(do_not_specialize=["rows", "inner", "outer_stride", "inner_stride"])
def teacher_kernel(
    upstream,  # (N, CLASSES)
    teacher,  # (N, CLASSES)
    scores,  # (HEADS, CLASSES + 1, CLASSES + 1)
    values,  # (HEADS, CLASSES + 1)
    stats,  # (4, HEADS, N, CLASSES)
    temperatures,
    grad,  # (N, CLASSES): to the softened logits
    rows, inner, outer_stride, inner_stride, temperature,
    SCALAR: tl.constexpr, HEADS: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr,
    UNIT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    # The block's classes lie along the columns as keys, and along the rows as queries.
    key = (tl.program_id(1) * KEYS + tl.arange(0, KEYS))[None, :]
    query = (tl.program_id(1) * KEYS + tl.arange(0, KEYS))[:, None]
    width: tl.constexpr = CLASSES + 1
    row = teacher + row_start(sample, inner, outer_stride, inner_stride, UNIT)
    base = sample.to(tl.int64) * CLASSES
    plane = rows.to(tl.int64) * CLASSES
    here = tl.full((1, 1), 0, tl.int32) + sample
    tau = _taus(temperatures, temperature, here, SCALAR, ACC)
    s_k, on_k = _soft(row + key, key < CLASSES, 1 / tau, ACC)
    s_q, on_q = _soft(row + query, query < CLASSES, 1 / tau, ACC)
    as_key = tl.zeros((KEYS,), ACC)
    as_query = tl.zeros((KEYS,), ACC)
    for head in range(HEADS):
        matrix = scores + head * width * width
        value = values + head * width
        a = tl.load(matrix + CLASSES * width + CLASSES)
        by_logit = tl.load(value + CLASSES)
        b_k = tl.load(matrix + CLASSES * width + key, mask=key < CLASSES, other=0.0)
        v_k = tl.load(value + key, mask=key < CLASSES, other=0.0)
        c_q = tl.load(matrix + query * width + CLASSES, mask=query < CLASSES, other=0.0)
        shift_q, weight_q, centre_q = _saved(
            upstream, stats, head * plane, base + query, query < CLASSES, on_q, HEADS * plane,
            tau, by_logit,
        )  # fmt: skip
        for start in range(0, CLASSES, QUERIES):
            i = (start + tl.arange(0, QUERIES))[:, None]
            s_i, on_i = _soft(row + i, i < CLASSES, 1 / tau, ACC)
            c_i = tl.load(matrix + i * width + CLASSES, mask=i < CLASSES, other=0.0)
            shift, weight, centre = _saved(
                upstream, stats, head * plane, base + i, i < CLASSES, on_i, HEADS * plane, tau,
                by_logit,
            )  # fmt: skip
            valid = (i < CLASSES) & (key < CLASSES)
            pairs = tl.load(matrix + i * width + key, mask=valid, other=0.0)
            slope = a * s_i + c_i
            p = tl.where(on_k, tl.exp(pairs + s_k * slope + b_k * s_i - shift), 0.0) * weight
            to_score = p * (by_logit * s_k + v_k - centre)
            as_key += tl.sum(to_score * slope + p * by_logit, axis=0)

            j = (start + tl.arange(0, QUERIES))[None, :]
            s_j, on_j = _soft(row + j, j < CLASSES, 1 / tau, ACC)
            b_j = tl.load(matrix + CLASSES * width + j, mask=j < CLASSES, other=0.0)
            v_j = tl.load(value + j, mask=j < CLASSES, other=0.0)
            valid = (query < CLASSES) & (j < CLASSES)
            pairs = tl.load(matrix + query * width + j, mask=valid, other=0.0)
            score = pairs + s_j * (a * s_q + c_q) + b_j * s_q
            p = tl.where(on_j, tl.exp(score - shift_q), 0.0) * weight_q
            to_score = p * (by_logit * s_j + v_j - centre_q)
            as_query += tl.sum(to_score * (a * s_j + b_j), axis=1)
    k = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    tl.store(grad + base + k, as_key + as_query, mask=k < CLASSES)
