# SPDX-License-Identifier: Apache-2.0
"""``crd_triton``: CRD's scores against a memory bank, their loss and the gradient, in one pass.

A program takes a share of one sample's negatives on one side, tile by tile: rows of the bank are
gathered into registers, scored, and added to the gradient by their probabilities. Each is read once
(4 D bytes in fp32, from L2 where it holds the bank), and nothing of size B K is written.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import ops
from kdkernels.ops.contrast import CrdNumbers
from kdkernels.triton.layout import Tile, options
from kdkernels.triton.math import log1p

ELEMENTS = 4096  # of a tile: 32 registers of 128 threads
# Enough programs to fill a device, of a share of the negatives each.
PROGRAMS = 2048


@triton.jit(do_not_specialize=["bank_rows", "count", "share", "stride"])
def crd_kernel(
    anchor,  # (B, DIM)
    bank,  # (bank_rows, DIM)
    normalizer,  # (2,) Z, of this side at SIDE
    index,  # (B,) int64
    negatives,  # (B, count) int64, `stride` apart
    loss,  # (B, parts)
    grad,  # (B, parts, DIM) or None
    bank_rows, count, share, stride,
    rate: tl.float64, shift: tl.float64,  # u = score rate - shift - log Z
    SIDE: tl.constexpr, ACC: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = sample * tl.num_programs(1) + part
    column = tl.arange(0, COLUMNS)
    inside = column < DIM
    v = tl.load(anchor + sample * DIM + column, mask=inside, other=0.0)
    level = tl.full((), shift, ACC) + tl.log(tl.load(normalizer + SIDE).to(ACC))
    scale = tl.full((), rate, ACC)
    losses = tl.zeros((TILE,), ACC)
    total = tl.zeros((COLUMNS,), ACC)
    for start in tl.range(part * share, part * share + share, TILE):
        k = start + tl.arange(0, TILE)
        other = k < count
        live = k <= count  # the last one is the positive
        row = tl.load(negatives + sample * stride + k, mask=other, other=0)
        row = tl.where(other, row, tl.load(index + sample))
        sound = (row >= 0) & (row < bank_rows)
        w = tl.load(
            bank + row[:, None] * DIM + column[None, :],
            mask=(live & sound)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        sign = tl.where(other, 1.0, -1.0).to(ACC)
        u = (tl.sum(w * v[None, :], axis=1) * scale - level) * sign
        u = tl.where(sound, u, float("nan"))
        e = tl.exp(-tl.abs(u))
        losses += tl.where(live, tl.where(u < 0, 0.0, u) + log1p(e), 0.0)
        if grad is not None:
            weight = tl.where(live, tl.where(u < 0, e, 1.0) / (1 + e) * sign, 0.0)
            total += tl.sum(weight[:, None] * w, axis=0)
    tl.store(loss + at, tl.sum(losses))
    if grad is not None:
        tl.store(grad + at * DIM + column, total * scale, mask=inside)


def launches(
    student: Tensor,  # (B, D), as all floats of the accumulator's dtype and contiguous
    teacher: Tensor,  # (B, D)
    student_bank: Tensor,  # (n, D)
    teacher_bank: Tensor,  # (n, D)
    normalizer: Tensor,  # (2,)
    index: Tensor,  # (B,) int64
    negatives: Tensor,  # (B, K) int64, rows contiguous
    numbers: CrdNumbers,
    grads: int,
) -> tuple[list[dict], tuple[int, int]]:
    """Arguments of the launch for either side, and the grid of each."""
    (samples, dim), count = student.shape, negatives.shape[1]
    scores = count + 1
    columns = triton.next_power_of_2(dim)
    rows = max(ELEMENTS // columns // (student.element_size() // 4), 1)
    rows = min(rows, triton.next_power_of_2(scores))
    parts = max(min(PROGRAMS // max(samples, 1), triton.cdiv(scores, rows)), 1)
    share = triton.cdiv(triton.cdiv(scores, parts), rows) * rows
    density = count / len(student_bank) + numbers.eps
    both = {
        "normalizer": normalizer, "index": index, "negatives": negatives,
        "bank_rows": len(student_bank), "count": count, "share": share,
        "stride": negatives.stride(0), "rate": 1 / numbers.temperature,
        "shift": math.log(density), "DIM": dim, "COLUMNS": columns, "TILE": rows,
        "ACC": tl.float64 if student.dtype == torch.float64 else tl.float32,
        **options(Tile(rows, columns, 4 if columns <= ELEMENTS else 16)),
    }  # fmt: skip
    sides = ((student, teacher_bank), (teacher, student_bank))
    return [
        both | {
            "anchor": anchor, "bank": bank, "SIDE": side,
            "loss": anchor.new_empty(samples, parts),
            "grad": anchor.new_empty(samples, parts, dim) if grads >> side & 1 else None,
        }
        for side, (anchor, bank) in enumerate(sides)
    ], (samples, parts)  # fmt: skip


def _crd(
    student, teacher, student_bank, teacher_bank, normalizer, index, negatives, factor, numbers,
    choices, grads,
):  # fmt: skip
    numbers = CrdNumbers(*numbers)
    sides, grid = launches(
        student, teacher, student_bank, teacher_bank, normalizer, index, negatives, numbers, grads
    )
    if grid[0]:
        with torch.cuda.device_of(student):
            for side in sides:
                crd_kernel[grid](**side)
    share = negatives.shape[1] / len(student_bank)
    constant = -2 * negatives.numel() * math.log(share / (share + numbers.eps))
    loss = (sum(side["loss"].sum() for side in sides) + constant) * factor
    gradients = [
        student.new_empty(0) if side["grad"] is None else side["grad"].sum(1) * factor
        for side in sides
    ]
    return loss, *gradients, *(student.new_empty(0) for _ in range(5))


for _key in ("CUDA", "CPU") if ops.triton_interpreted() else ("CUDA",):
    torch.library.impl("kdkernels::crd_triton", _key, _crd)
