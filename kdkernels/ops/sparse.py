# SPDX-License-Identifier: Apache-2.0
"""``kdkernels::sparse``: divergences from a teacher stored as its top-k values.

One operator serves the family, and returns the loss together with every gradient asked for, so that
the backward has only to scale.
"""

from __future__ import annotations

import math

import torch

from kdkernels.divergences import REDUCTIONS, TopKChoices, TopKNumbers
from kdkernels.ops import NAMESPACE, register_triton
from kdkernels.ops.autograd import refuse_higher_order, refuse_transforms, row_gradients, scaled
from kdkernels.ops.rowwise import GRAD_ROWS, GRAD_STUDENT, GRAD_TEACHER, compute_dtype

# `numbers` and `choices`: the fields of TopKNumbers and TopKChoices. indices: (N, k), contiguous.
_SCHEMA = (
    "(Tensor student, Tensor values, Tensor indices, float[] numbers, int[] choices, int grads,"
    " Tensor? labels=None, Tensor? mask=None, Tensor? row_weight=None, Tensor? temperatures=None,"
    " Tensor? teacher_temperatures=None, Tensor? logsumexp=None)"
)
# loss: 0-d, or one per row where reduction is "none". grad_student, grad_values: like these, or of
# size 0 where not asked for. rows (5, N), or of size 0: the gradients of the loss to row_weight,
# temperature, teacher_temperature and logsumexp, and the factor an fp16 gradient still lacks.
_RETURNS = "-> (Tensor loss, Tensor grad_student, Tensor grad_values, Tensor rows)"

for _name in ("sparse", "sparse_triton"):
    torch.library.define(f"{NAMESPACE}::{_name}", f"{_SCHEMA} {_RETURNS}")


def _fake(student, values, indices, numbers, choices, grads, *_):
    dtype = compute_dtype(student, values)
    leading = student.shape[:-1]
    by_row = REDUCTIONS[TopKChoices(*choices).reduction] == "none"
    loss = student.new_empty(leading if by_row else (), dtype=dtype)
    grad_student = student.new_empty(student.shape if grads & GRAD_STUDENT else (0,))
    grad_values = values.new_empty(values.shape if grads & GRAD_TEACHER else (0,))
    # math.prod and not Size.numel, which would make the number of rows a constant of the graph.
    rows = student.new_empty((5, math.prod(leading)) if grads & GRAD_ROWS else (0,), dtype=dtype)
    return loss, grad_student, grad_values, rows


torch.library.register_fake(f"{NAMESPACE}::sparse", _fake)
torch.library.register_fake(f"{NAMESPACE}::sparse_triton", _fake)


def _operator(backend: str):
    if backend != "triton":
        return torch.ops.kdkernels.sparse.default
    register_triton("sparse")
    return torch.ops.kdkernels.sparse_triton.default


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student, values, row_weight, temperatures, teacher_temperatures, logsumexp, indices,
        labels, mask, call,
    ):  # fmt: skip
        name, operator, numbers, choices = call
        need = ctx.needs_input_grad
        half = (
            need[0] and student.dtype == torch.float16,
            need[1] and values.dtype == torch.float16,
        )
        need_rows = need[2] or need[3] or need[4] or need[5] or half[0] or half[1]
        grads = GRAD_STUDENT * need[0] | GRAD_TEACHER * need[1] | GRAD_ROWS * need_rows
        loss, grad_student, grad_values, rows = operator(
            student, values, indices, numbers, choices, grads, labels, mask, row_weight,
            temperatures, teacher_temperatures, logsumexp,
        )  # fmt: skip
        ctx.save_for_backward(grad_student, grad_values, rows)
        ctx.name, ctx.half, ctx.one_tau = name, half, numbers[1] == 0
        ctx.one_temperature = tuple(
            t is not None and t.numel() == 1 for t in (temperatures, teacher_temperatures)
        )
        return loss

    @staticmethod
    def backward(ctx, upstream):
        refuse_higher_order(ctx.name)
        student, values, rows = ctx.saved_tensors
        need = ctx.needs_input_grad
        gradients = [None] * 10
        if need[0]:
            gradients[0] = scaled(student, upstream, rows[4] if ctx.half[0] else None)
        if need[1]:
            gradients[1] = scaled(values, upstream, rows[4] if ctx.half[1] else None)
        if any(need[2:6]):
            gradients[2:6] = row_gradients(ctx, rows, upstream, need[2:6])
        return tuple(gradients)


def apply(
    name: str, backend: str, student, values, indices, logsumexp, rows, numbers: TopKNumbers,
    choices: TopKChoices,
) -> torch.Tensor:  # fmt: skip
    """Run the family's kernel on validated inputs, recording a gradient where one is needed."""
    per_row = rows.row_weight, rows.temperatures, rows.teacher_temperatures, logsumexp
    tensors = (student, values, *per_row)
    refuse_transforms(name, tensors)
    operator = _operator(backend)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        call = name, operator, numbers, choices
        return _Sparse.apply(*tensors, indices, rows.labels, rows.mask, call)
    return operator(
        student, values, indices, numbers, choices, 0, rows.labels, rows.mask, *per_row
    )[0]
