# SPDX-License-Identifier: Apache-2.0
"""``scale_rows_``: multiplies a saved gradient by the upstream gradient, in place.

Where that is a scalar holding 1 a program reads it and ends, so that the common backward moves no
data and the host never waits to find out. Otherwise 4 bytes per class in bf16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import ops
from kdkernels.triton.layout import common_unit, options, row_layout, row_start, tile

# Enough programs to fill a device where rows are few and long.
PROGRAMS = 1024


@triton.jit(do_not_specialize=["rows", "inner", "outer_stride", "inner_stride"])
def scale_rows_kernel(
    grad,  # (..., CLASSES)
    upstream,  # () or (rows,)
    row_factor,  # (rows,) or None
    rows, inner, outer_stride, inner_stride,
    PER_ROW: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = row < rows
    moves = True
    if PER_ROW:
        factor = tl.load(upstream + row, mask=inside, other=1).to(ACC)
    else:
        factor = tl.load(upstream).to(ACC)
        if row_factor is None:
            moves = factor != 1
    if row_factor is not None:
        factor *= tl.load(row_factor + row, mask=inside, other=1)
    start_of_row = grad + row_start(row, inner, outer_stride, inner_stride, UNIT)
    if moves:
        for start in range(0, CLASSES, TILE * COLUMNS):
            column = start + tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
            mask = inside & (column < CLASSES)
            value = tl.load(start_of_row + column, mask=mask).to(ACC)
            tl.store(start_of_row + column, value * factor, mask=mask)


def arguments(grad: Tensor, upstream: Tensor, row_factor: Tensor | None) -> dict:
    """Everything a launch takes but the grid, which is (blocks of rows, COLUMNS)."""
    classes = grad.shape[-1]
    rows = grad.numel() // classes
    layout = row_layout(grad)
    unit = common_unit(layout)
    double = grad.dtype == torch.float64
    shape = tile(classes, torch.float64 if double else torch.float32)
    blocks, tiles = triton.cdiv(rows, shape.rows), triton.cdiv(classes, shape.classes)
    return {
        "grad": grad,
        "upstream": upstream,
        "row_factor": row_factor,
        "rows": rows,
        "inner": layout.inner,
        "outer_stride": layout.outer_stride // unit,
        "inner_stride": layout.inner_stride // unit,
        "PER_ROW": upstream.dim() > 0,
        "ACC": tl.float64 if double else tl.float32,
        "CLASSES": classes,
        "UNIT": unit,
        "ROWS": shape.rows,
        "TILE": shape.classes,
        # A power of two, so that few are ever compiled.
        "COLUMNS": triton.next_power_of_2(max(1, min(tiles, PROGRAMS // blocks))),
        **options(shape),
    }


def _scale_rows_(grad: Tensor, upstream: Tensor, row_factor: Tensor | None) -> None:
    if not grad.numel():
        return
    if row_layout(grad) is None:  # an in-place student whose rows no kernel can walk
        factor = upstream if row_factor is None else upstream * row_factor.view(grad.shape[:-1])
        grad.copy_(grad * factor.unsqueeze(-1))
        return
    if upstream.dim():
        upstream = upstream.reshape(-1).contiguous()
    launch = arguments(grad, upstream, row_factor)
    with torch.cuda.device_of(grad):
        blocks = triton.cdiv(launch["rows"], launch["ROWS"])
        scale_rows_kernel[(blocks, launch["COLUMNS"])](**launch)


torch.library.impl("kdkernels::scale_rows_", "CUDA", _scale_rows_)
if ops.triton_interpreted() and not ops.compiled_verdict("scale_rows_", "cpu")[0]:
    torch.library.impl("kdkernels::scale_rows_", "CPU", _scale_rows_)
