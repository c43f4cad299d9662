# SPDX-License-Identifier: Apache-2.0
"""``attention_triton`` and its backward: launches the kernels of the attention family."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import ops
from kdkernels.ops.attention import GRAD_COEFFICIENTS, GRAD_TEACHER, GRAD_TEMPERATURE
from kdkernels.triton.attention_kernel import coefficients_kernel, forward_kernel, teacher_kernel
from kdkernels.triton.layout import addressable, common_unit, options, row_layout


class Tile(NamedTuple):
    """Classes as queries and as keys, and samples, that a program holds at once."""

    queries: int
    keys: int
    samples: int = 1
    warps: int = 4


# Chosen from the registers that ptxas and llc report: none may spill. In fp64 half the queries.
FORWARD = Tile(16, 64, 2)
COEFFICIENTS = Tile(32, 32)
TEACHER = Tile(32, 32)
# Enough programs to fill a device where the matrix has few tiles: samples are then shared out.
PROGRAMS = 1024


def _tile(tile: Tile, dtype: torch.dtype) -> Tile:
    return tile._replace(queries=tile.queries // 2) if dtype == torch.float64 else tile


def arguments(
    teacher: Tensor,  # (..., K), rows as layout.row_layout takes them
    scores: Tensor,
    values: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    tile: Tile,
) -> dict:
    """What the kernels' launches have in common."""
    classes = teacher.shape[-1]
    layout = row_layout(teacher)
    unit = common_unit(layout)
    return {
        "teacher": teacher,
        "scores": scores,
        "values": values,
        "temperatures": temperatures,
        "rows": teacher.numel() // classes,
        "inner": layout.inner,
        "outer_stride": layout.outer_stride // unit,
        "inner_stride": layout.inner_stride // unit,
        "temperature": temperature,
        "SCALAR": temperatures is not None and temperatures.numel() == 1,
        "HEADS": scores.shape[0],
        "ACC": tl.float64 if scores.dtype == torch.float64 else tl.float32,
        "CLASSES": classes,
        "UNIT": unit,
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        **options(tile),
    }


def forward_launch(
    teacher, scores, values, temperature, temperatures, residual, save
) -> tuple[dict, tuple[int, int]]:
    """A launch's arguments, outputs included, and its grid."""
    tile = _tile(FORWARD, scores.dtype)
    launch = arguments(teacher, scores, values, temperature, temperatures, tile)
    classes, rows = launch["CLASSES"], launch["rows"]
    stats = scores.new_empty((4, launch["HEADS"], rows, classes)) if save else None
    launch |= {
        "out": scores.new_empty(teacher.shape),
        "stats": stats,
        "RESIDUAL": residual,
        "SAMPLES": tile.samples,
    }
    return launch, (triton.cdiv(rows, tile.samples), triton.cdiv(classes, tile.queries))


def coefficients_launch(
    upstream, teacher, scores, values, stats, temperature, temperatures
) -> tuple[dict, tuple[int, int, int]]:
    tile = _tile(COEFFICIENTS, scores.dtype)
    launch = arguments(teacher, scores, values, temperature, temperatures, tile)
    heads, classes, rows = launch["HEADS"], launch["CLASSES"], launch["rows"]
    tiles = triton.cdiv(classes, tile.queries), triton.cdiv(classes, tile.keys)
    wanted = max(1, min(rows, PROGRAMS // (tiles[0] * tiles[1] * heads)))
    share = triton.cdiv(rows, wanted)
    parts = (triton.cdiv(rows, share), heads)
    launch |= {
        "upstream": upstream,
        "stats": stats,
        "grad_scores": scores.new_empty((parts[0], *scores.shape)),
        "by_query": scores.new_empty((*parts, tiles[1], classes)),
        "by_key": scores.new_empty((*parts, tiles[0], classes)),
        "by_both": scores.new_empty((*parts, *tiles)),
        "by_value": scores.new_empty((*parts, tiles[0], classes)),
        "share": share,
    }
    return launch, (*tiles, parts[0] * heads)


def teacher_launch(
    upstream, teacher, scores, values, stats, temperature, temperatures
) -> tuple[dict, tuple[int, int]]:
    tile = _tile(TEACHER, scores.dtype)
    launch = arguments(teacher, scores, values, temperature, temperatures, tile)
    launch |= {"upstream": upstream, "stats": stats, "grad": scores.new_empty(upstream.shape)}
    return launch, (launch["rows"], triton.cdiv(launch["CLASSES"], tile.keys))


def _forward(teacher, scores, values, temperature, temperatures, residual, save):
    with torch.cuda.device_of(teacher):
        launch, grid = forward_launch(
            addressable(teacher), scores, values, temperature, temperatures, residual, save
        )
        if launch["rows"]:
            forward_kernel[grid](**launch)
    return launch["out"], launch["stats"] if save else scores.new_empty(0)


def _backward(upstream, teacher, scores, values, stats, temperature, temperatures, residual, grads):
    given = (
        upstream.contiguous(), addressable(teacher), scores, values, stats, temperature,
        temperatures,
    )  # fmt: skip
    classes = teacher.shape[-1]
    upstream = given[0].view(-1, classes)
    rows, off = len(upstream), torch.isneginf(teacher).view(-1, classes)
    tau = temperature if temperatures is None else temperatures.unsqueeze(-1)
    arriving = torch.where(off, 0.0, upstream)
    to_teacher, to_rows = teacher.new_empty(0), scores.new_empty(0)
    to_scores, to_values = scores.new_empty(0), values.new_empty(0)
    with torch.cuda.device_of(teacher):
        if grads & GRAD_COEFFICIENTS and rows:
            launch, grid = coefficients_launch(*given)
            coefficients_kernel[grid](**launch)
            to_scores = launch["grad_scores"].sum(0)
            to_scores[:, -1, :-1] = launch["by_key"].sum((0, 2))
            to_scores[:, :-1, -1] = launch["by_query"].sum((0, 2))
            to_scores[:, -1, -1] = launch["by_both"].sum((0, 2, 3))
            to_logit = (arriving * tau * stats[2]).sum((1, 2))
            to_values = torch.cat([launch["by_value"].sum((0, 2)), to_logit.unsqueeze(-1)], -1)
        elif grads & GRAD_COEFFICIENTS:
            to_scores, to_values = torch.zeros_like(scores), torch.zeros_like(values)
        if grads & (GRAD_TEACHER | GRAD_TEMPERATURE):
            launch, grid = teacher_launch(*given)
            if rows:
                teacher_kernel[grid](**launch)
            to_soft = torch.where(off, 0.0, launch["grad"].view(-1, classes)) / tau
            if grads & GRAD_TEACHER:
                total = to_soft + arriving if residual else to_soft
                to_teacher = total.to(teacher.dtype).view(teacher.shape)
            if grads & GRAD_TEMPERATURE:
                attended = (values[:, -1:, None] * stats[2] + stats[3]).sum(0)
                soft = torch.where(off, 0.0, teacher.view(-1, classes)) / tau
                to_rows = (arriving * attended - soft * to_soft).sum(-1)
    return to_teacher, to_rows, to_scores, to_values


for _key in ("CUDA", "CPU") if ops.triton_interpreted() else ("CUDA",):
    torch.library.impl("kdkernels::attention_triton", _key, _forward)
    torch.library.impl("kdkernels::attention_backward_triton", _key, _backward)
