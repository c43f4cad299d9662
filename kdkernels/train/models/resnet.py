# SPDX-License-Identifier: Apache-2.0
"""Residual networks (He et al., arXiv 1512.03385) for small images, with projection shortcuts.

``resnet<6n+2>`` is the CIFAR network of section 4.2; ``x4`` has four times the width in its stages
and twice in its stem. ``ResNet<18|34|50|101|152>``, with capitals as in the literature, are those
of table 1 behind a 3x3 stem that keeps the size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn

from kdkernels.train.models.layers import ConvUnit, Network, conv_norm

NAMES = "resnet<6n+2>, resnet<6n+2>x4, ResNet<18|34|50|101|152>"


def build(name: str, channels: int, classes: int) -> Network | None:
    """The network of that name, None if it is none of these."""
    if found := re.fullmatch(r"resnet([1-9]\d*)(x4)?", name):
        depth = int(found[1])
        stem, *widths = (32, 64, 128, 256) if found[2] else (16, 16, 32, 64)
        if depth >= 8 and depth % 6 == 2:
            return _resnet(BasicBlock, channels, stem, widths, [(depth - 2) // 6] * 3, classes)
    if found := re.fullmatch(r"ResNet([1-9]\d*)", name):
        block, counts = LARGE.get(int(found[1]), (None, ()))
        if block:
            return _resnet(block, channels, 64, (64, 128, 256, 512), counts, classes)
    return None


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.body = self.make_body(inputs, width, outputs, stride)
        self.shortcut = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = conv_norm(inputs, outputs, stride, kernel=1)
        self.relu = nn.ReLU()

    @staticmethod
    def make_body(inputs: int, width: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(ConvUnit(inputs, width, stride), *conv_norm(width, outputs))

    def forward(self, images: Tensor) -> Tensor:
        return self.relu(self.body(images) + self.shortcut(images))


class Bottleneck(BasicBlock):
    """1x1, 3x3 and 1x1 convolutions, the last of four times the width; else a basic block."""

    expansion = 4

    @staticmethod
    def make_body(inputs: int, width: int, outputs: int, stride: int) -> nn.Module:
        return nn.Sequential(
            ConvUnit(inputs, width, kernel=1),
            ConvUnit(width, width, stride),
            *conv_norm(width, outputs, kernel=1),
        )


LARGE = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}


def _resnet(
    block: type[BasicBlock],
    channels: int,
    stem: int,
    widths: Sequence[int],
    counts: Sequence[int],
    classes: int,
) -> Network:
    stages, inputs = [], stem
    for index, (width, count) in enumerate(zip(widths, counts, strict=True)):
        blocks = []
        for position in range(count):
            blocks.append(block(inputs, width, 2 if index and not position else 1))
            inputs = width * block.expansion
        stages.append(nn.Sequential(*blocks))
    return Network(ConvUnit(channels, stem), stages, inputs, classes)
