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
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = row < rows
    end = CLASSES
    if PER_ROW:
        factor = tl.load(upstream + row, mask=inside, other=1).to(ACC)
    else:
        factor = tl.load(upstream).to(ACC)
        if row_factor is None:
            end = tl.where(factor == 1, 0, CLASSES)
    if row_factor is not None:
        factor *= tl.load(row_factor + row, mask=inside, other=1)
    start_of_row = grad + row_start(row, inner, outer_stride, inner_stride, UNIT)
    for start in range(tl.program_id(1) * TILE, end, tl.num_programs(1) * TILE):
        column = start + tl.arange(0, TILE)[None, :]
        mask = inside & (column < CLASSES)
        value = tl.load(start_of_row + column, mask=mask).to(ACC)
        tl.store(start_of_row + column, value * factor, mask=mask)


def arguments(grad: Tensor, upstream: Tensor, row_factor: Tensor | None) -> dict:
    """Everything a launch takes but the grid."""
    classes = grad.shape[-1]
    layout = row_layout(grad)
    unit = common_unit(layout)
    double = grad.dtype == torch.float64
    shape = tile(classes, torch.float64 if double else torch.float32)
    return {
        "grad": grad,
        "upstream": upstream,
        "row_factor": row_factor,
        "rows": grad.numel() // classes,
        "inner": layout.inner,
        "outer_stride": layout.outer_stride // unit,
        "inner_stride": layout.inner_stride // unit,
        "PER_ROW": upstream.dim() > 0,
        "ACC": tl.float64 if double else tl.float32,
        "CLASSES": classes,
        "UNIT": unit,
        "ROWS": shape.rows,
        "TILE": shape.classes,
        **options(shape),
    }


def _scale_rows_(grad: Tensor, upstream: Tensor, row_factor: Tensor | None) -> None:
    if not grad.numel():
        return
    if row_layout(grad) is None:  # in place without a kernel: an inplace student's odd strides
        factor = upstream if row_factor is None else upstream * row_factor.view(grad.shape[:-1])
        grad.copy_(grad * factor.unsqueeze(-1))
        return
    if upstream.dim():
        upstream = upstream.reshape(-1).contiguous()
    launch = arguments(grad, upstream, row_factor)
    blocks = triton.cdiv(launch["rows"], launch["ROWS"])
    tiles = triton.cdiv(launch["CLASSES"], launch["TILE"])
    grid = (blocks, max(1, min(tiles, PROGRAMS // blocks)))
    with torch.cuda.device_of(grad):
        scale_rows_kernel[grid](**launch)


torch.library.impl("kdkernels::scale_rows_", "CUDA", _scale_rows_)
if ops.triton_interpreted() and not ops.compiled_verdict("scale_rows_", "cpu")[0]:
    torch.library.impl("kdkernels::scale_rows_", "CPU", _scale_rows_)
