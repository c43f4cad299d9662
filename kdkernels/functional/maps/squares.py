# SPDX-License-Identifier: Apache-2.0
"""Squared differences of maps: hints, masked maps, generated maps, normalised maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kdkernels import checks
from kdkernels.functional.maps.elementwise import each_stage, mean, run, same_shape
from kdkernels.functional.maps.spatial_attention import sample_distances

Maps = Tensor | Sequence[Tensor]


def fitnet_loss(
    student: Maps, teacher: Maps, *, reduction: str = "mean", backend: str = "auto"
) -> Tensor:
    """Mean squared error of hints (FitNets, arXiv 1412.6550): ``mean (s - t)^2``.

    Args:
        student, teacher: features (B, C, ...), in the teacher's width (``kdkernels.FitNetLoss`` has
            the regressor), or sequences of them, over which the loss is summed.
        reduction: ``"mean"`` over all elements of a stage, or ``"sum"``.
    """
    name = "fitnet_loss"

    def stage(s, t, _, weight):
        same_shape(name, s, t)
        factor = 2 * weight * mean(name, reduction, s.numel())
        return run(name, "square", s, t, None, factor, backend)

    return each_stage(name, student, teacher, stage)


def masked_mse(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Squared error where a mask, of weights or of booleans, says: ``mean mask (s - t)^2``.

    Args:
        student, teacher: features (B, C, ...).
        mask: broadcast to them: of channels (B, C, 1, 1), of places (B, 1, H, W), or of elements;
            :func:`random_mask` draws one. It is a constant, and must not require a gradient.
        reduction: ``"mean"`` over all elements, masked or not, or ``"sum"``.
    """
    name = "masked_mse"
    same_shape(name, student, teacher)
    mask = _broadcast(name, mask, student)
    factor = 2 * mean(name, reduction, student.numel())
    return run(name, "square", student, teacher, mask, factor, backend)


def _broadcast(name: str, mask, student: Tensor) -> Tensor:
    """A mask whose spatial sizes are all the maps' or all 1."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: mask must be a tensor, got {type(mask).__name__}.")
    if not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        raise TypeError(f"{name}: mask must be bool or floating-point, got {mask.dtype}.")
    if mask.requires_grad:
        raise NotImplementedError(f"{name}: mask must not require a gradient (detach it).")
    checks.same_device(name, "mask", mask, student)
    shape = student.shape
    if mask.dim() != student.dim() or any(
        m not in (1, n) for m, n in zip(mask.shape, shape, strict=True)
    ):
        raise ValueError(
            f"{name}: mask must have the dimensions of the student's shape {tuple(shape)}, of its "
            f"sizes or 1, got {tuple(mask.shape)}."
        )
    if any(m > 1 for m in mask.shape[2:]):
        mask = mask.expand(*mask.shape[:2], *shape[2:])
    return mask


def random_mask(
    features: Tensor,
    drop: float,
    *,
    by: str = "channel",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A mask of ones with zeros drawn at the rate of ``drop``, in the features' dtype.

    Args:
        features: (B, C, ...); only their shape, dtype and device count.
        by: ``"channel"``, the mask is (B, C, 1, ...), or ``"place"``, it is (B, 1, ...).
        generator: where the numbers come from, for a mask that can be drawn again.
    """
    name = "random_mask"
    checks.floats(name, "features", features)
    drop = checks.number(name, "drop", drop, 0.0, 1.0)
    checks.choice(name, "by", by, ("channel", "place"))
    (batch, channels), places = features.shape[:2], features.shape[2:]
    shape = (batch, channels, *[1] * len(places)) if by == "channel" else (batch, 1, *places)
    numbers = torch.rand(shape, generator=generator, device=features.device)
    return (numbers >= drop).to(features.dtype)


def mgd_loss(
    student: Maps,
    teacher: Maps,
    *,
    alpha: float = 7e-5,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Masked generative distillation (arXiv 2205.01529) of generated maps: ``alpha / B |s - t|^2``.

    ``student`` is what the generator has made of the masked features; ``kdkernels.MGDLoss`` aligns,
    masks and generates.

    Args:
        student, teacher: maps (B, C, ...), or sequences of them, over which the loss is summed.
        alpha: 7e-5 for classification, 2e-5 for detection and segmentation.
        reduction: ``"mean"`` over the batch, or ``"sum"``; over the rest it is a sum.
    """
    name = "mgd_loss"
    alpha = checks.number(name, "alpha", alpha)

    def stage(s, t, _, weight):
        same_shape(name, s, t)
        factor = 2 * alpha * weight * mean(name, reduction, len(s))
        return run(name, "square", s, t, None, factor, backend)

    return each_stage(name, student, teacher, stage)


def l2_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = True,
    scale: float = 1.0,
    root: bool = False,
    by_element: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Squared distance of maps, of every sample scaled to one length, as mmrazor's ``L2Loss``.

    ``sum (s - t)^2 / B`` where s and t are ``scale`` times the features (B, C, ...) over their norm
    (of a sample, at least 1e-12). With ``root``, the square root of the sum instead. A sample of
    zeros stays zero, and has no gradient.

    Args:
        normalize: without it, the features are taken as they are, and ``scale`` is not used.
        by_element: the mean divides by the number of elements, not by that of samples.
        reduction: ``"mean"`` or ``"sum"``; there is no mean of a root.
    """
    name = "l2_loss"
    same_shape(name, student, teacher)
    for argument, value in (("normalize", normalize), ("root", root), ("by_element", by_element)):
        checks.flag(name, argument, value)
    scale = checks.number(name, "scale", scale)
    factor = mean(name, reduction, student.numel() if by_element else len(student))
    if root:
        factor = 1.0
    if normalize:
        vectors = _vectors(student, teacher)
        total = sample_distances(name, *vectors, 1, "squared", factor * scale**2, backend)
    else:
        total = run(name, "square", student, teacher, None, 2 * factor, backend)
    if not root:
        return total
    return torch.where(total > 0, torch.where(total > 0, total, 1.0).sqrt(), total)


def _vectors(student: Tensor, teacher: Tensor) -> Iterable[Tensor]:
    """Samples as maps (B, 1, N, 1); no copy where both have one layout."""
    last = torch.channels_last
    if student.dim() == 4 and all(x.is_contiguous(memory_format=last) for x in (student, teacher)):
        student, teacher = student.movedim(1, -1), teacher.movedim(1, -1)
    return (x.flatten(1)[:, None, :, None] for x in (student, teacher))
