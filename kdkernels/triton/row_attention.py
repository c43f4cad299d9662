# SPDX-License-Identifier: Apache-2.0
"""``row_attention_triton`` and its backward: samples attend to samples.

Nearly all of its work is products with the K columns of the weights, a library's. Kernels are what
passes over the N K numbers beside them, each of which reads and writes every one once:

    soften   the softened logits, and the result before the product is added to it
    arrive   the gradient of the result times the temperature, 0 where a class takes no part

The softmax over B x B scores, B / K of that, is torch's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdkernels import ops
from kdkernels.ops.attention import GRAD_TEACHER, GRAD_TEMPERATURE, GRAD_WEIGHTS
from kdkernels.triton.layout import addressable, common_unit, row_layout, row_start

BLOCK = 1024  # classes to a program


@triton.jit
def _temperature(temperatures, temperature, row, SCALAR: tl.constexpr, ACC: tl.constexpr):
    if temperatures is None:
        tau = tl.full((1,), temperature, ACC)
    else:
        tau = tl.load(temperatures + (row * 0 if SCALAR else row) + tl.arange(0, 1))
    return tau


@triton.jit(do_not_specialize=["inner", "outer_stride", "inner_stride"])
def soften_kernel(
    teacher,  # (N, CLASSES)
    temperatures,  # (1,) or (N,), or None
    soft,  # (N, CLASSES)
    out,  # (N, CLASSES) or None
    inner, outer_stride, inner_stride, temperature,
    RESIDUAL: tl.constexpr, SCALAR: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = teacher + row_start(row, inner, outer_stride, inner_stride, UNIT) + j
    z = tl.load(z, mask=j < CLASSES, other=0.0).to(ACC)
    on = z != -float("inf")
    at = row.to(tl.int64) * CLASSES + j
    tau = _temperature(temperatures, temperature, row, SCALAR, ACC)
    tl.store(soft + at, tl.where(on, z / tau, 0.0), mask=j < CLASSES)
    if out is not None:
        tl.store(out + at, z if RESIDUAL else tl.where(on, 0.0, z), mask=j < CLASSES)


@triton.jit(do_not_specialize=["inner", "outer_stride", "inner_stride"])
def arrive_kernel(
    teacher,  # (N, CLASSES)
    temperatures,  # (1,) or (N,), or None
    upstream,  # (N, CLASSES), the gradient of the result
    arriving,  # (N, CLASSES)
    inner, outer_stride, inner_stride, temperature,
    SCALAR: tl.constexpr, ACC: tl.constexpr, CLASSES: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = teacher + row_start(row, inner, outer_stride, inner_stride, UNIT) + j
    on = tl.load(z, mask=j < CLASSES, other=0.0).to(ACC) != -float("inf")
    at = row.to(tl.int64) * CLASSES + j
    tau = _temperature(temperatures, temperature, row, SCALAR, ACC)
    grad = tl.load(upstream + at, mask=j < CLASSES, other=0.0)
    tl.store(arriving + at, tl.where(on, grad * tau, 0.0), mask=j < CLASSES)


def arguments(teacher: Tensor, temperature, temperatures, accumulator: torch.dtype) -> dict:
    """What the launches have in common."""
    layout = row_layout(teacher)
    unit = common_unit(layout)
    return {
        "teacher": teacher,
        "temperatures": temperatures,
        "inner": layout.inner,
        "outer_stride": layout.outer_stride // unit,
        "inner_stride": layout.inner_stride // unit,
        "temperature": temperature,
        "SCALAR": temperatures is not None and temperatures.numel() == 1,
        "ACC": tl.float64 if accumulator == torch.float64 else tl.float32,
        "CLASSES": teacher.shape[-1],
        "UNIT": unit,
        "BLOCK": min(BLOCK, triton.next_power_of_2(teacher.shape[-1])),
    }


def _run(kernel, teacher, temperature, temperatures, accumulator, **given) -> None:
    launch = arguments(addressable(teacher), temperature, temperatures, accumulator) | given
    rows = teacher.numel() // launch["CLASSES"]
    if rows:
        with torch.cuda.device_of(teacher):
            kernel[(rows, triton.cdiv(launch["CLASSES"], launch["BLOCK"]))](**launch)


def _heads(x: Tensor, heads: int) -> Tensor:  # (n, H d) to (H, n, d)
    return x.unflatten(1, (heads, -1)).transpose(0, 1)


def _rows(x: Tensor) -> Tensor:  # and back
    return x.transpose(0, 1).flatten(1)


def _forward(
    teacher, query, key, value, output, heads, temperature, temperatures, residual, gathered
):
    out = query.new_empty(teacher.shape)
    soft = query.new_empty(teacher.numel() // teacher.shape[-1], teacher.shape[-1])
    _run(
        soften_kernel, teacher, temperature, temperatures, query.dtype, soft=soft, out=out,
        RESIDUAL=residual,
    )  # fmt: skip
    others = soft if gathered is None else gathered
    q, k, v = soft @ query, others @ key, others @ value
    scores = _heads(q, heads) @ _heads(k, heads).mT
    p = (scores * (query.shape[1] // heads) ** -0.5).softmax(-1)
    attended = _rows(p @ _heads(v, heads))
    tau = temperature if temperatures is None else temperatures.unsqueeze(-1)
    out.view_as(soft).addmm_(attended * tau, output)
    return out, torch.cat([x.reshape(-1) for x in (q, k, v, attended, p)])


def _backward(
    upstream, teacher, query, key, value, output, saved, heads, temperature, temperatures,
    residual, gathered, grads,
):  # fmt: skip
    dtype, classes = query.dtype, teacher.shape[-1]
    soft, arriving = query.new_empty(2, teacher.numel() // classes, classes)
    given = (teacher, temperature, temperatures, dtype)
    _run(soften_kernel, *given, soft=soft, out=None, RESIDUAL=residual)
    upstream = upstream.contiguous()
    _run(arrive_kernel, *given, upstream=upstream, arriving=arriving)
    others = soft if gathered is None else gathered
    n, m = len(soft), len(others)
    shapes = ((n, query), (m, key), (m, value), (n, value))
    sizes = [rows * weight.shape[1] for rows, weight in shapes] + [heads * n * m]
    *parts, p = saved.split(sizes)
    parts = [x.view(r, w.shape[1]) for x, (r, w) in zip(parts, shapes, strict=True)]
    q, k, v = (_heads(x, heads) for x in parts[:3])
    attended, p = parts[3], p.view(heads, n, m)

    to_attended = arriving @ output.t()
    by_head = _heads(to_attended, heads)
    to_p = by_head @ v.mT
    to_scores = p * (to_p - (p * to_p).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    to_q, to_k = _rows(to_scores @ k), _rows(to_scores.mT @ q)
    to_v = _rows(p.mT @ by_head)

    to_teacher, to_rows = teacher.new_empty(0), query.new_empty(0)
    to_weights = tuple(query.new_empty(0) for _ in range(4))
    if grads & GRAD_WEIGHTS:
        to_weights = (soft.t() @ to_q, others.t() @ to_k, others.t() @ to_v)
        to_weights = (*to_weights, attended.t() @ arriving)
    if grads & (GRAD_TEACHER | GRAD_TEMPERATURE):
        off = torch.isneginf(teacher).view_as(soft)
        tau = temperature if temperatures is None else temperatures.unsqueeze(-1)
        to_soft = to_q @ query.t()
        if gathered is None:
            to_soft.addmm_(to_k, key.t()).addmm_(to_v, value.t())
        to_soft.masked_fill_(off, 0.0)
        if grads & GRAD_TEACHER:
            to_teacher = to_soft / tau
            if residual:
                to_teacher = to_teacher + upstream.view_as(soft).masked_fill(off, 0.0)
            to_teacher = to_teacher.to(teacher.dtype).view(teacher.shape)
        if grads & GRAD_TEMPERATURE:
            to_rows = (attended * to_attended).sum(-1) - (soft * to_soft).sum(-1)
            to_rows = to_rows / (temperature if temperatures is None else temperatures)
    return to_teacher, to_rows, *to_weights


for _key in ("CUDA", "CPU") if ops.triton_interpreted() else ("CUDA",):
    torch.library.impl("kdkernels::row_attention_triton", _key, _forward)
    torch.library.impl("kdkernels::row_attention_backward_triton", _key, _backward)
