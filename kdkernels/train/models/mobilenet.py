# SPDX-License-Identifier: Apache-2.0
"""MobileNetV2 (Sandler et al., arXiv 1801.04381) at half width: ``MobileNetV2``.

As the distillation suites have it for images of 32x32: strides of 16 in all instead of 32, plain
ReLU, and an expanding convolution in the first block too. Stages end in linear bottlenecks, whose
outputs no activation follows.
"""

from __future__ import annotations

from torch import Tensor, nn

from kdkernels.train.models.layers import ConvUnit, Network, conv_norm

NAMES = "MobileNetV2"
# Stages of one size each: (expansion, channels at full width, blocks, stride of the first).
STAGES = (
    ((1, 16, 1, 1), (6, 24, 2, 1)),
    ((6, 32, 3, 2),),
    ((6, 64, 4, 2), (6, 96, 3, 1)),
    ((6, 160, 3, 2), (6, 320, 1, 1)),
)
STEM, HEAD = 32, 1280


def build(name: str, channels: int, classes: int) -> Network | None:
    """The network of that name, None if it is none of these."""
    return MobileNetV2(channels, classes) if name == NAMES else None


class MobileNetV2(Network):
    """Stem of stride 2, four stages of inverted residuals, a 1x1 convolution to 1280 channels."""

    def __init__(self, channels: int, classes: int) -> None:
        stages, inputs = [], STEM // 2
        stem = ConvUnit(channels, inputs, 2)
        for groups in STAGES:
            blocks = []
            for expansion, width, count, stride in groups:
                for position in range(count):
                    step = 1 if position else stride
                    blocks.append(InvertedResidual(inputs, width // 2, expansion, step))
                    inputs = width // 2
            stages.append(nn.Sequential(*blocks))
        super().__init__(stem, stages, HEAD, classes, head=ConvUnit(inputs, HEAD, kernel=1))

    def preactivation(self, index: int) -> str:
        return f"stages.{index}"


class InvertedResidual(nn.Module):
    """Expand by a 1x1 convolution, a 3x3 per channel, back by a linear 1x1; added where it fits."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.body = nn.Sequential(
            ConvUnit(inputs, hidden, kernel=1),
            ConvUnit(hidden, hidden, stride, groups=hidden),
            *conv_norm(hidden, outputs, kernel=1),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, features: Tensor) -> Tensor:
        return features + self.body(features) if self.residual else self.body(features)
