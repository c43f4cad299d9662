# SPDX-License-Identifier: Apache-2.0
"""Relations of feature maps: among samples, channels, positions, stages or modalities."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import backends, checks, ops, reference
from kdkernels.functional.features import REDUCTIONS, pair, same_size, stages
from kdkernels.ops.relation import GramChoices

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Stages = Tensor | Sequence[Tensor]


def _matched(name, backend, tensors, factor, choices, scales=(1.0, 1.0)) -> Tensor:
    """``factor ||G_s - G_t||^2`` of the products ``x x'``, or of ``x y'``, of either side."""
    with torch.autocast(tensors[0].device.type, enabled=False):
        if backend != "reference":
            return ops.relation.matched(name, tensors, factor, scales, choices)
        if len(tensors) == 2:
            tensors = [x for x in tensors for _ in range(2)]
        return reference.relation.matched(tensors[:2], tensors[2:], scales, choices) * factor


def sp_loss(
    student: Stages,
    teacher: Stages,
    *,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Similarity-preserving KD (arXiv 1907.09682) of features (B, ...), or of stages of them.

    With X the features as a matrix (B, -1) and G = X X', its rows divided by their L2 norms:
    ``||G^s - G^t||_F^2 / B^2``.

    compat:
        ``"paper"`` (also ``"mdistiller"``, ``"repdistiller"``): as above.
        ``"torchdistill"``: rows are divided by their L1 norms.
    """
    name = "sp_loss"
    checks.choice(name, "compat", compat, ("paper", "mdistiller", "repdistiller", "torchdistill"))
    checks.choice(name, "reduction", reduction, REDUCTIONS)
    choices = GramChoices(norm=1 if compat == "torchdistill" else 2, symmetric=True)
    loss = 0.0
    for s, t in stages(name, student, teacher):
        pair(name, s, t, shape="(B, ...)", same=None if s is None else (0,))
        chosen = backends.select("relation.gram_match", s.device.type, backend, name)
        s, t = s.flatten(1), t.flatten(1)
        if group is not None:
            from kdkernels.distributed import gather_rows

            s, t = gather_rows(group, s, t)
        factor = 1 / max(len(s), 1) ** 2 if reduction == "mean" else 1.0
        given = s.unsqueeze(0), t.unsqueeze(0)
        loss = loss + _matched(name, chosen, given, factor, choices)
    return loss


def ickd_loss(
    student: Stages, teacher: Stages, *, reduction: str = "mean", backend: str = "auto"
) -> Tensor:
    """Inter-channel correlations (arXiv 2202.03680) of maps (B, C, H, W), or of stages of them.

    With G = F F' (C, C) of each sample's channels over its positions, its rows divided by their L2
    norms: ``sum (G^s - G^t)^2 / (C B^2)``, as torchdistill has it. ``"sum"`` leaves out ``C B^2``.
    """
    name = "ickd_loss"
    checks.choice(name, "reduction", reduction, REDUCTIONS)
    loss = 0.0
    for s, t in stages(name, student, teacher):
        pair(name, s, t, shape="(B, C, H, W)", same=(0, 1))
        chosen = backends.select("relation.gram_match", s.device.type, backend, name)
        rows, channels = s.shape[:2]
        factor = 1 / (channels * max(rows, 1) ** 2) if reduction == "mean" else 1.0
        given, choices = (s.flatten(2), t.flatten(2)), GramChoices(norm=2, symmetric=True)
        loss = loss + _matched(name, chosen, given, factor, choices)
    return loss


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Gram matrices of modalities (arXiv 2112.11447): M features (B, M, D) of each sample.

    The mean over samples of ``||G^s - G^t||_F^2``, ``G_ij = f_i . f_j``, of features (B, M, D) and
    (B, M, D'); with ``normalize`` of unit vectors. Reconstructed from the paper.
    """
    name = "gram_loss"
    checks.choice(name, "reduction", reduction, REDUCTIONS)
    checks.flag(name, "normalize", normalize)
    pair(name, student, teacher, shape="(B, M, D)", same=(0, 1))
    backend = backends.select("relation.gram_match", student.device.type, backend, name)
    factor = 1 / max(len(student), 1) if reduction == "mean" else 1.0
    if normalize:
        dtype = ops.features.compute_dtype(student, teacher)
        student, teacher = (F.normalize(x.to(dtype), dim=2) for x in (student, teacher))
    given = student, teacher
    return _matched(name, backend, given, factor, GramChoices(symmetric=True))


def nst_loss(
    student: Stages, teacher: Stages, *, reduction: str = "mean", backend: str = "auto"
) -> Tensor:
    """Neuron selectivity (arXiv 1707.01219) of maps (B, C, H, W) and (B, C', H, W), or of stages.

    With every channel's map over its L2 norm, and ``k(a, b) = (a . b)^2``: the mean over samples of
    ``mean k(t, t) + mean k(s, s) - 2 mean k(s, t)`` over pairs of channels. As published, the
    teacher's own term ``k(t, t)`` has no gradient. The map of more height is pooled to the other's
    size. Computed by the smaller Gram matrices: C x C, or HW x HW.
    """
    name = "nst_loss"
    checks.choice(name, "reduction", reduction, REDUCTIONS)
    loss = 0.0
    for s, t in stages(name, student, teacher):
        pair(name, s, t, shape="(B, C, H, W)", same=(0,))
        chosen = backends.select("relation.nst_grams", s.device.type, backend, name)
        factor = 1 / max(len(s), 1) if reduction == "mean" else 1.0
        s, t = (x.flatten(2) for x in _pooled(s, t))
        with torch.autocast(s.device.type, enabled=False):
            if chosen == "reference":
                loss = loss + reference.relation.nst(s, t) * factor
            else:
                loss = loss + ops.relation.nst(name, s, t, factor)
    return loss


def fsp_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    reduction: str = "mean",
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Flow of the solution procedure (CVPR 2017) between consecutive stages (B, C, H, W).

    For each pair of neighbours, the one of more height pooled to the other's size, the matrices
    ``G = F_i F_(i+1)' / HW`` (C_i, C_(i+1)); the sum over pairs of ``mean (G^s - G^t)^2``, over
    samples and entries. Student and teacher have the same channels in each stage.

    compat:
        ``"paper"`` (also ``"repdistiller"``): as above, with adaptive average pooling.
        ``"torchdistill"``: adaptive max pooling, and the sum of the L2 norms of the columns of
        ``G^s - G^t``, over B.
    """
    name = "fsp_loss"
    checks.choice(name, "compat", compat, ("paper", "repdistiller", "torchdistill"))
    checks.choice(name, "reduction", reduction, REDUCTIONS)
    given = stages(name, student, teacher)
    if isinstance(student, Tensor) or len(given) < 2:
        raise ValueError(f"{name}: student and teacher must be sequences of at least 2 stages.")
    for s, t in given:
        pair(name, s, t, shape="(B, C, H, W)", same=(0, 1))
    by_column = compat == "torchdistill"
    loss = 0.0
    for (s_low, t_low), (s_high, t_high) in pairwise(given):
        chosen = backends.select("relation.gram_match", s_low.device.type, backend, name)
        tensors, scales = [], []
        for low, high in ((s_low, s_high), (t_low, t_high)):
            low, high = (x.flatten(2) for x in _pooled(low, high, by_column))
            # Norms are taken of rows.
            tensors += (high, low) if by_column else (low, high)
            scales.append(1 / low.shape[2])
        rows, channels = len(s_low), s_low.shape[1] * s_high.shape[1]
        divisor = max(rows, 1) * (1 if by_column else channels)
        factor = 1 / divisor if reduction == "mean" else 1.0
        choices = GramChoices(distance=by_column)
        loss = loss + _matched(name, chosen, tensors, factor, choices, scales)
    return loss


def _pooled(a: Tensor, b: Tensor, largest: bool = False) -> tuple[Tensor, Tensor]:
    """The one of more height pooled to the other's size, not in half precision."""
    if a.shape[2:] == b.shape[2:]:
        return a, b
    a, b = (x.to(ops.features.compute_dtype(x)) for x in (a, b))
    if not largest:
        return same_size(a, b)
    if a.shape[2] > b.shape[2]:
        return F.adaptive_max_pool2d(a, b.shape[2:]), b
    return a, F.adaptive_max_pool2d(b, a.shape[2:])
