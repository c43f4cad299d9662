# SPDX-License-Identifier: Apache-2.0
"""MasKD's receptive tokens, and the loss under their masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdkernels import functional
from kdkernels.modules.maps.elementwise import MapsLoss


class ReceptiveTokens(nn.Module):
    """Tokens whose products with a map are masks of its places (MasKD, arXiv 2205.14589).

    They are learned first, with the task's loss on ``(masks.unsqueeze(2) * x.unsqueeze(1)).sum(1)``
    in the place of the teacher's map x, plus :func:`kdkernels.functional.maskd_dice` of the masks.

    Args:
        channels: of the map.
        num_tokens: 8 for segmentation, 6 for detection.
        weighted: learn also how much each mask counts, for each sample.
    """

    def __init__(self, channels: int, num_tokens: int = 8, *, weighted: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(num_tokens, channels) * 0.01)
        self.prob = None
        if weighted:
            self.prob = nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.AdaptiveAvgPool2d(1),
                nn.Conv2d(channels, num_tokens, 1),
            )

    def forward(self, features: Tensor) -> Tensor:
        """Masks (B, T, H, W) of ``features`` (B, C, H, W)."""
        return functional.receptive_masks(features, self.tokens)

    def weight(self, features: Tensor) -> Tensor | None:
        """How much each mask counts, (B, T), if that is learned."""
        return None if self.prob is None else self.prob(features).flatten(1).softmax(1)


class MasKDLoss(MapsLoss, function=functional.maskd_loss):
    """Masked distillation: :func:`kdkernels.functional.maskd_loss` under learned masks.

    Args:
        tokens: learned, and frozen from here on.
        customised: the student's masks take part too, as detection has it after a thousand
            iterations; the attribute may be changed between calls.
    """

    def __init__(self, tokens: ReceptiveTokens, customised: bool = False, **held) -> None:
        super().__init__(**held)
        self.tokens = tokens.requires_grad_(False)
        self.customised = customised

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of maps (B, C, H, W)."""
        with torch.no_grad():
            masks = self.tokens(teacher)
            if self.customised:
                masks = masks * self.tokens(student)
            weight = self.tokens.weight(teacher)
        return self._call(student, teacher, masks, weight)
