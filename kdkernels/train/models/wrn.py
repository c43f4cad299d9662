# SPDX-License-Identifier: Apache-2.0
"""Wide residual networks (Zagoruyko and Komodakis, arXiv 1605.07146): ``wrn<depth>-<width>``.

Pre-activation blocks: normalisation and ReLU come before each convolution, so a stage's output is
a bare sum, which the next stage (or the head) normalises and activates.
"""

from __future__ import annotations

import re

from torch import Tensor, nn

from kdkernels.train.models.layers import Network

NAMES = "wrn<6n+4>-<width>"


def build(name: str, channels: int, classes: int) -> Network | None:
    """The network of that name, None if it is none of these."""
    found = re.fullmatch(r"wrn([1-9]\d*)-([1-9]\d*)", name)
    if not found or int(found[1]) % 6 != 4 or int(found[1]) < 10:
        return None
    return WideResNet(int(found[1]), int(found[2]), channels, classes)


class WideResNet(Network):
    """A 3x3 stem of 16 channels and three stages of 16, 32 and 64 times the width."""

    def __init__(self, depth: int, width: int, channels: int, classes: int) -> None:
        stages, inputs = [], 16
        for index, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            blocks = []
            for position in range((depth - 4) // 6):
                blocks.append(Block(inputs, outputs, 2 if index and not position else 1))
                inputs = outputs
            stages.append(nn.Sequential(*blocks))
        head = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU())
        stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        super().__init__(stem, stages, inputs, classes, head)

    def preactivation(self, index: int) -> str:
        last = index + 1 == len(self.stages)
        return "head.1:input" if last else f"stages.{index + 1}.0.relu:input"


class Block(nn.Module):
    """ReLU and 3x3 convolution, twice, on normalised features; shortcut as in the paper."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(inputs), nn.ReLU()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        self.projection = None
        if inputs != outputs or stride != 1:
            self.projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        active = self.relu(self.norm(features))
        # A projection takes the activated features; without one the shortcut is the identity.
        shortcut = features if self.projection is None else self.projection(active)
        return self.body(active) + shortcut
