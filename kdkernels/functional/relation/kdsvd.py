# SPDX-License-Identifier: Apache-2.0
"""Singular vectors of feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels import backends, checks, reference
from kdkernels.functional.features import REDUCTIONS, pair, stages


def kdsvd_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    k: int = 1,
    reduction: str = "mean",
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Self-supervised KD by singular value decomposition (arXiv 1807.06819) of maps (B, C, H, W).

    Each stage is a matrix, of which the teacher's first ``k`` right singular vectors are taken,
    times their singular values (over their norm), and for each of them that of the student's first
    ``k + 3`` which is nearest, with its sign. With ``r = exp(-(v_i - v_j)^2 / 8)`` over all pairs
    of entries of consecutive stages' vectors, the loss is the sum of ``(r^s - r^t)^2`` over B. The
    teacher has no gradient, as published; that of the student is finite for maps of zeros and for
    equal singular values, where the suites' is not. The teacher's signs are those of torch's
    decomposition.

    compat:
        ``"paper"`` (also ``"repdistiller"``): a matrix's rows are positions, its columns channels.
        ``"mdistiller"``: rows are channels and heights (CH), columns are widths.
    """
    name = "kdsvd_loss"
    checks.choice(name, "compat", compat, ("paper", "repdistiller", "mdistiller"))
    checks.choice(name, "reduction", reduction, REDUCTIONS)
    if checks.integer(name, "k", k) < 1:
        raise ValueError(f"{name}: k must be at least 1, got {k}.")
    given = stages(name, student, teacher)
    if isinstance(student, Tensor) or len(given) < 2:
        raise ValueError(f"{name}: student and teacher must be sequences of at least 2 stages.")
    matrices = []
    for s, t in given:
        columns = (0, 3) if compat == "mdistiller" else (0, 1)
        pair(name, s, t, shape="(B, C, H, W)", same=columns)
        matrices.append([_matrix(x, compat) for x in (s, t)])
    backends.select("relation.kdsvd_loss", given[0][0].device.type, backend, name)
    with torch.autocast(given[0][0].device.type, enabled=False):
        loss = reference.relation.kdsvd(matrices, k)
    return loss / max(len(given[0][0]), 1) if reduction == "mean" else loss


def _matrix(x: Tensor, compat: str) -> Tensor:
    return x.flatten(1, 2) if compat == "mdistiller" else x.flatten(2).mT
