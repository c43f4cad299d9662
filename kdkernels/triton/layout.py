# SPDX-License-Identifier: Apache-2.0
"""How rows lie in memory, and how many of their classes a program takes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tile(NamedTuple):
    rows: int
    classes: int
    warps: int


# A program's tile by the number of classes, up to the first entry. Chosen from the registers that
# ptxas and llc report (none may spill) and so that a lane's loads are 16 bytes.
TILES = {
    16: Tile(64, 16, 4),
    32: Tile(32, 32, 4),
    64: Tile(16, 64, 4),
    128: Tile(8, 128, 4),
    256: Tile(4, 256, 4),
    512: Tile(2, 512, 4),
    1024: Tile(1, 1024, 4),
    2048: Tile(1, 2048, 8),
    4096: Tile(1, 4096, 16),
}
SWEEP = Tile(1, 2048, 8)  # of wider rows: a part of one


def tile(classes: int, accumulator: torch.dtype) -> Tile:
    """The tile of a program: whole rows while they fit, else a part of one."""
    words = accumulator.itemsize // 4
    for width, choice in TILES.items():
        # 16 warps leave a thread 128 registers, which fp64 exceeds.
        if classes * words <= width and choice.warps * words <= 16:
            return choice._replace(classes=choice.classes // words)
    return SWEEP._replace(classes=SWEEP.classes // words)


def options(shape: Tile) -> dict:
    """Compiler options of a launch."""
    if torch.version.hip:  # warps of 64 lanes
        return {"num_warps": max(1, shape.warps // 2)}
    # Left alone, ptxas spills a few registers so that one more block fits a multiprocessor; told
    # how many there may be, it does not.
    return {"num_warps": shape.warps, "maxnreg": min(255, 65536 // (32 * shape.warps))}


class Layout(NamedTuple):
    """Row ``r`` starts at ``(r // inner) * outer_stride + (r % inner) * inner_stride``."""

    inner: int
    outer_stride: int
    inner_stride: int


def row_layout(x: Tensor) -> Layout | None:
    """The layout of the rows of ``x`` (..., C), or None where they need a contiguous copy."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    groups: list[tuple[int, int]] = []  # (size, stride), neighbours merged
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if groups and groups[-1][1] == size * stride:
            groups[-1] = (groups[-1][0] * size, stride)
        else:
            groups.append((size, stride))
    if len(groups) > 2:
        return None
    (_, outer_stride), (inner, inner_stride) = [(1, 0)] * (2 - len(groups)) + groups
    return Layout(max(inner, 1), outer_stride, inner_stride)


def addressable(x: Tensor) -> Tensor:
    return x if row_layout(x) is not None else x.contiguous()


def common_unit(*layouts: Layout) -> int:
    """The largest power of two up to 16 that divides all strides.

    Strides are passed in these units: the kernel then sees that rows start aligned, and reads them
    by vectors. Triton by itself recognises only strides that are multiples of 16.
    """
    return math.gcd(16, *(s for layout in layouts for s in layout[1:]))


@triton.jit
def row_start(row, inner, outer_stride, inner_stride, UNIT: tl.constexpr):
    """Offset of each row, by a :class:`Layout` whose strides are in UNITs."""
    outer = (row // inner).to(tl.int64) * outer_stride
    return (outer + (row % inner).to(tl.int64) * inner_stride) * UNIT
