# SPDX-License-Identifier: Apache-2.0
"""Masked distillation with learned receptive tokens (MasKD)."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import checks
from kdkernels.functional.maps.elementwise import mean, run, same_shape
from kdkernels.ops.features import compute_dtype


def receptive_masks(features: Tensor, tokens: Tensor) -> Tensor:
    """``sigmoid(tokens . features)``: masks (B, T, H, W) of maps (B, C, H, W), tokens (T, C)."""
    name = "receptive_masks"
    for argument, value, shape in (
        ("features", features, "(B, C, H, W)"),
        ("tokens", tokens, "(T, C)"),
    ):
        checks.floats(name, argument, value)
        if value.dim() != shape.count(",") + 1 or 0 in value.shape[1:]:
            raise ValueError(f"{name}: {argument} must have shape {shape}, got {value.shape}.")
    if tokens.shape[1] != features.shape[1]:
        raise ValueError(
            f"{name}: tokens must have the features' {features.shape[1]} channels, got "
            f"{tuple(tokens.shape)}."
        )
    dtype = compute_dtype(features, tokens)
    with torch.autocast(features.device.type, enabled=False):
        products = tokens.to(dtype) @ features.to(dtype).flatten(2)
    return products.sigmoid().unflatten(2, features.shape[2:])


def maskd_dice(masks: Tensor) -> Tensor:
    """How much masks (B, T, H, W) of a sample overlap: their mean Dice coefficient over pairs.

    ``2 a . b / (|a|^2 + |b|^2)`` of every two different masks; what MasKD (arXiv 2205.14589) adds
    to the task's loss while it learns its tokens. 0 where there are not two masks, or no samples.
    """
    name = "maskd_dice"
    checks.floats(name, "masks", masks)
    if masks.dim() != 4:
        raise ValueError(f"{name}: masks must have shape (B, T, H, W), got {tuple(masks.shape)}.")
    batch, count = masks.shape[:2]
    rows = masks.flatten(2).to(compute_dtype(masks))
    with torch.autocast(masks.device.type, enabled=False):
        products = rows @ rows.mT
    squares = products.diagonal(dim1=1, dim2=2) + 1e-12
    dice = 2 * products / (squares.unsqueeze(1) + squares.unsqueeze(2))
    others = ~torch.eye(count, dtype=torch.bool, device=masks.device)
    return torch.where(others, dice, 0.0).sum() / max(batch * count * (count - 1), 1)


def maskd_loss(
    student: Tensor,
    teacher: Tensor,
    masks: Tensor,
    token_weight: Tensor | None = None,
    *,
    eps: float = 1e-5,
    reduction: str = "mean",
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Masked distillation (MasKD, arXiv 2205.14589): squared errors under each mask.

    Half the mean over samples, masks and channels of ``sum (m s - m t)^2 / (sum m + eps)``, where
    sums are over places. The masks are constants, as published: tokens are frozen by now. All of
    them are one weight for each place, so that the maps are read once.

    Args:
        student, teacher: maps (B, C, H, W).
        masks: (B, T, H, W): :func:`receptive_masks` of the teacher, times those of the student
            where the masks are customised.
        token_weight: (B, T), of each mask: its share, where the mean over masks becomes a sum.
        reduction: ``"mean"``, or ``"sum"`` over samples, masks and channels.

    compat:
        ``"paper"``: as above. ``"mmrazor"`` (the authors' detection): without the half and ``eps``.
    """
    name = "maskd_loss"
    same_shape(name, student, teacher)
    checks.choice(name, "compat", compat, ("paper", "mmrazor"))
    eps = checks.number(name, "eps", eps, 0.0)
    checks.floats(name, "masks", masks)
    expected = (student.shape[0], *student.shape[2:])
    if masks.dim() != 4 or not masks.shape[1] or (masks.shape[0], *masks.shape[2:]) != expected:
        raise ValueError(
            f"{name}: masks must have shape (B, T, H, W) for maps of shape "
            f"{tuple(student.shape)}, got {tuple(masks.shape)}."
        )
    checks.same_device(name, "masks", masks, student)
    masks = masks.detach().to(compute_dtype(student, teacher))
    batch, channels, height, width = student.shape
    # Weights about 1, which fp16 gradients can hold: the rest, even what the reduction does not
    # divide by, is in the factor.
    areas = masks.mean((2, 3)) + (eps / (height * width) if compat == "paper" else 0.0)
    share = 1 / torch.where(areas > 0, areas, 1.0)
    if token_weight is not None:
        checks.floats(name, "token_weight", token_weight)
        if token_weight.shape != masks.shape[:2]:
            raise ValueError(
                f"{name}: token_weight must have shape {tuple(masks.shape[:2])}, got "
                f"{tuple(token_weight.shape)}."
            )
        share = share * token_weight.detach()
    weight = (share[:, :, None, None] * masks.square()).sum(1, keepdim=True)
    factor = mean(name, reduction, batch * channels) / (height * width)
    if token_weight is None:
        weight = weight / masks.shape[1]
        factor *= masks.shape[1] if reduction == "sum" else 1
    if compat == "mmrazor":
        factor *= 2
    return run(name, "square", student, teacher, weight, factor, backend)
