# SPDX-License-Identifier: Apache-2.0
"""Losses that compare the relations within student and teacher, in plain torch.

Sums as in the formulas; what their means divide by is up to the caller. No samples: 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops.features import compute_dtype
from kdkernels.ops.relation import CLAMP, NEAR, GramChoices, RKDChoices, RKDNumbers


def _wide(*tensors: Tensor) -> list[Tensor]:
    dtype = compute_dtype(*tensors)
    return [x.to(dtype) for x in tensors]


def _angles(x: Tensor) -> Tensor:
    """``u_ij . u_ik`` (B, B, B) of unit vectors between rows, 0 between coincident ones."""
    x = x - x.mean(0)
    lengths = x.square().sum(1)
    difference = x.unsqueeze(0) - x.unsqueeze(1)
    squared = difference.square().sum(2)
    near = squared <= NEAR * (lengths + lengths.unsqueeze(1))
    length = torch.where(near, 1.0, squared).sqrt()
    unit = torch.where(near, 0.0, 1.0).unsqueeze(2) * difference / length.unsqueeze(2)
    return unit @ unit.mT


def _distances(x: Tensor, power: float) -> Tensor:
    """Distances (B, B) over the mean of the positive ones, which are all off the diagonal."""
    rows = x.shape[0]
    x = x - x.mean(0)
    squared = (x.unsqueeze(0) - x.unsqueeze(1)).square().sum(2)
    length = torch.where(squared <= CLAMP, CLAMP, squared) ** power
    length = length * (1 - torch.eye(rows, dtype=x.dtype, device=x.device))
    return length / (length.sum() / max(rows * (rows - 1), 1) + (rows == 1))


def rkd(student: Tensor, teacher: Tensor, numbers: RKDNumbers, choices: RKDChoices) -> Tensor:
    """``numbers.distance`` and ``.angle`` times the sums of smooth L1 over pairs and triples."""
    student, teacher = _wide(student, teacher)
    loss = 0.0 * (student.sum() + teacher.sum())
    if student.shape[0] == 0:
        return loss
    if numbers.distance:
        of_both = (_distances(x, 1.0 if choices.squared else 0.5) for x in (student, teacher))
        loss = loss + numbers.distance * F.smooth_l1_loss(*of_both, reduction="sum")
    if numbers.angle:
        of_both = (_angles(x) for x in (student, teacher))
        loss = loss + numbers.angle * F.smooth_l1_loss(*of_both, reduction="sum")
    return loss


def pkt(student: Tensor, teacher: Tensor, eps: float) -> Tensor:
    """``sum_ij P_ij^t log((P_ij^t + eps) / (P_ij^s + eps))``."""

    def probabilities(x: Tensor) -> Tensor:
        unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + eps)
        similarity = (unit @ unit.mT + 1) / 2
        return similarity / similarity.sum(1, keepdim=True)

    p, q = (probabilities(x) for x in _wide(student, teacher))
    return (q * ((q + eps) / (p + eps)).log()).sum()


def neighbours(student: Tensor, teacher: Tensor) -> Tensor:
    """``sum_ik d_ik d_(i+1)k`` of the absolute differences d."""
    difference = torch.sub(*_wide(student, teacher)).abs()
    return (difference[:-1] * difference[1:]).sum()


def polynomial(
    student: Tensor, teacher: Tensor, coefficients: Sequence[float], norm: bool
) -> Tensor:
    """``||K(S S') - K(T T')||_F``, squared unless ``norm``, of a polynomial K of every entry."""

    def correlations(x: Tensor) -> Tensor:
        gram, value = x @ x.mT, 0.0
        for coefficient in reversed(coefficients):
            value = value * gram + coefficient
        return value

    difference = torch.sub(*(correlations(x) for x in _wide(student, teacher)))
    return torch.linalg.vector_norm(difference) if norm else difference.square().sum()


def matched(of_student: tuple[Tensor, Tensor], of_teacher, scales, choices: GramChoices) -> Tensor:
    """``||a G - b H||^2`` of Gram matrices ``G = x y'`` (n, R, C), or sums of their rows' norms.

    Rows may be divided by their L1 or L2 norm first.
    """
    grams = []
    for (x, y), scale in zip((of_student, of_teacher), scales, strict=True):
        x, y = _wide(x, y)
        gram = scale * (x @ y.mT)
        grams.append(F.normalize(gram, p=choices.norm, dim=2) if choices.norm else gram)
    difference = torch.sub(*grams)
    if choices.distance:
        return torch.linalg.vector_norm(difference, dim=2).sum()
    return difference.square().sum()


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Of channels (B, C, HW): the sum over samples of the polynomial kernel's MMD^2."""
    s, t = (F.normalize(x, dim=2) for x in _wide(student, teacher))
    by_positions = max(s.shape[1], t.shape[1]) > s.shape[2]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        # |A B'|^2 = <A'A, B'B>: by the smaller Gram matrices.
        square = (a.mT @ a) * (b.mT @ b) if by_positions else (a @ b.mT).square()
        return square.sum() / (a.shape[1] * b.shape[1])

    return kernel(t, t).detach() + kernel(s, s) - 2 * kernel(s, t)


def _right_vectors(x: Tensor, number: int) -> Tensor:
    """The first right singular vectors (n, columns, number) of ``x`` (n, rows, columns).

    In torch's signs. Their derivative leaves out what ties between singular values would divide by
    0: the vectors may turn within their common space.
    """
    with torch.no_grad():
        v = torch.linalg.svd(x, full_matrices=False).Vh.mT
    return _Turn.apply(x, v, number)


class _Turn(torch.autograd.Function):
    """The first columns of V, as a function of the matrix whose right singular vectors they are."""

    @staticmethod
    def forward(x, v, number):
        return v[..., :number].clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.number = inputs[2]

    @staticmethod
    def backward(ctx, upstream):
        x, v = ctx.saved_tensors
        number = ctx.number
        image = x @ v
        power = image.square().sum(-2)  # squared singular values
        first = power[..., :number]
        # In the span of V: v_j turns to v_i by (v_i . X'X' v_j) / (power_j - power_i).
        gap = first.unsqueeze(-2) - power.unsqueeze(-1)
        tie = 8 * torch.finfo(x.dtype).eps * power.amax(-1, keepdim=True)
        flat = gap.abs() <= tie.unsqueeze(-1)
        turn = torch.where(flat, 0.0, (v.mT @ upstream) / torch.where(flat, 1.0, gap))
        # Beyond it, where all singular values are 0.
        beyond = upstream - v @ (v.mT @ upstream)
        beyond = beyond / torch.where(first <= tie, torch.inf, first).unsqueeze(-2)
        of_square = (v @ turn + beyond) @ v[..., :number].mT
        return x @ (of_square + of_square.mT), None, None


def kdsvd(pairs: Sequence[tuple[Tensor, Tensor]], k: int) -> Tensor:
    """Of stages as matrices (B, rows, columns): see ``kdkernels.functional.kdsvd_loss``."""
    loss, before = 0.0, None
    for student, teacher in pairs:
        student, teacher = _wide(student, teacher.detach())
        v_s = _right_vectors(student, k + 3)
        _, values, right = torch.linalg.svd(teacher, full_matrices=False)
        v_t = right.mT[..., :k]
        cosine = v_s.detach().mT @ v_t
        size = cosine.abs()
        best = torch.where(size == size.amax(1, keepdim=True), cosine.sign(), 0.0)
        scale = F.normalize(values[:, :k], dim=1).unsqueeze(1)
        here = (v_s @ best) * scale, v_t * scale
        if before is not None:
            s, t = (
                (-(x.unsqueeze(2) - y.unsqueeze(1)).square() / 8).exp()
                for x, y in zip(here, before, strict=True)
            )
            loss = loss + (s - t).square().sum()
        before = here
    return loss
