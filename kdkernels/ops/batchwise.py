# SPDX-License-Identifier: Apache-2.0
"""``kdkernels::dist`` and ``kdkernels::mlkd_*``: losses that relate a batch's rows.

DIST is one operator. MLKD is three; in Triton, the relations between the softmax and the gradient
are an operator among matrix products, which are torch's.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.ops import NAMESPACE, register_triton
from kdkernels.ops.autograd import refuse_higher_order, refuse_transforms, scaled
from kdkernels.ops.rowwise import (
    GRAD_ROWS,
    GRAD_STUDENT,
    GRAD_TEACHER,
    compute_dtype,
)

GRAD_TEMPERATURE = 8
MOST_TEMPERATURES = 16


class DistNumbers(NamedTuple):
    temperature: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0


class DistChoices(NamedTuple):
    t2: bool = True
    clamp: bool = False  # the norms, where else eps is added to their product


# grad_student, grad_teacher: like the logits; grad_temperature (1,); row_factor (2, N): what fp16
# gradients of either side lack. Of size 0 where not asked for.
_DIST = (
    "(Tensor student, Tensor teacher, float[] numbers, int[] choices, int grads,"
    " Tensor? mask=None, Tensor? temperature=None) -> (Tensor loss, Tensor grad_student,"
    " Tensor grad_teacher, Tensor grad_temperature, Tensor row_factor)"
)
# soft (T, 2, N, C): p_s and p_s - p_t at each temperature; kl (N,): sum of T^2 KL(p_t || p_s).
_SOFTMAX = (
    "(Tensor student, Tensor teacher, float[] temperatures, Tensor? mask=None)"
    " -> (Tensor soft, Tensor kl)"
)
# Triton's relations: from the Gram matrices (T, N, N) P D', D D' and P P' of P = p_s and
# D = p_s - p_t, with weights of the relations of the rows and of the columns, to their loss and its
# gradients as matrices:
# `student` (2, T, N, N) gives that to p_s as student[0] P + student[1] D, `teacher` that to p_t.
# Where only some rows (`chosen`, (N,) 0 or 1) and columns are selected, these are the matrices of
# the selected columns, `near_pd` and `near_dd` of all, and `near` (T, N, N) P is the gradient of
# the rows' relations to p_s, - near (P - D) that to p_t. Of size 0 where there is none.
_GRAMS = (
    "(Tensor pd, Tensor dd, Tensor pp, float[] weights, int grads, Tensor? scale=None,"
    " Tensor? near_pd=None, Tensor? near_dd=None, Tensor? chosen=None)"
    " -> (Tensor loss, Tensor student, Tensor teacher, Tensor near)"
)
# The CPU's, at once: from `soft` and the selections of rows and classes to the loss and the
# relations' gradients (T, N, C) to p_s and p_t. Of size 0 where not asked for.
_RELATE = (
    "(Tensor soft, float[] weights, int grads, Tensor? scale=None, Tensor? samples=None,"
    " Tensor? classes=None) -> (Tensor loss, Tensor student, Tensor teacher)"
)
# From the relations' gradient to p_s or p_t (T, N, C), if any, and, to the student alone, the
# weight of each row's KL, the gradient to that side's logits; row_factor (N,) if that is fp16, else
# of size 0.
_GRADIENT = (
    "(Tensor logits, Tensor soft, Tensor? relations, Tensor row_weight,"
    " float[] temperatures, bool of_teacher, Tensor? mask=None)"
    " -> (Tensor grad, Tensor row_factor)"
)


def _fake_dist(student, teacher, numbers, choices, grads, mask=None, temperature=None):
    dtype = compute_dtype(student, teacher)
    rows = math.prod(student.shape[:-1])
    return (
        student.new_empty((), dtype=dtype),
        student.new_empty(student.shape if grads & GRAD_STUDENT else (0,)),
        teacher.new_empty(teacher.shape if grads & GRAD_TEACHER else (0,)),
        student.new_empty((1,) if grads & GRAD_TEMPERATURE else (0,), dtype=dtype),
        student.new_empty((2, rows) if grads & GRAD_ROWS else (0,), dtype=dtype),
    )


def _fake_softmax(student, teacher, temperatures, mask=None):
    dtype = compute_dtype(student, teacher)
    rows, classes = math.prod(student.shape[:-1]), student.shape[-1]
    soft = student.new_empty((len(temperatures), 2, rows, classes), dtype=dtype)
    return soft, soft.new_empty((rows,))


def _fake_gradient(logits, soft, relations, row_weight, temperatures, of_teacher, mask=None):
    half = logits.dtype == torch.float16
    return logits.new_empty(logits.shape), soft.new_empty(soft.shape[2] if half else 0)


def _fake_grams(pd, dd, pp, weights, grads, scale=None, near_pd=None, near_dd=None, chosen=None):
    return (
        pd.new_empty(()),
        pd.new_empty((2, *pd.shape) if grads & GRAD_STUDENT else (0,)),
        pd.new_empty((2, *pd.shape) if grads & GRAD_TEACHER else (0,)),
        pd.new_empty(pd.shape if chosen is not None else (0,)),
    )


def _fake_relate(soft, weights, grads, scale=None, samples=None, classes=None):
    shape = (soft.shape[0], *soft.shape[2:])
    return (
        soft.new_empty(()),
        soft.new_empty(shape if grads & GRAD_STUDENT else (0,)),
        soft.new_empty(shape if grads & GRAD_TEACHER else (0,)),
    )


for _name, _schema, _fake in (
    ("dist", _DIST, _fake_dist),
    ("dist_triton", _DIST, _fake_dist),
    ("mlkd_softmax", _SOFTMAX, _fake_softmax),
    ("mlkd_softmax_triton", _SOFTMAX, _fake_softmax),
    ("mlkd_relate", _RELATE, _fake_relate),
    ("mlkd_grams_triton", _GRAMS, _fake_grams),
    ("mlkd_gradient", _GRADIENT, _fake_gradient),
    ("mlkd_gradient_triton", _GRADIENT, _fake_gradient),
):
    torch.library.define(f"{NAMESPACE}::{_name}", _schema)
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake)

_ops = torch.ops.kdkernels
_dist_compiled, _dist_triton = _ops.dist.default, _ops.dist_triton.default


def _needs_gradient(student: Tensor, teacher: Tensor, temperature: Tensor | None = None) -> bool:
    return torch.is_grad_enabled() and (
        student.requires_grad
        or teacher.requires_grad
        or (temperature is not None and temperature.requires_grad)
    )


class _Dist(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, temperature, mask, call):
        operator, numbers, choices = call
        need = ctx.needs_input_grad
        half = (need[0] and student.dtype == torch.float16) or (
            need[1] and teacher.dtype == torch.float16
        )
        grads = (
            GRAD_STUDENT * need[0] | GRAD_TEACHER * need[1] | GRAD_TEMPERATURE * need[2]
            | GRAD_ROWS * half
        )  # fmt: skip
        loss, *gradients = operator(student, teacher, numbers, choices, grads, mask, temperature)
        ctx.grads = grads
        if grads == GRAD_STUDENT:
            ctx.save_for_backward(gradients[0])
            return loss
        ctx.save_for_backward(*gradients)
        ctx.half = half
        return loss

    @staticmethod
    def backward(ctx, upstream):
        refuse_higher_order("dist_loss")
        if ctx.grads == GRAD_STUDENT:
            return scaled(*ctx.saved_tensors, upstream, None), None, None, None, None
        student, teacher, temperature, row_factor = ctx.saved_tensors
        need = ctx.needs_input_grad
        factors = row_factor if ctx.half else (None, None)
        return (
            scaled(student, upstream, factors[0] if student.dtype == torch.float16 else None)
            if need[0]
            else None,
            scaled(teacher, upstream, factors[1] if teacher.dtype == torch.float16 else None)
            if need[1]
            else None,
            temperature * upstream if need[2] else None,
            None,
            None,
        )


def dist(
    backend: str, student, teacher, mask, temperature, numbers: DistNumbers, choices: DistChoices
) -> Tensor:  # fmt: skip
    """DIST of validated logits (..., C); ``mask`` (N,) and ``temperature`` (1,) may be None."""
    refuse_transforms("dist_loss", (student, teacher, temperature))
    if backend == "triton":
        register_triton("batchwise")
    operator = _dist_triton if backend == "triton" else _dist_compiled
    # As an operator's argument, a named tuple takes torch 0.5 us longer than a plain one.
    numbers, choices = tuple(numbers), tuple(choices)
    if _needs_gradient(student, teacher, temperature):
        return _Dist.apply(student, teacher, temperature, mask, (operator, numbers, choices))
    return operator(student, teacher, numbers, choices, 0, mask, temperature)[0]


class Relations(NamedTuple):
    """What weighs MLKD's terms: numbers or 0-d tensors; None where all samples or classes count."""

    row_weight: Tensor  # (N,) of T^2 KL
    weights: tuple[float, float]  # of || P P' - Q Q' ||^2 and || P' P - Q' Q ||^2,
    scale: Tensor | None  # (2,) times these
    samples: Tensor | None  # (N,) 0 or 1
    classes: Tensor | None  # (C,)


def _relate(triton: bool, soft, relations: Relations, need):
    """The loss of the relations, and its gradients to the probabilities (T, N, C) where needed.

    Both kinds by the smaller Gram matrices; where there are fewer classes than samples, rows and
    columns change their parts.
    """
    grads = GRAD_STUDENT * need[0] | GRAD_TEACHER * need[1]
    weights, scale, near, far = relations[1:]
    if not triton:
        loss, *gradients = _ops.mlkd_relate.default(soft, weights, grads, scale, near, far)
        return loss, [g if need[i] else None for i, g in enumerate(gradients)]
    p, d = soft[:, 0], soft[:, 1]
    wide = p.shape[1] <= p.shape[2]
    if not wide:
        p, d, weights, near, far = p.mT, d.mT, weights[::-1], far, near
        scale = None if scale is None else scale.flip(0)
    of_near = (None, None) if near is None else (p @ d.mT, d @ d.mT)
    p_far, d_far = (p, d) if far is None else (p * far, d * far)
    loss, student, teacher, of_rows = _ops.mlkd_grams_triton.default(
        p_far @ d_far.mT, d_far @ d_far.mT, p_far @ p_far.mT, weights,
        grads, scale, *of_near, near,
    )  # fmt: skip
    gradients = [None, None]
    for side, matrices in enumerate((student, teacher)):
        if not need[side]:
            continue
        g = torch.baddbmm(matrices[0] @ p_far, matrices[1], d_far)
        if near is not None:
            g = torch.baddbmm(g, of_rows, p if side == 0 else d - p)
        gradients[side] = (g if wide else g.mT).contiguous()
    return loss, gradients


def _mlkd(backend, student, teacher, mask, temperatures, relations: Relations, need):
    """The loss and its gradients with what fp16 gradients lack."""
    triton = backend == "triton"
    softmax = _ops.mlkd_softmax_triton if triton else _ops.mlkd_softmax
    gradient = _ops.mlkd_gradient_triton if triton else _ops.mlkd_gradient
    soft, kl = softmax.default(student, teacher, temperatures, mask)
    weight = relations.row_weight
    loss = torch.where(weight != 0, weight * kl, 0.0).sum()
    to_probabilities = None, None
    if any(relations.weights):
        value, to_probabilities = _relate(triton, soft, relations, need)
        loss = loss + value
    found = []
    for side in (0, 1):
        found += (
            gradient.default(
                (student, teacher)[side], soft, to_probabilities[side], weight, temperatures,
                side == 1, mask,
            )
            if need[side]
            else (None, None)
        )  # fmt: skip
    return loss, *found


class _MLKD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, mask, call):
        backend, temperatures, relations = call
        loss, *saved = _mlkd(
            backend, student, teacher, mask, temperatures, relations, ctx.needs_input_grad[:2]
        )
        ctx.save_for_backward(*saved)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        refuse_higher_order("mlkd_loss")
        saved = ctx.saved_tensors
        gradients = [
            None if grad is None else scaled(grad, upstream, factor if factor.numel() else None)
            for grad, factor in (saved[:2], saved[2:])
        ]
        return *gradients, None, None


def mlkd(
    backend: str, student, teacher, mask, temperatures: tuple[float, ...], relations: Relations
) -> Tensor:
    """MLKD of validated logits (..., C); ``mask`` (N,) may be None."""
    refuse_transforms("mlkd_loss", (student, teacher))
    if backend == "triton":
        register_triton("batchwise")
    if _needs_gradient(student, teacher):
        return _MLKD.apply(student, teacher, mask, (backend, temperatures, relations))
    return _mlkd(backend, student, teacher, mask, temperatures, relations, (False, False))[0]
