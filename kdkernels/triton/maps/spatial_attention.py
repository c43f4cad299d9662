# SPDX-License-Identifier: Apache-2.0
"""``spatial_attention_triton``: a distance of normalised attention maps, and its gradients.

Three launches: the mean over channels of the powers (each map read once), the distance and the
gradient to these means, a number a position, and the gradients to the maps, for which each is read
again: 12 bytes an element in fp32 of the student, 4 of the teacher. A program takes a tile of
positions by channels, so that reads are coalesced in either layout.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import ops
from kdkernels.ops.features import compute_dtype, gradient_like
from kdkernels.triton import scale  # noqa: F401  (registers scale_rows_)

EPS = tl.constexpr(1e-12)
# (channels, positions) of a program, by whether channels are last.
TILES = {False: (8, 128), True: (64, 16)}
WIDTH = 1024  # positions that the comparison takes at a time


@triton.jit
def tile_offsets(
    sample, channels, positions, channel, position, CHANNELS_LAST: tl.constexpr
):  # fmt: skip
    """Offsets and bounds of a tile of (B, C, P)."""
    start = sample.to(tl.int64) * channels * positions
    inside = (channel < channels)[:, None] & (position < positions)[None, :]
    if CHANNELS_LAST:
        offsets = position[None, :] * channels + channel[:, None]
    else:
        offsets = channel[:, None] * positions + position[None, :]
    return start + offsets, inside


@triton.jit
def power_of(x, POWER: tl.constexpr):
    result = tl.full(x.shape, 1, x.dtype)
    for _ in tl.static_range(POWER):
        result *= x
    return result


@triton.jit
def mean_kernel(
    maps,  # (B, C, P)
    means,  # (B, P)
    channels, positions,
    POWER: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr,
    TC: tl.constexpr, TP: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    position = tl.program_id(1) * TP + tl.arange(0, TP)
    total = tl.zeros((TC, TP), ACC)
    for first in range(0, channels, TC):
        channel = first + tl.arange(0, TC)
        offsets, inside = tile_offsets(
            sample, channels, positions, channel, position, CHANNELS_LAST
        )
        total += power_of(tl.load(maps + offsets, mask=inside, other=0).to(ACC), POWER)
    mean = tl.sum(total, 0) / channels
    tl.store(means + sample * positions + position, mean, mask=position < positions)


@triton.jit
def compare_kernel(
    student, teacher,  # (B, P): means, overwritten by the gradients to them
    losses,  # (B,)
    positions, factor: tl.float64,
    DISTANCE: tl.constexpr, ACC: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    student += sample * positions
    teacher += sample * positions
    square_s = tl.zeros((WIDTH,), ACC)
    square_t = tl.zeros((WIDTH,), ACC)
    for first in range(0, positions, WIDTH):
        position = first + tl.arange(0, WIDTH)
        s = tl.load(student + position, mask=position < positions, other=0)
        t = tl.load(teacher + position, mask=position < positions, other=0)
        square_s += s * s
        square_t += t * t
    eps = tl.full((), EPS, ACC)
    norm_s = tl.sqrt(tl.sum(square_s))
    norm_t = tl.sqrt(tl.sum(square_t))
    inverse_s = tl.where(norm_s == 0, 0.0, 1 / tl.maximum(norm_s, eps))
    inverse_t = tl.where(norm_t == 0, 0.0, 1 / tl.maximum(norm_t, eps))
    loss = tl.zeros((WIDTH,), ACC)
    along_s = tl.zeros((WIDTH,), ACC)
    along_t = tl.zeros((WIDTH,), ACC)
    for first in range(0, positions, WIDTH):
        position = first + tl.arange(0, WIDTH)
        s = tl.load(student + position, mask=position < positions, other=0) * inverse_s
        t = tl.load(teacher + position, mask=position < positions, other=0) * inverse_t
        d = s - t
        if DISTANCE == 1:
            loss += tl.abs(d)
            d = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0)).to(ACC)
        else:
            loss += d * d
        along_s += d * s
        along_t += d * t
    value = tl.sum(loss)
    unit = tl.full((), factor, ACC)
    if DISTANCE == 0:
        unit *= 2
    if DISTANCE == 2:
        value = tl.sqrt(value)
        unit = tl.where(value > 0, unit / value, 0.0)
    tl.store(losses + sample, value)
    project_s = tl.where(norm_s > eps, tl.sum(along_s), 0.0)
    project_t = tl.where(norm_t > eps, tl.sum(along_t), 0.0)
    unit_s = unit * inverse_s
    unit_t = unit * inverse_t
    for first in range(0, positions, WIDTH):
        position = first + tl.arange(0, WIDTH)
        inside = position < positions
        s = tl.load(student + position, mask=inside, other=0) * inverse_s
        t = tl.load(teacher + position, mask=inside, other=0) * inverse_t
        d = s - t
        if DISTANCE == 1:
            d = tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0)).to(ACC)
        tl.store(student + position, unit_s * (d - project_s * s), mask=inside)
        tl.store(teacher + position, unit_t * (project_t * t - d), mask=inside)


@triton.jit
def emit_kernel(
    maps,  # (B, C, P)
    of_means,  # (B, P)
    grad,  # (B, C, P)
    channels, positions,
    POWER: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr,
    TC: tl.constexpr, TP: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    position = tl.program_id(1) * TP + tl.arange(0, TP)
    channel = tl.program_id(2) * TC + tl.arange(0, TC)
    offsets, inside = tile_offsets(sample, channels, positions, channel, position, CHANNELS_LAST)
    g = tl.load(of_means + sample * positions + position, mask=position < positions, other=0)
    x = tl.load(maps + offsets, mask=inside, other=0).to(ACC)
    value = power_of(x, POWER - 1) * (g * POWER / channels)[None, :]
    tl.store(grad + offsets, value, mask=inside)


def map_arguments(maps: Tensor, power: int, accumulator: torch.dtype) -> dict:
    """What launches over one side's maps (B, C, H, W) share."""
    last = not maps.is_contiguous()
    tile_channels, tile_positions = TILES[last]
    return {
        "maps": maps,
        "channels": maps.shape[1],
        "positions": maps.shape[2] * maps.shape[3],
        "POWER": power,
        "CHANNELS_LAST": last,
        "ACC": tl.float64 if accumulator == torch.float64 else tl.float32,
        "TC": tile_channels,
        "TP": tile_positions,
        "num_warps": 4,
    }


def compare_arguments(means: Tensor, factor: float, distance: int) -> dict:
    """Arguments of the comparison of ``means`` (2, B, P)."""
    return {
        "student": means[0],
        "teacher": means[1],
        "losses": means.new_empty(means.shape[1]),
        "positions": means.shape[2],
        "factor": factor,
        "DISTANCE": distance,
        "ACC": tl.float64 if means.dtype == torch.float64 else tl.float32,
        "WIDTH": WIDTH,
        "num_warps": 4,
    }


def _spatial_attention(student, teacher, factor, numbers, choices, grads):
    power, distance = choices
    dtype = compute_dtype(student, teacher)
    samples, _, height, width = student.shape
    positions = height * width
    sides = student, teacher
    means = student.new_empty((2, samples, positions), dtype=dtype)
    gradients = []
    with torch.cuda.device_of(student):
        launches = [map_arguments(x, power, dtype) for x in sides]
        for launch, mean in zip(launches, means, strict=True):
            if samples:
                grid = (samples, triton.cdiv(positions, launch["TP"]))
                mean_kernel[grid](means=mean, **launch)
        compare = compare_arguments(means, factor, distance)
        if samples:
            compare_kernel[(samples,)](**compare)
        for i, (x, launch) in enumerate(zip(sides, launches, strict=True)):
            wanted = bool(grads >> i & 1)
            gradients.append(gradient_like(x) if wanted else x.new_empty(0))
            if wanted and samples:
                grid = (
                    samples,
                    triton.cdiv(positions, launch["TP"]),
                    triton.cdiv(x.shape[1], launch["TC"]),
                )
                emit_kernel[grid](of_means=means[i], grad=gradients[i], **launch)
    return compare["losses"].sum() * factor, *gradients


for _key in ("CUDA", "CPU") if ops.triton_interpreted() else ("CUDA",):
    torch.library.impl("kdkernels::spatial_attention_triton", _key, _spatial_attention)
