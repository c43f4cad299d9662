# SPDX-License-Identifier: Apache-2.0
"""``kdkernels::attention``: classes attend to classes, within each row of logits.

A row's tokens differ from another's by one number each, its softened logits, so that all scores and
values come from one small matrix and one vector per head (see ``csrc/kd/attention.h``); making
those from weights is left to torch, and so are the gradients from them to the weights.
"""

from __future__ import annotations

import importlib

import torch

from kdkernels.ops import NAMESPACE
from kdkernels.ops.autograd import refuse_higher_order, refuse_transforms

GRAD_TEACHER, GRAD_TEMPERATURE, GRAD_COEFFICIENTS = 1, 2, 4

# teacher (..., K); scores (H, K + 1, K + 1) and values (H, K + 1), contiguous, in the dtype of the
# arithmetic; temperatures (1,) or (N,) in the place of the number. out (..., K); stats
# (4, H, N, K), or of size 0 without `save`.
_FORWARD = (
    "(Tensor teacher, Tensor scores, Tensor values, float temperature, Tensor? temperatures,"
    " bool residual, bool save) -> (Tensor out, Tensor stats)"
)
# Of size 0 where not asked for: (..., K), (N,), and like scores and values.
_BACKWARD = (
    "(Tensor upstream, Tensor teacher, Tensor scores, Tensor values, Tensor stats,"
    " float temperature, Tensor? temperatures, bool residual, int grads)"
    " -> (Tensor teacher, Tensor temperatures, Tensor scores, Tensor values)"
)


def _fake(teacher, scores, values, temperature, temperatures, residual, save):
    heads, classes = scores.shape[0], teacher.shape[-1]
    rows = teacher.numel() // classes
    stats = (4, heads, rows, classes) if save else (0,)
    return scores.new_empty(teacher.shape), scores.new_empty(stats)


def _fake_backward(
    upstream, teacher, scores, values, stats, temperature, temperatures, residual, grads
):
    def shape_if(bit, shape):
        return shape if grads & bit else (0,)

    return (
        teacher.new_empty(shape_if(GRAD_TEACHER, teacher.shape)),
        scores.new_empty(shape_if(GRAD_TEMPERATURE, (teacher.numel() // teacher.shape[-1],))),
        scores.new_empty(shape_if(GRAD_COEFFICIENTS, scores.shape)),
        values.new_empty(shape_if(GRAD_COEFFICIENTS, values.shape)),
    )


for _suffix in ("", "_triton"):
    torch.library.define(f"{NAMESPACE}::attention{_suffix}", _FORWARD)
    torch.library.define(f"{NAMESPACE}::attention_backward{_suffix}", _BACKWARD)
    torch.library.register_fake(f"{NAMESPACE}::attention{_suffix}", _fake)
    torch.library.register_fake(f"{NAMESPACE}::attention_backward{_suffix}", _fake_backward)

_ops = torch.ops.kdkernels
_compiled = (_ops.attention.default, _ops.attention_backward.default)
_triton = (_ops.attention_triton.default, _ops.attention_backward_triton.default)


@torch.compiler.assume_constant_result  # imports are not for tracing
def _register_triton() -> bool:
    importlib.import_module("kdkernels.triton.attention")
    return True


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, teacher, scores, values, temperatures, call):
        _, operators, temperature, residual = call
        out, stats = operators[0](
            teacher, scores, values, temperature, temperatures, residual, True
        )
        ctx.save_for_backward(teacher, scores, values, stats, temperatures)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx, upstream):
        name, operators, temperature, residual = ctx.call
        refuse_higher_order(name)
        teacher, scores, values, stats, temperatures = ctx.saved_tensors
        need = ctx.needs_input_grad
        grads = (
            GRAD_TEACHER * need[0]
            | GRAD_COEFFICIENTS * (need[1] or need[2])
            | GRAD_TEMPERATURE * need[3]
        )
        to_teacher, to_rows, to_scores, to_values = operators[1](
            upstream, teacher, scores, values, stats, temperature, temperatures, residual, grads
        )
        if need[3] and temperatures.numel() == 1:
            to_rows = to_rows.sum().reshape(1)
        return (
            to_teacher if need[0] else None,
            to_scores if need[1] else None,
            to_values if need[2] else None,
            to_rows if need[3] else None,
            None,
        )


def apply(
    name: str, backend: str, teacher, scores, values, temperature: float, temperatures,
    residual: bool,
) -> torch.Tensor:  # fmt: skip
    """Run the family's kernel on validated inputs, recording a gradient where one is needed."""
    tensors = (teacher, scores, values, temperatures)
    refuse_transforms(name, tensors)
    if backend == "triton":
        _register_triton()
    operators = _triton if backend == "triton" else _compiled
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Attention.apply(*tensors, (name, operators, temperature, residual))
    return operators[0](*tensors[:3], temperature, temperatures, residual, False)[0]
