# SPDX-License-Identifier: Apache-2.0
"""Cross-entropies with labels, at temperature 1 over all classes."""

from __future__ import annotations

import triton
import triton.language as tl

from kdkernels.triton.sweep import load, store


@triton.jit
def label_probabilities(
    labels, label, start, live, smoothing,
    PROBABILITIES: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Smoothed target probabilities, 0 beyond the row; NaN for a label that is no class."""
    column = start + tl.arange(0, TILE)[None, :]
    if PROBABILITIES:
        target = load(labels, start, live, 0.0, ACC, CLASSES, TILE)
    else:
        others = tl.where((label >= 0) & (label < CLASSES), 0.0, float("nan"))
        target = tl.where(column == label, 1.0, others)
    target = (1 - smoothing) * target + smoothing / CLASSES
    return tl.where(column < CLASSES, target, 0.0)


@triton.jit
def store_student(
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
    store(ptr, start, tl.where(live, grad, 0.0), inside, CLASSES, TILE)


@triton.jit
def with_target(target, start, at, ce_factor, own_factor, CE: tl.constexpr, TILE: tl.constexpr):
    """Of two cross-entropies, what is subtracted from p: the labels' part and the target's own."""
    own = tl.where(start + tl.arange(0, TILE)[None, :] == at, own_factor, 0.0)
    return target * ce_factor + own if CE else own
