# SPDX-License-Identifier: Apache-2.0
"""``kdkernels::ensemble``: KL divergences of M teachers, or of their mixture, from one student."""

from __future__ import annotations

import math

import torch

from kdkernels.divergences import REDUCTIONS, Choices, Numbers
from kdkernels.ops import NAMESPACE, register_triton
from kdkernels.ops.autograd import refuse_higher_order, refuse_transforms, row_gradients, scaled
from kdkernels.ops.rowwise import GRAD_ROWS, GRAD_STUDENT, GRAD_TEACHER

GRAD_WEIGHTS = 8  # with GRAD_ROWS: of teachers without weight too

# As the rowwise operator with kind forward_kl, where it is not said. teachers: M of (..., C), of
# one dtype. weights: (M, 1) or (M, N), those of a mixture with sum 1; 1 / M each by default.
_SCHEMA = (
    "(Tensor student, Tensor[] teachers, bool mixture, float[] numbers, int[] choices, int grads,"
    " Tensor? labels=None, Tensor? mask=None, Tensor? row_weight=None, Tensor? temperatures=None,"
    " Tensor? teacher_temperatures=None, Tensor? weights=None)"
    # grad_teachers: (M, ..., C), or of size 0. rows: (4 + M, N), those of the rowwise operator and
    # the gradients to the weights (a mixture's up to a constant, which their sum takes away).
    " -> (Tensor loss, Tensor grad_student, Tensor grad_teachers, Tensor rows)"
)
for _name in ("ensemble", "ensemble_triton"):
    torch.library.define(f"{NAMESPACE}::{_name}", _SCHEMA)


def compute_dtype(student: torch.Tensor, teachers) -> torch.dtype:
    """What rows are accumulated in: fp64 if any side is fp64, else fp32."""
    dtypes = (student.dtype, teachers[0].dtype)
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _fake(student, teachers, mixture, numbers, choices, grads, *_):
    dtype = compute_dtype(student, teachers)
    leading = student.shape[:-1]
    by_row = REDUCTIONS[Choices(*choices).reduction] == "none"
    loss = student.new_empty(leading if by_row else (), dtype=dtype)
    count = len(teachers)
    grad_student = student.new_empty(student.shape if grads & GRAD_STUDENT else (0,))
    grad_teachers = teachers[0].new_empty((count, *student.shape) if grads & GRAD_TEACHER else (0,))
    # math.prod and not Size.numel, which would make the number of rows a constant of the graph.
    shape = (4 + count, math.prod(leading)) if grads & GRAD_ROWS else (0,)
    return loss, grad_student, grad_teachers, student.new_empty(shape, dtype=dtype)


torch.library.register_fake(f"{NAMESPACE}::ensemble", _fake)
torch.library.register_fake(f"{NAMESPACE}::ensemble_triton", _fake)


def _operator(backend: str):
    if backend != "triton":
        return torch.ops.kdkernels.ensemble.default
    register_triton("ensemble")
    return torch.ops.kdkernels.ensemble_triton.default


_OTHERS = 6  # arguments of the autograd function before the teachers that need a gradient


class _Ensemble(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student, row_weight, temperatures, teacher_temperatures, weights, call, *sources
    ):
        name, operator, mixture, stacked, numbers, choices, labels, mask, teachers = call
        need = ctx.needs_input_grad
        need_teachers = any(need[_OTHERS:])
        if sources:
            teachers = sources[0].unbind(0) if stacked else sources
        half = (
            need[0] and student.dtype == torch.float16,
            need_teachers and teachers[0].dtype == torch.float16,
        )
        need_rows = any(need[1:5]) or half[0] or half[1]
        grads = (
            GRAD_STUDENT * need[0]
            | GRAD_TEACHER * need_teachers
            | GRAD_ROWS * need_rows
            | GRAD_WEIGHTS * need[4]
        )
        loss, grad_student, grad_teachers, rows = operator(
            student, teachers, mixture, numbers, choices, grads, labels, mask, row_weight,
            temperatures, teacher_temperatures, weights,
        )  # fmt: skip
        ctx.call = name, stacked, grads
        if grads == GRAD_STUDENT:
            ctx.save_for_backward(grad_student)
            return loss
        ctx.save_for_backward(grad_student, grad_teachers, rows)
        ctx.half, ctx.one_tau = half, numbers[1] == 0
        ctx.one_temperature = tuple(
            t is not None and t.numel() == 1 for t in (temperatures, teacher_temperatures)
        )
        ctx.by_teacher = weights is not None and weights.shape[1] == 1
        return loss

    @staticmethod
    def backward(ctx, upstream):
        name, stacked, grads = ctx.call
        refuse_higher_order(name)
        need = ctx.needs_input_grad
        gradients = [None] * len(need)
        if grads == GRAD_STUDENT:
            gradients[0] = scaled(*ctx.saved_tensors, upstream, None)
            return tuple(gradients)
        student, teachers, rows = ctx.saved_tensors
        if need[0]:
            gradients[0] = scaled(student, upstream, rows[3] if ctx.half[0] else None)
        if any(need[_OTHERS:]):
            count = teachers.shape[0]
            factor = rows[3].repeat(count) if ctx.half[1] else None
            each = upstream.expand(teachers.shape[:-1]) if upstream.dim() else upstream
            every = scaled(teachers, each, factor)
            gradients[_OTHERS:] = (every,) if stacked else every.unbind(0)
        gradients[1:4] = row_gradients(ctx, rows, upstream, need[1:4])
        if need[4]:
            grad = rows[4:] * upstream.reshape(-1)
            gradients[4] = grad.sum(1, keepdim=True) if ctx.by_teacher else grad
        return tuple(gradients)


def apply(
    name: str, student, teachers, stacked, weights, rows, mixture: bool, numbers: Numbers,
    choices: Choices,
) -> torch.Tensor:  # fmt: skip
    """Run the family's kernel on validated inputs, recording a gradient where one is needed.

    ``stacked``: the tensor (M, ..., C) of which the teachers are parts, where it is one.
    """
    sources = teachers if stacked is None else (stacked,)
    tensors = (
        student, rows.row_weight, rows.temperatures, rows.teacher_temperatures, weights,
    )  # fmt: skip
    refuse_transforms(name, (*tensors, *sources))
    operator = _operator(rows.backend)
    # As an operator's argument, a named tuple takes torch 0.5 us longer than a plain one.
    numbers, choices = tuple(numbers), tuple(choices)
    if torch.is_grad_enabled() and (
        student.requires_grad
        or any(t is not None and t.requires_grad for t in (*tensors[1:], *sources))
    ):
        if not any(t.requires_grad for t in sources):
            sources = ()  # torch takes its time for each argument
        call = (
            name, operator, mixture, stacked is not None, numbers, choices, rows.labels, rows.mask,
            None if sources else teachers,
        )  # fmt: skip
        return _Ensemble.apply(*tensors, call, *sources)
    return operator(
        student, teachers, mixture, numbers, choices, 0, rows.labels, rows.mask, *tensors[1:]
    )[0]
