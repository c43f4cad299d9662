# SPDX-License-Identifier: Apache-2.0
"""Differences of maps at several spatial resolutions, and over positions as a distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from kdkernels import backends, checks, ops, reference
from kdkernels.functional import features
from kdkernels.functional.rowwise import kl_div
from kdkernels.ops.maps.pyramid import MOST_LEVELS


def hcl_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    levels: Sequence[int] = (4, 2, 1),
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Hierarchical context loss of knowledge review (arXiv 2104.09044): MSE at several sizes.

    With ``D = student - teacher``: ``mean D^2`` plus, for each level l smaller than H, ``2^-k mean
    pool_l(D)^2``, k counting the levels used, ``pool_l`` adaptive average pooling to (l, l), whose
    bins overlap where l does not divide the size; all divided by the sum of the weights.
    ``reduction="sum"`` leaves out the division by samples and channels, not that by positions.

    student, teacher: maps of one shape (B, C, H, W), or one of each per stage (the loss is their
        sum).
    levels: sizes of the pooled maps, up to 8.

    ReviewKD, mdistiller and torchdistill agree.
    """
    name = "hcl_loss"
    checks.choice(name, "reduction", reduction, features.REDUCTIONS)
    levels = tuple(checks.integer(name, "levels", level) for level in levels)
    if not len(levels) <= MOST_LEVELS or min(levels, default=1) < 1:
        raise ValueError(
            f"{name}: levels must be up to {MOST_LEVELS} positive integers, got {levels}."
        )
    total = 0.0
    for s, t in features.stages(name, student, teacher):
        features.pair(name, s, t, shape="(B, C, H, W)")
        backend_ = backends.select("maps.pyramid", s.device.type, backend, name)
        used = tuple(level for level in levels if level < s.shape[2])
        weights = [0.5**k for k in range(len(used) + 1)]
        weights = [weight / sum(weights) for weight in weights]
        terms = max(s.shape[0], 1) * s.shape[1] if reduction == "mean" else 1
        if backend_ == "reference":
            total = total + reference.maps.pyramid(s, t, used, weights) / terms
        else:
            total = total + ops.maps.pyramid.pyramid(name, backend_, s, t, used, weights, terms)
    return total


def cwd_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    temperature: float = 1.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Channel-wise distillation (arXiv 2011.13256): where a channel is active, as a distribution.

    ``T^2`` times the mean over samples and channels of ``KL(p_teacher || p_student)``, p the
    softmax of a channel's H W activations over T, in nats; ``"sum"`` sums. It is
    :func:`kdkernels.functional.kl_div` with positions for classes, exact and fused as that is.

    student, teacher: maps of one shape (B, C, H, W), or one of each per stage (the loss is their
        sum).
    temperature: T, a number.
    """
    name = "cwd_loss"
    checks.choice(name, "reduction", reduction, features.REDUCTIONS)
    total = 0.0
    for s, t in features.stages(name, student, teacher):
        features.pair(name, s, t, shape="(B, C, H, W)")
        total = total + kl_div(
            s.flatten(2), t.flatten(2), temperature=temperature,
            reduction="batchmean" if reduction == "mean" else "sum", backend=backend,
        )  # fmt: skip
    return total


def pkd_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    resize: str = "student",
    eps: float = 1e-6,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Pearson distillation of maps (PKD, arXiv 2207.02039): half the MSE of standardised channels.

    Each channel is standardised over samples and positions, ``(F - mean) / (std + eps)`` with the
    unbiased deviation. Maps of different size: ``resize`` names the side that is interpolated
    (bilinear) to the other's. ``reduction="sum"`` divides by nothing.

    student, teacher: maps (B, C, H, W) of one number of channels, or one of each per stage (the
        loss is their sum). A channel's statistics need two values; of one, the loss is 0.
    """
    name = "pkd_loss"
    checks.choice(name, "reduction", reduction, features.REDUCTIONS)
    checks.choice(name, "resize", resize, ("student", "teacher"))
    eps = checks.number(name, "eps", eps)
    total = 0.0
    for s, t in features.stages(name, student, teacher):
        features.pair(name, s, t, shape="(B, C, H, W)", same=(0, 1))
        backends.select("maps.pkd_loss", s.device.type, backend, name)
        if s.shape[2:] != t.shape[2:]:
            if resize == "student":
                s = F.interpolate(s, t.shape[2:], mode="bilinear", align_corners=False)
            else:
                t = F.interpolate(t, s.shape[2:], mode="bilinear", align_corners=False)
        total = total + reference.maps.pkd(s, t, eps, reduction)
    return total
