# SPDX-License-Identifier: Apache-2.0
"""``dist_triton`` and ``mlkd_*_triton``: launches the batchwise family's kernels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import ops
from kdkernels.ops.batchwise import GRAD_TEMPERATURE, DistChoices, DistNumbers
from kdkernels.ops.rowwise import GRAD_ROWS, GRAD_STUDENT, GRAD_TEACHER, compute_dtype
from kdkernels.triton import scale  # noqa: F401  (registers scale_rows_)
from kdkernels.triton.dist_kernels import (
    dist_columns_kernel,
    dist_gradient_kernel,
    dist_rows_kernel,
)
from kdkernels.triton.layout import Tile, addressable, common_unit, options, row_layout, tile
from kdkernels.triton.mlkd_kernels import (
    mlkd_dots_kernel,
    mlkd_gradient_kernel,
    mlkd_softmax_kernel,
)

# Of a program that walks down a few columns: a lane reads 16 bytes of a row.
COLUMNS = Tile(32, 32, 4)


def _inputs(student: Tensor, teacher: Tensor, valid: Tensor | None) -> dict:
    """What every kernel that reads the logits takes of them."""
    layouts = row_layout(student), row_layout(teacher)
    unit = common_unit(*layouts)
    classes = student.shape[-1]
    strides = {
        f"{side}_{name}": value
        for side, layout in zip("st", layouts, strict=True)
        for name, value in (
            ("inner", layout.inner),
            ("outer", layout.outer_stride // unit),
            ("stride", layout.inner_stride // unit),
        )
    }
    rows = {"rows": student.numel() // classes, "CLASSES": classes, "UNIT": unit}
    return {"student": student, "teacher": teacher, "valid": valid} | strides | rows


def _tiles(shape: Tile, dtype: torch.dtype) -> dict:
    if dtype == torch.float64:  # both softmaxes and their products at once take more registers
        shape = shape._replace(classes=max(16, shape.classes // 2))
    return {
        "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        "ROWS": shape.rows,
        "TILE": shape.classes,
        **options(shape),
    }


def dist_launches(
    student: Tensor,  # (..., C), rows as layout.row_layout takes them
    teacher: Tensor,  # (..., C), likewise
    numbers: DistNumbers,
    choices: DistChoices,
    grads: int,
    valid: Tensor | None = None,  # (N,) bool
    temperatures: Tensor | None = None,  # (1,)
) -> tuple[dict, dict, list[dict]]:
    """Arguments of the kernels of rows, of columns, and of the gradients to either side."""
    dtype, classes = compute_dtype(student, teacher), student.shape[-1]
    inputs = _inputs(student, teacher, valid)
    rows = inputs["rows"]

    def new(*shape):
        return student.new_empty(shape, dtype=dtype)

    inputs |= {
        "temperatures": temperatures,
        "temperature": numbers.temperature,
        "stats": new(9, rows),
    }
    inputs |= {"enable_fp_fusion": False}
    count = pivot = None
    if valid is not None:
        count, pivot = valid.sum(), valid.to(torch.uint8).argmax()
    flags = {"T2": bool(choices.t2), "CLAMP": bool(choices.clamp), "count": count}
    by_row = inputs | _tiles(tile(classes, dtype), dtype)
    divisor = max(rows, 1) if valid is None else 1
    of_rows = by_row | flags | {"loss": new(rows), "weight": numbers.beta / divisor}
    of_columns = inputs | flags | _tiles(COLUMNS, dtype) | {
        "pivot": pivot, "columns": new(5, classes), "loss": new(classes),
        "weight": numbers.gamma / classes,
    }  # fmt: skip
    gradients = []
    for side, (x, bit) in enumerate(((student, GRAD_STUDENT), (teacher, GRAD_TEACHER))):
        if grads & (bit | GRAD_TEMPERATURE):
            half = bool(grads & bit) and x.dtype == torch.float16
            gradients.append(by_row | {
                "columns": of_columns["columns"],
                "grad": x.new_empty(x.shape) if grads & bit else None,
                "row_factor": new(rows) if half else None,
                "slope": new(rows) if grads & GRAD_TEMPERATURE else None,
                "SIDE": side, "HALF": half,
            })  # fmt: skip
    return of_rows, of_columns, gradients


def _dist(student, teacher, numbers, choices, grads, mask=None, temperature=None):
    numbers, choices = DistNumbers(*numbers), DistChoices(*choices)
    of_rows, of_columns, gradients = dist_launches(
        addressable(student), addressable(teacher), numbers, choices, grads, mask, temperature
    )
    rows, classes = of_rows["rows"], of_rows["CLASSES"]
    loss = of_rows["loss"].new_zeros(())
    if rows:
        with torch.cuda.device_of(student):
            blocks = (triton.cdiv(rows, of_rows["ROWS"]),)
            dist_rows_kernel[blocks](**of_rows)
            dist_columns_kernel[(triton.cdiv(classes, of_columns["TILE"]),)](**of_columns)
            for launch in gradients:
                dist_gradient_kernel[blocks](**launch)
        of_classes = of_columns["loss"].sum()
        if mask is not None:
            of_classes = torch.where(mask.any(), of_classes, 0.0)
        loss = of_rows["loss"].sum() + of_classes
    nothing = loss.new_empty(0)
    found = {launch["SIDE"]: launch for launch in gradients}
    grad = [found[i]["grad"] if i in found else None for i in (0, 1)]
    factor = slope = nothing
    if grads & GRAD_ROWS:
        factor = loss.new_zeros(2, rows)
        for side, launch in found.items():
            if launch["row_factor"] is not None:
                factor[side] = launch["row_factor"]
    if grads & GRAD_TEMPERATURE:
        tau = numbers.temperature if temperature is None else temperature
        slopes = sum(launch["slope"].sum() for launch in gradients) if rows else loss
        slope = ((2 * loss * bool(choices.t2) - slopes) / tau).reshape(1)
    return (
        loss,
        student.new_empty(0) if grad[0] is None else grad[0],
        teacher.new_empty(0) if grad[1] is None else grad[1],
        slope,
        factor,
    )


def softmax_launches(student, teacher, temperatures, valid=None) -> list[dict]:
    """Arguments of the softmax kernel, once per temperature."""
    dtype, classes = compute_dtype(student, teacher), student.shape[-1]
    inputs = _inputs(student, teacher, valid)
    rows = inputs["rows"]
    soft = student.new_empty((len(temperatures), 2, rows, classes), dtype=dtype)
    inputs |= _tiles(tile(classes, dtype), dtype) | {"kl": soft.new_empty(rows)}
    return [
        inputs | {"soft": soft[j], "temperature": tau, "BEGIN": j == 0}
        for j, tau in enumerate(temperatures)
    ]


def _softmax(student, teacher, temperatures, mask=None):
    launches = softmax_launches(addressable(student), addressable(teacher), temperatures, mask)
    rows = launches[0]["rows"]
    with torch.cuda.device_of(student):
        for launch in launches if rows else ():
            mlkd_softmax_kernel[(triton.cdiv(rows, launch["ROWS"]),)](**launch)
    soft = launches[0]["soft"]
    whole = soft.as_strided((len(launches), *soft.shape), (soft.numel(), *soft.stride()))
    return whole, launches[0]["kl"]


def gradient_launches(
    logits, soft, relations, row_weight, temperatures, of_teacher, valid=None
) -> tuple[dict, dict]:  # fmt: skip
    """Arguments of the kernels of the dot products and of the gradient."""
    rows, classes = soft.shape[2:]
    half = logits.dtype == torch.float16
    both = {
        "soft": soft, "relations": relations, "row_weight": row_weight, "valid": valid,
        "dots": soft.new_empty(len(temperatures), rows),
        "row_factor": soft.new_empty(rows) if half else None,
        "rows": rows, "TEMPERATURES": tuple(temperatures), "OF_TEACHER": of_teacher,
        "CLASSES": classes, **_tiles(tile(classes, soft.dtype), soft.dtype),
    }  # fmt: skip
    return both, both | {"grad": logits.new_empty(logits.shape)}


def _gradient(logits, soft, relations, row_weight, temperatures, of_teacher, mask=None):
    dots, gradient = gradient_launches(
        logits, soft, relations, row_weight, temperatures, of_teacher, mask
    )
    if dots["rows"]:
        blocks = (triton.cdiv(dots["rows"], dots["ROWS"]),)
        with torch.cuda.device_of(logits):
            mlkd_dots_kernel[blocks](**dots)
            mlkd_gradient_kernel[blocks](**gradient)
    factor = dots["row_factor"]
    return gradient["grad"], soft.new_empty(0) if factor is None else factor


def _grams(pd, dd, pp, weights, grads, shares=None, near_pd=None, near_dd=None, chosen=None):
    """As ``far_slopes`` of csrc/kd/cpu/batchwise/relate.h; small beside the products around it."""
    if shares is not None:
        weights = [weight * share for weight, share in zip(weights, shares, strict=True)]
    near_weight, far_weight = weights
    nothing = pd.new_empty(0)
    near_pd, near_dd = (pd, dd) if chosen is None else (near_pd, near_dd)
    difference = near_pd + near_pd.mT - near_dd
    if chosen is not None:
        difference = difference * (chosen[:, None] * chosen)
    both, md = pd + pd.mT, pd - 0.5 * dd
    columns = (dd * (pp - 0.5 * both + 0.25 * dd)).sum() + (md * md.mT).sum()
    loss = near_weight * difference.square().sum() + 2 * far_weight * columns
    near, far = 4 * near_weight * difference, 4 * far_weight
    joint = near if chosen is None else 0.0
    student = teacher = nothing
    if grads & GRAD_STUDENT:
        student = torch.stack([far * pd + joint, far * (pp - pd)])
    if grads & GRAD_TEACHER:
        teacher = torch.stack([far * (dd - pd) - joint, far * (both - pp - dd) + joint])
    return loss.clamp(min=0), student, teacher, nothing if chosen is None else near


for _key in ("CUDA", "CPU") if ops.triton_interpreted() else ("CUDA",):
    torch.library.impl("kdkernels::dist_triton", _key, _dist)
    torch.library.impl("kdkernels::mlkd_softmax_triton", _key, _softmax)
    torch.library.impl("kdkernels::mlkd_grams_triton", _key, _grams)
    torch.library.impl("kdkernels::mlkd_gradient_triton", _key, _gradient)
