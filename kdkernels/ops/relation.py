# SPDX-License-Identifier: Apache-2.0
"""Losses over relations: operators from embeddings (B, D), and from Gram matrices.

``rkd``, ``pkt``, ``polynomial`` and ``neighbours`` take the embeddings and do everything. Maps are
large enough for torch's matrix products, which are around ``gram_match`` and ``nst_grams``: these
take Gram matrices to the loss, and to the matrices that give its gradients as products again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.ops import features
from kdkernels.ops.features import compute_dtype

# Squared distances, as the suites have it, are no smaller; and rows are coincident, without a
# direction between them, below this fraction of their squared lengths about the mean.
CLAMP = 1e-12
NEAR = 1e-13
MOST_COEFFICIENTS = 16
EPS = 1e-12  # of torch.nn.functional.normalize


class RKDNumbers(NamedTuple):
    distance: float = 0.0
    angle: float = 0.0


class RKDChoices(NamedTuple):
    squared: bool = False  # distances


class GramChoices(NamedTuple):
    norm: int = 0  # that rows are divided by: none, 1 or 2
    distance: bool = False  # the sum of the rows' norms, where else that of squares
    symmetric: bool = False  # both factors of the Gram matrices are one tensor


features.define("rkd", "student", "teacher")
features.define("pkt", "student", "teacher")
features.define("polynomial", "student", "teacher", triton=False)
features.define("neighbours", "student", "teacher", triton=False)
# Of Gram matrices (n, R, C); with `symmetric`, gradients G come as G + G'.
features.define("gram_match", "student", "teacher", triton=False)
# Of S S' (n, C, C), S T' (n, C, D) and T T' (n, D, D): numbers are 1 / C and 1 / D. Gradients to
# the symmetric ones come as G + G'; that to T T' leaves out the teacher's own term.
features.define("nst_grams", "student", "cross", "teacher", triton=False)

_ops = torch.ops.kdkernels


def _sum(like: Tensor, *products: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of matrix products, laid out in memory as ``like``."""
    transposed = like.stride(-1) != 1
    if transposed:
        products = tuple((b.mT, a.mT) for a, b in products)
    total = products[0][0] @ products[0][1]
    for a, b in products[1:]:
        total.baddbmm_(a, b)
    return total.mT if transposed else total


def _finished(tensors, loss: Tensor, gradients) -> tuple[Tensor, ...]:
    """What an operator returns, of ``gradients`` that are None where not needed."""
    return loss, *(
        x.new_empty(0) if gradient is None else gradient.to(features.gradient_dtype(x))
        for x, gradient in zip(tensors, gradients, strict=True)
    )


def _matched(*given) -> tuple[Tensor, ...]:
    """From ``x_s, x_t``, or ``x_s, y_s, x_t, y_t``, whose products ``x y'`` are the matrices."""
    *tensors, factor, scales, choices, grads = given
    dtype = compute_dtype(*tensors)
    half = len(tensors) // 2
    sides = [[x.to(dtype) for x in side] for side in (tensors[:half], tensors[half:])]
    needed = sum(1 << i for i in (0, 1) if grads >> i * half & (1 << half) - 1)
    loss, *slopes = _ops.gram_match.default(
        *(side[0] @ side[-1].mT for side in sides), factor, scales, choices, needed
    )
    gradients = []
    for (x, y), slope in zip(((s[0], s[-1]) for s in sides), slopes, strict=True):
        need = grads >> len(gradients)
        gradients.append(_sum(x, (slope, y)) if need & 1 else None)
        if half == 2:
            gradients.append(_sum(y, (slope.mT, x)) if need & 2 else None)
    return _finished(tensors, loss, gradients)


def _nst_by_channels(student, teacher, factor, numbers, choices, grads):
    tensors = student, teacher
    s, t = (x.to(compute_dtype(*tensors)) for x in tensors)
    needed = 3 * (grads & 1) | 3 * (grads & 2)  # the cross is for both
    loss, of_student, cross, of_teacher = _ops.nst_grams.default(
        s @ s.mT, s @ t.mT, t @ t.mT, factor, numbers, (), needed
    )
    gradients = (
        _sum(s, (of_student, s), (cross, t)) if grads & 1 else None,
        _sum(t, (cross.mT, s), (of_teacher, t)) if grads & 2 else None,
    )
    return _finished(tensors, loss, gradients)


def _nst_by_positions(student, teacher, factor, numbers, choices, grads):
    tensors = student, teacher
    wide = [x.to(compute_dtype(*tensors)) for x in tensors]
    lengths = [torch.linalg.vector_norm(x, dim=2, keepdim=True) for x in wide]
    units = [x / length.clamp(min=EPS) for x, length in zip(wide, lengths, strict=True)]
    grams = [x.mT @ x for x in units]
    loss, slope, _ = _ops.gram_match.default(
        *grams, factor, numbers, GramChoices(symmetric=True), grads & 1
    )
    # The teacher's own term is a constant.
    slopes = slope, grams[0].mul_(-4 * numbers[0] * numbers[1] * factor) if grads & 2 else None
    gradients = []
    for i, (unit, length) in enumerate(zip(units, lengths, strict=True)):
        if not grads >> i & 1:
            gradients.append(None)
            continue
        g = _sum(unit, (unit, slopes[i]))
        along = torch.where(length > EPS, (g * unit).sum(2, keepdim=True), 0.0)
        gradients.append(g.addcmul_(unit, along, value=-1).div_(length.clamp(min=EPS)))
    return _finished(tensors, loss, gradients)


def embeddings(
    function: str, operator: str, backend: str, student: Tensor, teacher: Tensor, factor: float,
    numbers, choices=(),
) -> Tensor:  # fmt: skip
    """The loss of embeddings (B, D) by one of the operators that take them."""
    given = (student, teacher), factor, numbers, choices
    if backend != "triton":
        return features.call(function, f"relation.{operator}", backend, *given)
    with torch.autocast(student.device.type, enabled=False):  # torch's products are in it
        return features.call(function, f"relation.{operator}", backend, *given)


def matched(
    function: str, tensors, factor: float, scales, choices: GramChoices
) -> Tensor:  # fmt: skip
    """As ``kdkernels.reference.relation.matched``, of ``x_s, x_t`` or ``x_s, y_s, x_t, y_t``."""
    return features.differentiable(function, _matched, tensors, factor, scales, choices)


def nst(function: str, student: Tensor, teacher: Tensor, factor: float) -> Tensor:
    """As ``kdkernels.reference.relation.nst``: by the smaller Gram matrices."""
    channels = student.shape[1], teacher.shape[1]
    run = _nst_by_channels if max(channels) <= student.shape[2] else _nst_by_positions
    numbers = [1 / n for n in channels]
    return features.differentiable(function, run, (student, teacher), factor, numbers, ())
