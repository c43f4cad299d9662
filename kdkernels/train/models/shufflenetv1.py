# SPDX-License-Identifier: Apache-2.0
"""ShuffleNet (Zhang et al., arXiv 1707.01083) of three groups: ``ShuffleV1``.

As the distillation suites have it for small images: a 1x1 stem that keeps the size, and a ReLU
behind the convolution per channel too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdkernels.train.models.layers import ConvUnit, Network, conv_norm, shuffle

NAMES = "ShuffleV1"
STEM, GROUPS = 24, 3
STAGES = ((240, 4), (480, 8), (960, 4))  # channels, units


def build(name: str, channels: int, classes: int) -> Network | None:
    """The network of that name, None if it is none of these."""
    if name != NAMES:
        return None
    stages, inputs = [], STEM
    for width, count in STAGES:
        units = [Unit(inputs, width, stride=2)] + [Unit(width, width) for _ in range(count - 1)]
        stages.append(nn.Sequential(*units))
        inputs = width
    return Network(ConvUnit(channels, STEM, kernel=1), stages, inputs, classes)


class Unit(nn.Module):
    """Grouped 1x1, shuffle, 3x3 per channel, grouped 1x1; added to its input or put beside it.

    A unit of stride 2 is put beside the average-pooled input, whose channels it therefore spares.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 2, padding=1) if stride == 2 else None
        made = outputs - inputs if self.pool else outputs
        width = made // 4
        # Behind the stem, channels are too few for groups.
        self.groups = 1 if inputs == STEM else GROUPS
        self.reduce = ConvUnit(inputs, width, kernel=1, groups=self.groups)
        self.body = nn.Sequential(
            ConvUnit(width, width, stride, groups=width),
            *conv_norm(width, made, kernel=1, groups=GROUPS),
        )
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        made = self.body(shuffle(self.reduce(features), self.groups))
        if self.pool:
            return self.relu(torch.cat([made, self.pool(features)], 1))
        return self.relu(made + features)
