# SPDX-License-Identifier: Apache-2.0
"""Variational information distillation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdkernels import checks
from kdkernels.functional.features import same_size
from kdkernels.functional.maps.elementwise import each_stage, mean, per_channel, run, same_shape
from kdkernels.functional.maps.squares import Maps
from kdkernels.ops.features import compute_dtype


def vid_loss(
    student: Maps,
    teacher: Maps,
    log_scale: Maps | None = None,
    variance: Maps | None = None,
    *,
    eps: float = 1e-5,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Variational information distillation (arXiv 1904.05835): negative log-likelihood.

    ``mean ((s - t)^2 / v + log v) / 2`` with a variance for each channel,
    ``v = softplus(log_scale) + eps``; without the constant ``log(2 pi) / 2``.

    Args:
        student: the predicted mean (B, C, ...) (``kdkernels.VIDLoss`` has the regressor), or a
            sequence of them, over which the loss is summed.
        teacher: likewise; of maps (B, C, H, W) of two sizes the larger is average-pooled.
        log_scale: C elements for each stage, differentiated. mdistiller never trains its own.
        variance: v itself, in its place, as torchdistill has it.
        reduction: ``"mean"`` over all elements of a stage, or ``"sum"``.
    """
    name = "vid_loss"
    if (log_scale is None) == (variance is None):
        raise TypeError(f"{name}: exactly one of log_scale and variance must be given.")
    eps = checks.number(name, "eps", eps, 0.0)
    argument = "variance" if log_scale is None else "log_scale"

    def stage(s, t, numbers, weight):
        if isinstance(s, Tensor) and isinstance(t, Tensor) and s.dim() == t.dim() == 4:
            s, t = same_size(s, t)
        same_shape(name, s, t)
        v = per_channel(name, argument, numbers, s).to(compute_dtype(s, t))
        if log_scale is not None:
            v = F.softplus(v) + eps
        factor = weight * mean(name, reduction, s.numel())
        # The logarithm is the same for all elements of a channel.
        constant = v.log().sum() * (factor / 2 * (s.numel() // s.shape[1]))
        return run(name, "square", s, t, 1 / v, factor, backend) + constant

    parameters = variance if log_scale is None else log_scale
    return each_stage(name, student, teacher, stage, parameters)
