# SPDX-License-Identifier: Apache-2.0
"""Maps before their activation: overhaul (margin ReLU) and activation boundaries."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import checks
from kdkernels.functional.maps.elementwise import each_stage, mean, per_channel, run, same_shape
from kdkernels.functional.maps.squares import Maps


def ofd_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """The expected negative response ``E[x | x < 0]`` of channels x ~ N(bias, weight^2).

    ``bias - |weight| phi(z) / Phi(-z)`` with ``z = bias / |weight|``; ``-3 |weight|`` where
    negative responses are rarer than 1e-3. What :func:`ofd_loss` takes as margin: ``weight`` and
    ``bias`` (C,) are those of the batch normalisation that the teacher's map comes from.
    """
    checks.floats("ofd_margin", "weight", weight)
    checks.floats("ofd_margin", "bias", bias)
    mean, deviation = bias.detach().double(), weight.detach().double().abs()
    z = mean / deviation  # of a constant channel infinite, and NaN at 0
    log_below = torch.special.log_ndtr(-z)
    ratio = torch.exp(-z.square() / 2 - math.log(2 * math.pi) / 2 - log_below)
    shift = torch.where(deviation > 0, deviation * ratio, 0.0)
    rare = (log_below.exp() <= 1e-3) | z.isnan()
    return torch.where(rare, -3 * deviation, mean - shift).to(weight.dtype)


def _doubling(student) -> list[float] | None:
    """Weights of the stages of a sequence, each twice the one before, the last 1."""
    if not isinstance(student, Sequence):
        return None
    return [2.0 ** (i - len(student) + 1) for i in range(len(student))]


def ofd_loss(
    student: Maps,
    teacher: Maps,
    margin: Maps | None = None,
    *,
    stage_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Overhaul of feature distillation (arXiv 1904.01866): partial L2 to the margin ReLU.

    With the target ``t' = max(t, margin)``, the sum over elements of ``(s - t')^2`` except where s
    is below the target and the target below 0.

    Args:
        student: maps (B, C, H, W) before their activation, in the teacher's width
            (``kdkernels.OFDLoss`` has the connectors), or a sequence of them, over which the loss
            is summed.
        teacher: likewise; a map of another size is average-pooled to the student's.
        margin: a negative number for each channel, C elements (:func:`ofd_margin`), for every
            stage; differentiated. None: the target is t, as in mmrazor, which divides by 1000 too.
        stage_weights: of each stage; by default 2^(i - n + 1) for stage i of n, as published.
        reduction: ``"mean"`` over the batch, or ``"sum"`` (the authors'); over the rest a sum.

    The published training weight, 1e-3 (1e-4 on ImageNet), is not part of it.
    """
    name = "ofd_loss"
    if stage_weights is None:
        stage_weights = _doubling(student)

    def stage(s, t, m, weight):
        if isinstance(s, Tensor) and isinstance(t, Tensor) and s.dim() == t.dim() == 4:
            t = t if s.shape[2:] == t.shape[2:] else F.adaptive_avg_pool2d(t, s.shape[2:])
        same_shape(name, s, t)
        if m is not None:
            m = per_channel(name, "margin", m, s)
        factor = 2 * weight * mean(name, reduction, len(s))
        return run(name, "ofd", s, t, m, factor, backend)

    return each_stage(name, student, teacher, stage, margin, stage_weights)


_AB_SCALES = {"paper": 3 / 1000, "torchdistill": 1.0}


def ab_loss(
    student: Maps,
    teacher: Maps,
    *,
    margin: float = 1.0,
    stage_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Activation boundaries (arXiv 1811.03233): a squared hinge on the side the teacher is on.

    ``3 / 1000`` times the sum over elements of ``max(s + m, 0)^2`` where ``t <= 0`` and
    ``min(s - m, 0)^2`` where ``t > 0``. Constant in the teacher but for steps: it gets no gradient.

    Args:
        student, teacher: features (B, C, ...) before their activation, or sequences of them, over
            which the loss is summed.
        margin: m.
        stage_weights: of each stage; by default 2^(i - n + 1) for stage i of n, as published.
        reduction: ``"mean"`` over the batch, or ``"sum"``; over the rest it is a sum.

    compat:
        ``"paper"`` (also RepDistiller and mmrazor): as above.
        ``"torchdistill"``: without ``3 / 1000``.
    """
    name = "ab_loss"
    margin = checks.number(name, "margin", margin, 0.0)
    scale = _AB_SCALES[checks.choice(name, "compat", compat, tuple(_AB_SCALES))]
    if stage_weights is None:
        stage_weights = _doubling(student)

    def stage(s, t, _, weight):
        same_shape(name, s, t)
        factor = 2 * scale * weight * mean(name, reduction, len(s))
        return run(name, "ab", s, t.detach(), None, factor, backend, margin)

    return each_stage(name, student, teacher, stage, None, stage_weights)
