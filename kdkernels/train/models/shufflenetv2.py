# SPDX-License-Identifier: Apache-2.0
"""ShuffleNet V2 (Ma et al., arXiv 1807.11164) of width 1: ``ShuffleV2``.

As the distillation suites have it for small images: a 1x1 stem that keeps the size. Unlike theirs
it takes images of any size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdkernels.train.models.layers import ConvUnit, Network, conv_norm, shuffle

NAMES = "ShuffleV2"
STEM, HEAD = 24, 1024
STAGES = ((116, 4), (232, 8), (464, 4))  # channels, units


def build(name: str, channels: int, classes: int) -> Network | None:
    """The network of that name, None if it is none of these."""
    if name != NAMES:
        return None
    stages, inputs = [], STEM
    for width, count in STAGES:
        units = [DownUnit(inputs, width)] + [Unit(width) for _ in range(count - 1)]
        stages.append(nn.Sequential(*units))
        inputs = width
    stem, head = ConvUnit(channels, STEM, kernel=1), ConvUnit(inputs, HEAD, kernel=1)
    return Network(stem, stages, HEAD, classes, head=head)


class Unit(nn.Module):
    """Half of the channels pass, half go through convolutions; both are shuffled together.

    The ReLU stands behind the shuffle, where what passed, already positive, goes through unchanged:
    so features before and behind it have their channels in the same order.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = _branch(channels // 2, channels // 2, stride=1)
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        passed, changed = features.chunk(2, 1)
        return self.relu(shuffle(torch.cat([passed, self.body(changed)], 1), 2))


class DownUnit(nn.Module):
    """Two branches at half the size, each of half the channels, shuffled together."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.left = nn.Sequential(
            *conv_norm(inputs, inputs, 2, groups=inputs), *conv_norm(inputs, outputs // 2, kernel=1)
        )
        self.right = _branch(inputs, outputs // 2, stride=2)
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        return self.relu(shuffle(torch.cat([self.left(features), self.right(features)], 1), 2))


def _branch(inputs: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        ConvUnit(inputs, width, kernel=1),
        *conv_norm(width, width, stride, groups=width),
        *conv_norm(width, width, kernel=1),
    )
