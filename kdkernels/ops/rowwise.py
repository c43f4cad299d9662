# SPDX-License-Identifier: Apache-2.0
"""``kdkernels::rowwise``: row-wise softmax divergences, mixed with cross-entropy.

One operator serves the family. It reads both rows, and returns the loss together with every
gradient asked for, so that the backward has only to scale.
"""

from __future__ import annotations

import math

import torch

from kdkernels.divergences import REDUCTIONS, Choices, Numbers
from kdkernels.ops import NAMESPACE, register_triton
from kdkernels.ops.autograd import (
    refuse_higher_order,
    refuse_transforms,
    row_gradients,
    scale_in_place,
    scaled,
)

GRAD_STUDENT, GRAD_TEACHER, GRAD_ROWS, GRAD_PARTS = 1, 2, 4, 8

# Saved fp16 gradients are per row, times this: a gradient already divided by the number of rows
# would be lost to fp16's underflow before a GradScaler's factor reaches it in the backward.
HALF_BOOST = 256.0

# `numbers` and `choices`: the fields of Numbers and Choices, or their first few.
_SCHEMA = (
    "(Tensor student, Tensor teacher, float[] numbers, int[] choices, int grads,"
    " Tensor? labels=None, Tensor? mask=None, Tensor? row_weight=None,"
    " Tensor? temperatures=None, Tensor? teacher_temperatures=None, Tensor? targets=None)"
)
# loss: 0-d, or one per row where reduction is "none". grad_student, grad_teacher: like the logits,
# or of size 0 where not asked for. rows (4, N), or of size 0: the gradients of the loss to
# row_weight, temperature and teacher_temperature, and the factor an fp16 gradient still lacks;
# with GRAD_PARTS (6, N), and what the target and the divergence contribute to the loss.
_RETURNS = "-> (Tensor loss, Tensor grad_student, Tensor grad_teacher, Tensor rows)"

for _name in ("rowwise", "rowwise_triton"):
    torch.library.define(f"{NAMESPACE}::{_name}", f"{_SCHEMA} {_RETURNS}")
    torch.library.define(
        f"{NAMESPACE}::{_name}_inplace",
        _SCHEMA.replace("Tensor student", "Tensor(a!) student", 1)
        + " -> (Tensor loss, Tensor grad_teacher, Tensor rows)",
    )


def compute_dtype(student: torch.Tensor, teacher: torch.Tensor) -> torch.dtype:
    """What rows are accumulated in: fp64 if either side is fp64, else fp32."""
    return torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32


def _fake(student, teacher, numbers, choices, grads, *_):
    dtype = compute_dtype(student, teacher)
    leading = student.shape[:-1]
    by_row = REDUCTIONS[Choices(*choices).reduction] == "none"
    loss = student.new_empty(leading if by_row else (), dtype=dtype)
    grad_student = student.new_empty(student.shape if grads & GRAD_STUDENT else (0,))
    grad_teacher = teacher.new_empty(teacher.shape if grads & GRAD_TEACHER else (0,))
    # math.prod and not Size.numel, which would make the number of rows a constant of the graph.
    shape = (6 if grads & GRAD_PARTS else 4, math.prod(leading)) if grads & GRAD_ROWS else (0,)
    rows = student.new_empty(shape, dtype=dtype)
    return loss, grad_student, grad_teacher, rows


torch.library.register_fake(f"{NAMESPACE}::rowwise", _fake)
torch.library.register_fake(f"{NAMESPACE}::rowwise_triton", _fake)


def _fake_inplace(*args):
    loss, _, grad_teacher, rows = _fake(*args)
    return loss, grad_teacher, rows


torch.library.register_fake(f"{NAMESPACE}::rowwise_inplace", _fake_inplace)
torch.library.register_fake(f"{NAMESPACE}::rowwise_triton_inplace", _fake_inplace)

_ops = torch.ops.kdkernels
_compiled = (_ops.rowwise.default, _ops.rowwise_inplace.default)
_triton = (_ops.rowwise_triton.default, _ops.rowwise_triton_inplace.default)


def _operator(backend: str, inplace: bool):
    if backend in ("triton", "cuda"):
        register_triton("rowwise")  # of either backend, the scaling in the backward
    # torch 2.10's Dynamo knows no bool as an index
    return (_triton if backend == "triton" else _compiled)[int(inplace)]


_NO_GRADIENT = (None,) * 6  # one per argument of the autograd functions


class _Rowwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, row_weight, temperatures, teacher_temperatures, call):
        name, operator, numbers, choices, parts, labels, mask, targets = call
        need = ctx.needs_input_grad
        half = (
            need[0] and student.dtype == torch.float16,
            need[1] and teacher.dtype == torch.float16,
        )
        need_rows = need[2] or need[3] or need[4] or half[0] or half[1]
        grads = GRAD_STUDENT * need[0] | GRAD_TEACHER * need[1] | GRAD_ROWS * need_rows | parts
        loss, grad_student, grad_teacher, rows = operator(
            student, teacher, numbers, choices, grads, labels, mask, row_weight, temperatures,
            teacher_temperatures, targets,
        )  # fmt: skip
        if grads == GRAD_STUDENT:
            ctx.save_for_backward(grad_student)
            ctx.call = name, grads
            return loss
        ctx.save_for_backward(grad_student, grad_teacher, rows)
        ctx.call = name, grads
        ctx.half, ctx.one_tau = half, numbers[1] == 0
        ctx.one_temperature = tuple(
            t is not None and t.numel() == 1 for t in (temperatures, teacher_temperatures)
        )
        if not parts:
            return loss
        shares = rows[4:].clone()
        ctx.mark_non_differentiable(shares)
        return loss, shares

    @staticmethod
    def backward(ctx, upstream, *_):
        name, grads = ctx.call
        refuse_higher_order(name)
        if grads == GRAD_STUDENT:
            (student,) = ctx.saved_tensors
            return scaled(student, upstream, None), *_NO_GRADIENT[1:]
        student, teacher, rows = ctx.saved_tensors
        need = ctx.needs_input_grad
        gradients = [*_NO_GRADIENT]
        if need[0]:
            gradients[0] = scaled(student, upstream, rows[3] if ctx.half[0] else None)
        if need[1]:
            gradients[1] = scaled(teacher, upstream, rows[3] if ctx.half[1] else None)
        if any(need[2:5]):
            gradients[2:5] = row_gradients(ctx, rows, upstream, need[2:5])
        return tuple(gradients)


class _RowwiseInplace(torch.autograd.Function):
    """The gradient overwrites the student's logits, so that it costs no memory at all."""

    @staticmethod
    def forward(ctx, student, teacher, row_weight, temperatures, teacher_temperatures, call):
        name, operator, numbers, choices, _, labels, mask, targets = call
        half = student.dtype == torch.float16
        buffer = student.detach()
        loss, _, rows = operator(
            buffer, teacher, numbers, choices, GRAD_STUDENT | (GRAD_ROWS if half else 0), labels,
            mask, row_weight, temperatures, teacher_temperatures, targets,
        )  # fmt: skip
        torch.autograd.graph.increment_version(student)
        ctx.buffer, ctx.version = buffer, student._version
        ctx.row_factor = rows[3] if half else None
        ctx.name = name
        return loss

    @staticmethod
    def backward(ctx, upstream):
        refuse_higher_order(ctx.name)
        grad, ctx.buffer = ctx.buffer, None
        if grad is None:
            raise RuntimeError(
                f"{ctx.name}: inplace=True allows one backward; the first one has used the buffer."
            )
        if grad._version != ctx.version:
            raise RuntimeError(
                f"{ctx.name}: the student's logits were modified after inplace=True had stored the "
                f"gradient in them (version {grad._version}, expected {ctx.version})."
            )
        scale_in_place(grad, upstream, ctx.row_factor)
        return grad, *_NO_GRADIENT[1:]


def apply(
    name: str, backend: str, student, teacher, rows, targets, numbers: Numbers, choices: Choices,
    inplace: bool, parts: bool,
):  # fmt: skip
    """Run the family's kernel on validated inputs, recording a gradient where one is needed.

    The loss, with ``parts`` followed by what target and divergence contribute to it.
    """
    tensors = (student, teacher, rows.row_weight, rows.temperatures, rows.teacher_temperatures)
    refuse_transforms(name, tensors)
    recording = torch.is_grad_enabled() and (
        student.requires_grad or any(t is not None and t.requires_grad for t in tensors[1:])
    )
    wanted = (GRAD_ROWS | GRAD_PARTS) * parts
    operator = _operator(backend, inplace and recording)
    by_row = REDUCTIONS[choices.reduction] == "none"
    # As an operator's argument, a named tuple takes torch 0.5 us longer than a plain one.
    numbers, choices = tuple(numbers), tuple(choices)
    if inplace and recording:
        if not student.requires_grad or any(t is not None and t.requires_grad for t in tensors[1:]):
            raise NotImplementedError(
                f"{name}: inplace=True gives a gradient to the student alone; another "
                "argument requires one."
            )
        if parts:
            raise NotImplementedError(f"{name}: inplace=True has no return_parts=True.")
    if recording:
        function = _RowwiseInplace if inplace else _Rowwise
        call = name, operator, numbers, choices, wanted, rows.labels, rows.mask, targets
        result = function.apply(*tensors, call)
        if not parts:
            return result
        loss, shares = result
    else:
        loss, _, _, per_row = operator(
            student, teacher, numbers, choices, wanted, rows.labels, rows.mask, *tensors[2:],
            targets,
        )  # fmt: skip
        if not parts:
            return loss
        shares = per_row[4:]
    if by_row:
        return loss, *shares.view(2, *student.shape[:-1])
    return loss, *shares.sum(-1).to(loss.dtype)
