# SPDX-License-Identifier: Apache-2.0
"""Losses between vectors, in plain torch: distances of rows, and attention to several of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops.features import compute_dtype


def _norm(x: Tensor) -> Tensor:
    """|x| of each row, accumulated in fp64, which no square leaves."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float64)


def _inverse(norm: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / |x|, 1 for a row of zeros."""
    inverse = 1 / torch.where(norm == 0, 1.0, norm)
    return inverse.clamp(max=torch.finfo(dtype).max).to(dtype)


class _UnitRows(torch.autograd.Function):
    """Rows over their norms, and these, which are constants to the gradient.

    (g - u <u, g>) / |x| by hand: autograd goes over x more often, by way of 1 / |x|^2.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        norm = _norm(x)
        return x * _inverse(norm, x.dtype), norm

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, upstream, _):
        x, unit, norm = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            norm = _norm(x)
        along = torch.linalg.vecdot(unit, upstream).unsqueeze(-1)
        return torch.addcmul(upstream, unit, along, value=-1) * _inverse(norm, x.dtype)


def unit_rows(x: Tensor) -> Tensor:
    """Rows over their L2 norms, whatever their size; a row of zeros stays, with a finite slope."""
    return _UnitRows.apply(x)[0]


def embedding(
    student: Tensor,  # (..., D)
    teacher: Tensor,  # (..., D)
    mask: Tensor | None,  # (...)
    distance: str,
    mean: bool,
) -> Tensor:
    """The sum or mean over the rows of a distance of each."""
    dtype = compute_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    count = student.numel() // student.shape[-1]
    count = max(count, 1) if mask is None else mask.sum().clamp(min=1)
    if mask is not None:
        student, teacher = (torch.where(mask.unsqueeze(-1), x, 0.0) for x in (student, teacher))
    if distance == "mse":
        total = F.mse_loss(student, teacher, reduction="sum")
        count = count * student.shape[-1]
    elif distance == "l2":
        total = torch.linalg.vector_norm(student - teacher, dim=-1).sum()
    else:
        # 1 - cos without cancellation; a row of zeros has cosine 0.
        (u, norm_u), (v, norm_v) = _UnitRows.apply(student), _UnitRows.apply(teacher)
        zeros = ((norm_u == 0).int() + (norm_v == 0)).squeeze(-1)
        if mask is not None:
            zeros = zeros * mask
        total = 0.5 * (F.mse_loss(u, v, reduction="sum") + zeros.sum())
    return total / count if mean else total


def attended(
    student: Tensor,  # (B, D)
    teacher: Tensor,  # (B, n, D)
    temperature: float,
    quantile: float,
    detach_weights: bool,
) -> Tensor:
    """The mean of the teacher's representations, weighted by their products with the student's."""
    scores = (teacher @ student.unsqueeze(-1)).squeeze(-1) / temperature
    weights = (scores.detach() if detach_weights else scores).softmax(-1)
    ranked, place = weights.detach().sort(-1).values, quantile * (weights.shape[-1] - 1)
    low, high = (ranked[..., bound, None] for bound in (math.floor(place), math.ceil(place)))
    least = torch.lerp(low, high, place % 1)
    weights = torch.where(weights >= least, weights, 0.0)
    weights = weights / weights.sum(-1, keepdim=True)
    return (weights.unsqueeze(1) @ teacher).squeeze(1)
