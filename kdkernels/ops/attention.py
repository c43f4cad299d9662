# SPDX-License-Identifier: Apache-2.0
"""``kdkernels::attention``: classes attend to classes, within each row of logits.

A row's tokens differ from another's by one number each, its softened logits, so that all scores and
values come from one small matrix and one vector per head (see ``csrc/kd/attention.h``). Making
those from the weights is a few matrix products, torch's, and so is the way back; it is written out
here, since autograd would take twice the operators.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
from torch import Tensor

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


class Weights(NamedTuple):
    """As in :func:`kdkernels.functional.learning_simplifier`, all of one dtype."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    embedding: Tensor


def _product(a, b, width):  # (H, n, m) and (H, m, l)
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=width**-0.5)


def _coefficients(weights: Weights, heads: int):
    """Scores (H, K + 1, K + 1) and values (H, K + 1) of the classes, and of the logit as the last.

    A row's token is that of its class plus its softened logit times that of the logit, so their
    products by pairs are all that its scores are combined from. Also what the way back needs: what
    tokens are multiplied by, (D + 1, 2 H d + H), and the queries and keys (H, K + 1, d).
    """
    pairs = weights.query.shape[1]
    value = weights.value.unflatten(1, (heads, -1)).transpose(0, 1)
    value = (value @ weights.output.view(heads, -1, 1)).squeeze(-1)
    columns = torch.cat([weights.query, weights.key, value.t()], 1)
    products = torch.cat([weights.embedding @ columns[:-1], columns[-1:]])
    query, key, values = products.split([pairs, pairs, heads], 1)
    query, key = (x.unflatten(1, (heads, -1)).transpose(0, 1) for x in (query, key))
    scores = _product(query, key.mT, query.shape[-1])
    return scores, values.t().contiguous(), (columns, query, key)


def _to_weights(weights: Weights, saved, to_scores, to_values) -> Weights:
    """The gradients of the weights, from those of the coefficients."""
    columns, query, key = saved
    heads, _, width = query.shape
    pairs = heads * width
    to_query = _product(to_scores, key, width).transpose(0, 1).reshape(-1, pairs)
    to_key = _product(to_scores.mT, query, width).transpose(0, 1).reshape(-1, pairs)
    to_products = torch.cat([to_query, to_key, to_values.t()], 1)
    to_embedding = to_products[:-1] @ columns[:-1].t()
    to_columns = torch.cat([weights.embedding.t() @ to_products[:-1], to_products[-1:]])
    to_query, to_key, to_value = to_columns.split([pairs, pairs, heads], 1)
    to_value = to_value.unsqueeze(-1)  # (D + 1, H, 1)
    value = weights.value.unflatten(1, (heads, -1))
    return Weights(
        to_query,
        to_key,
        (to_value * weights.output.view(heads, -1)).flatten(1),
        (to_value * value).sum(0).view(-1, 1),
        to_embedding,
    )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, teacher, temperatures, call, *weights):
        _, operators, temperature, residual, heads = call
        scores, values, products = _coefficients(Weights(*weights), heads)
        out, stats = operators[0](
            teacher, scores, values, temperature, temperatures, residual, True
        )
        ctx.save_for_backward(teacher, scores, values, stats, temperatures, *products, *weights)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx, upstream):
        name, operators, temperature, residual, _ = ctx.call
        refuse_higher_order(name)
        teacher, scores, values, stats, temperatures, *saved = ctx.saved_tensors
        of_teacher, of_temperature, _, *of_weights = ctx.needs_input_grad
        grads = (
            GRAD_TEACHER * of_teacher
            | GRAD_COEFFICIENTS * any(of_weights)
            | GRAD_TEMPERATURE * of_temperature
        )
        to_teacher, to_rows, to_scores, to_values = operators[1](
            upstream, teacher, scores, values, stats, temperature, temperatures, residual, grads
        )
        if of_temperature and temperatures.numel() == 1:
            to_rows = to_rows.sum().reshape(1)
        to_weights = [None] * len(of_weights)
        if any(of_weights):
            to_weights = _to_weights(Weights(*saved[3:]), saved[:3], to_scores, to_values)
        return (
            to_teacher if of_teacher else None,
            to_rows if of_temperature else None,
            None,
            *(grad if need else None for grad, need in zip(to_weights, of_weights, strict=True)),
        )


def apply(
    name: str, backend: str, teacher, weights: Weights, heads: int, temperature: float,
    temperatures, residual: bool,
) -> Tensor:  # fmt: skip
    """Run the family's kernel on validated inputs, recording a gradient where one is needed."""
    tensors = (teacher, temperatures, *weights)
    refuse_transforms(name, tensors)
    if backend == "triton":
        _register_triton()
    operators = _triton if backend == "triton" else _compiled
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        call = (name, operators, temperature, residual, heads)
        return _Attention.apply(teacher, temperatures, call, *weights)
    scores, values, _ = _coefficients(weights, heads)
    return operators[0](teacher, scores, values, temperature, temperatures, residual, False)[0]
