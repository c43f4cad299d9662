# SPDX-License-Identifier: Apache-2.0
"""``kdkernels::attention`` and ``row_attention``: the learning simplifier by its tokens.

Classes attend to classes within each row of logits. A row's tokens differ from another's by one
number each, its softened logits, so that all scores and values come from one small matrix and one
vector per head (see ``csrc/kd/attention.h``), which ``attention_coefficients`` makes of the
weights. Or rows attend to rows (see ``csrc/kd/row_attention.h``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.ops import NAMESPACE, register_triton
from kdkernels.ops.autograd import refuse_higher_order, refuse_transforms

# What a backward is asked for; the last are the coefficients, or the weights of row attention.
GRAD_TEACHER, GRAD_TEMPERATURE, GRAD_COEFFICIENTS = 1, 2, 4
GRAD_WEIGHTS = GRAD_COEFFICIENTS

# The weights of functional.learning_simplifier, contiguous or not, in the dtype of the arithmetic.
_WEIGHTS = "Tensor query, Tensor key, Tensor value, Tensor output"
_COEFFICIENTS = f"({_WEIGHTS}, Tensor embedding, int heads) -> (Tensor scores, Tensor values)"
_COEFFICIENTS_BACKWARD = (
    f"(Tensor to_scores, Tensor to_values, {_WEIGHTS}, Tensor embedding, int heads)"
    " -> (Tensor query, Tensor key, Tensor value, Tensor output, Tensor embedding)"
)

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
# gathered (M, K): the softened rows to attend to, if not one's own; it gets no gradient.
# out (..., K); saved: what the backward needs besides, as its backend has it.
_ROW_OPTIONS = "int heads, float temperature, Tensor? temperatures, bool residual, Tensor? gathered"
_ROWS = f"(Tensor teacher, {_WEIGHTS}, {_ROW_OPTIONS}) -> (Tensor out, Tensor saved)"
_ROWS_BACKWARD = (
    f"(Tensor upstream, Tensor teacher, {_WEIGHTS}, Tensor saved, {_ROW_OPTIONS}, int grads)"
    " -> (Tensor teacher, Tensor temperatures, Tensor query, Tensor key, Tensor value,"
    " Tensor output)"
)


def _fake_coefficients(query, key, value, output, embedding, heads):
    tokens = embedding.shape[0] + 1
    return query.new_empty((heads, tokens, tokens)), query.new_empty((heads, tokens))


def _fake_coefficients_backward(to_scores, to_values, *weights_and_heads):
    return tuple(weight.new_empty(weight.shape) for weight in weights_and_heads[:-1])


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


def _fake_rows(
    teacher, query, key, value, output, heads, temperature, temperatures, residual, gathered
):
    rows = teacher.numel() // teacher.shape[-1]
    others = rows if gathered is None else gathered.shape[0]
    saved = (rows + others) * (query.shape[1] + value.shape[1]) + heads * rows * others
    return query.new_empty(teacher.shape), query.new_empty((saved,))


def _fake_rows_backward(
    upstream, teacher, query, key, value, output, saved, heads, temperature, temperatures,
    residual, gathered, grads,
):  # fmt: skip
    def shape_if(bit, shape):
        return shape if grads & bit else (0,)

    return (
        teacher.new_empty(shape_if(GRAD_TEACHER, teacher.shape)),
        query.new_empty(shape_if(GRAD_TEMPERATURE, (teacher.numel() // teacher.shape[-1],))),
        *(x.new_empty(shape_if(GRAD_WEIGHTS, x.shape)) for x in (query, key, value, output)),
    )


_OPERATORS = (
    ("attention_coefficients", _COEFFICIENTS, _fake_coefficients),
    ("attention_coefficients_backward", _COEFFICIENTS_BACKWARD, _fake_coefficients_backward),
    ("attention", _FORWARD, _fake),
    ("attention_backward", _BACKWARD, _fake_backward),
    ("row_attention", _ROWS, _fake_rows),
    ("row_attention_backward", _ROWS_BACKWARD, _fake_rows_backward),
)
for _name, _schema, _fake_of in _OPERATORS:
    for _suffix in ("", "_triton"):
        torch.library.define(f"{NAMESPACE}::{_name}{_suffix}", _schema)
        torch.library.register_fake(f"{NAMESPACE}::{_name}{_suffix}", _fake_of)


def _operators(suffix: str) -> dict:
    return {name: getattr(torch.ops.kdkernels, name + suffix).default for name, *_ in _OPERATORS}


_compiled, _triton = _operators(""), _operators("_triton")


class Call(NamedTuple):
    """What both forms are given besides tensors."""

    name: str
    backend: str
    heads: int
    temperature: float  # where there is no tensor of it
    residual: bool

    def operator(self, name):
        return (_triton if self.backend == "triton" else _compiled)[name]


def _wanted(of_teacher, of_temperature, of_weights) -> int:
    return (
        GRAD_TEACHER * of_teacher
        | GRAD_TEMPERATURE * of_temperature
        | GRAD_COEFFICIENTS * any(of_weights)
    )


def _chosen(need, gradients, temperatures):
    """``gradients`` to (teacher, temperatures, *weights) for autograd, None where not needed."""
    gradients = list(gradients)
    if need[1] and temperatures.numel() == 1:
        gradients[1] = gradients[1].sum().reshape(1)
    return (grad if needed else None for grad, needed in zip(gradients, need, strict=True))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, teacher, temperatures, *weights):
        coefficients = call.operator("attention_coefficients")(*weights, call.heads)
        out, stats = call.operator("attention")(
            teacher, *coefficients, call.temperature, temperatures, call.residual, True
        )
        ctx.save_for_backward(teacher, temperatures, stats, *coefficients, *weights)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx, upstream):
        call = ctx.call
        refuse_higher_order(call.name)
        teacher, temperatures, stats, scores, values, *weights = ctx.saved_tensors
        need = ctx.needs_input_grad[1:]
        to_teacher, to_rows, *to_coefficients = call.operator("attention_backward")(
            upstream, teacher, scores, values, stats, call.temperature, temperatures,
            call.residual, _wanted(*need[:2], need[2:]),
        )  # fmt: skip
        to_weights = [None] * len(weights)
        if any(need[2:]):
            to_weights = call.operator("attention_coefficients_backward")(
                *to_coefficients, *weights, call.heads
            )
        return None, *_chosen(need, (to_teacher, to_rows, *to_weights), temperatures)


class _RowAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, gathered, teacher, temperatures, *weights):
        out, saved = _attend_rows(call, gathered, teacher, temperatures, weights)
        ctx.save_for_backward(gathered, saved, teacher, temperatures, *weights)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx, upstream):
        call = ctx.call
        refuse_higher_order(call.name)
        gathered, saved, teacher, temperatures, *weights = ctx.saved_tensors
        need = ctx.needs_input_grad[2:]
        gradients = call.operator("row_attention_backward")(
            upstream, teacher, *weights, saved, call.heads, call.temperature, temperatures,
            call.residual, gathered, _wanted(*need[:2], need[2:]),
        )  # fmt: skip
        return None, None, *_chosen(need, gradients, temperatures)


def _attend_rows(call, gathered, teacher, temperatures, weights):
    return call.operator("row_attention")(
        teacher, *weights, call.heads, call.temperature, temperatures, call.residual, gathered
    )


def _recorded(call: Call, tensors) -> bool:
    """Whether a gradient is needed; raises where there can be none."""
    refuse_transforms(call.name, tensors)
    if call.backend == "triton":
        register_triton("attention", "attention_weights", "row_attention")
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def classes(call: Call, teacher, temperatures, *weights) -> Tensor:
    """Classes attend to classes, from validated inputs.

    ``weights`` are query, key, value, output and the class embedding.
    """
    if _recorded(call, (teacher, temperatures, *weights)):
        return _Attention.apply(call, teacher, temperatures, *weights)
    coefficients = call.operator("attention_coefficients")(*weights, call.heads)
    return call.operator("attention")(
        teacher, *coefficients, call.temperature, temperatures, call.residual, False
    )[0]


def rows(call: Call, gathered, teacher, temperatures, *weights) -> Tensor:
    """Rows attend to rows: to each other, or to those ``gathered`` (M, K), already softened."""
    if _recorded(call, (teacher, temperatures, *weights)):
        return _RowAttention.apply(call, gathered, teacher, temperatures, *weights)
    return _attend_rows(call, gathered, teacher, temperatures, weights)[0]
