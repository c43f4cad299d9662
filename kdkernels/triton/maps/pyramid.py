# SPDX-License-Identifier: Apache-2.0
"""``pyramid_triton``: mean squares of a difference of maps and of its average poolings.

A program takes some channels of a sample, all their positions: it sums the difference over every
bin of every level, then reads its maps again, from cache, and writes the gradient, to which each
bin adds its part. Both maps are read once from memory and the gradient written once, 12 bytes an
element in fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import ops
from kdkernels.ops.features import compute_dtype, gradient_like
from kdkernels.triton import scale  # noqa: F401  (registers scale_rows_)
from kdkernels.triton.maps.spatial_attention import tile_offsets

TILE = 2048  # elements
CHANNELS = 32  # of channels-last maps, for coalesced reads


@triton.jit
def in_bin(position, k, height, width, LEVEL: tl.constexpr):
    """Which positions bin k of LEVEL x LEVEL adaptive bins takes, and how many they are."""
    i = k // LEVEL
    j = k % LEVEL
    top = i * height // LEVEL
    bottom = ((i + 1) * height + LEVEL - 1) // LEVEL
    left = j * width // LEVEL
    right = ((j + 1) * width + LEVEL - 1) // LEVEL
    y = position // width
    x = position % width
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return inside, (bottom - top) * (right - left)


@triton.jit
def pyramid_kernel(
    student, teacher,  # (B, C, H, W)
    grad_student, grad_teacher,  # like these, or None
    losses,  # (programs,)
    channels, height, width, factor: tl.float64,
    LEVELS: tl.constexpr, WEIGHTS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr,
    TC: tl.constexpr, TP: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    channel = tl.program_id(1) * TC + tl.arange(0, TC)
    positions = height * width
    bins = tl.arange(0, BINS)
    sums = tl.zeros((TC, BINS), ACC)
    squares = tl.zeros((TC, TP), ACC)
    for first in range(0, positions, TP):
        position = first + tl.arange(0, TP)
        offsets, inside = tile_offsets(
            sample, channels, positions, channel, position, CHANNELS_LAST
        )
        s = tl.load(student + offsets, mask=inside, other=0).to(ACC)
        t = tl.load(teacher + offsets, mask=inside, other=0).to(ACC)
        d = s - t
        squares += d * d
        start = 0
        for n in tl.static_range(len(LEVELS)):
            for k in range(LEVELS[n] * LEVELS[n]):
                taken, area = in_bin(position, k, height, width, LEVELS[n])
                part = tl.sum(tl.where(taken[None, :], d, 0.0), 1) / area
                sums += tl.where(bins[None, :] == start + k, part[:, None], 0.0)
            start += LEVELS[n] * LEVELS[n]
    loss = tl.full((), WEIGHTS[0], ACC) * tl.sum(squares)
    start = 0
    for n in tl.static_range(len(LEVELS)):
        of_level = (bins >= start) & (bins < start + LEVELS[n] * LEVELS[n])
        weight = tl.full((), WEIGHTS[n + 1], ACC) * positions / (LEVELS[n] * LEVELS[n])
        loss += weight * tl.sum(tl.where(of_level[None, :], sums * sums, 0.0))
        start += LEVELS[n] * LEVELS[n]
    tl.store(losses + sample * tl.num_programs(1) + tl.program_id(1), loss)
    if grad_student is not None or grad_teacher is not None:
        for first in range(0, positions, TP):
            position = first + tl.arange(0, TP)
            offsets, inside = tile_offsets(
                sample, channels, positions, channel, position, CHANNELS_LAST
            )
            s = tl.load(student + offsets, mask=inside, other=0).to(ACC)
            t = tl.load(teacher + offsets, mask=inside, other=0).to(ACC)
            value = (s - t) * tl.full((), 2 * WEIGHTS[0], ACC)
            start = 0
            for n in tl.static_range(len(LEVELS)):
                weight = tl.full((), 2 * WEIGHTS[n + 1], ACC) * positions / (LEVELS[n] * LEVELS[n])
                for k in range(LEVELS[n] * LEVELS[n]):
                    taken, area = in_bin(position, k, height, width, LEVELS[n])
                    mean = tl.sum(tl.where(bins[None, :] == start + k, sums, 0.0), 1)
                    part = (mean * weight / area)[:, None]
                    value += tl.where(taken[None, :], part, 0.0)
                start += LEVELS[n] * LEVELS[n]
            value *= tl.full((), factor, ACC)
            if grad_student is not None:
                tl.store(grad_student + offsets, value, mask=inside)
            if grad_teacher is not None:
                tl.store(grad_teacher + offsets, -value, mask=inside)


def arguments(
    student: Tensor, teacher: Tensor, factor: float, weights, levels, grads: int
) -> dict:  # fmt: skip
    """Everything a launch takes but the grid, (B, blocks of channels)."""
    samples, channels, height, width = student.shape
    dtype = compute_dtype(student, teacher)
    last = not student.is_contiguous()
    tile = TILE // (2 if dtype == torch.float64 else 1)
    tile_positions = min(triton.next_power_of_2(height * width), tile // CHANNELS if last else tile)
    tile_channels = min(triton.next_power_of_2(channels), tile // tile_positions)
    bins = sum(level * level for level in levels)
    return {
        "student": student,
        "teacher": teacher,
        "grad_student": gradient_like(student) if grads & 1 else None,
        "grad_teacher": gradient_like(teacher) if grads & 2 else None,
        "losses": student.new_empty((samples, triton.cdiv(channels, tile_channels)), dtype=dtype),
        "channels": channels,
        "height": height,
        "width": width,
        "factor": factor,
        "LEVELS": tuple(levels),
        "WEIGHTS": tuple(weights),
        "CHANNELS_LAST": last,
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "TC": tile_channels,
        "TP": tile_positions,
        "BINS": triton.next_power_of_2(max(bins, 1)),
        "num_warps": 8,
    }


def _pyramid(student, teacher, factor, weights, levels, grads):
    with torch.cuda.device_of(student):
        launch = arguments(student, teacher, factor, weights, levels, grads)
        if launch["losses"].numel():
            pyramid_kernel[tuple(launch["losses"].shape)](**launch)
    gradients = (launch["grad_student"], launch["grad_teacher"])
    return launch["losses"].sum() * factor, *(
        student.new_empty(0) if g is None else g for g in gradients
    )


for _key in ("CUDA", "CPU") if ops.triton_interpreted() else ("CUDA",):
    torch.library.impl("kdkernels::pyramid_triton", _key, _pyramid)
