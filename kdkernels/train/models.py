# SPDX-License-Identifier: Apache-2.0
"""Small image classifiers for teachers and students, named as in the distillation literature.

``resnet<6n+2>`` is the CIFAR residual network of He et al. (arXiv 1512.03385, section 4.2) with
projection shortcuts; ``x4`` has four times the width in its stages and twice in its stem. All take
images of any size from 8x8 and any number of channels.
"""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn import functional as F

from kdkernels.train.errors import InputError

MODELS = "mlp<width>, convnet<width>, resnet<6n+2>, resnet<6n+2>x4"
MIN_SIZE = 8


def build_model(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The model called ``name`` for images of ``shape`` (H, W, C), e.g. ``"resnet20"``."""
    height, width, channels = shape
    if min(height, width) < MIN_SIZE:
        raise InputError(
            f"model {name}: expected images of {MIN_SIZE}x{MIN_SIZE} or more pixels, "
            f"got {width}x{height}"
        )
    found = re.fullmatch(r"(mlp|convnet|resnet)([1-9]\d*)(x4)?", name)
    kind, number, wide = found.groups() if found else (None, 0, None)
    number = int(number)
    if kind == "resnet" and number >= 8 and number % 6 == 2:
        return ResNet(number, channels, classes, wide=bool(wide))
    if kind == "mlp" and not wide:
        return MLP(number, height * width * channels, classes)
    if kind == "convnet" and not wide:
        return ConvNet(number, channels, classes)
    raise InputError(f"model {name!r}: expected one of {MODELS}")


class MLP(nn.Sequential):
    """One hidden layer on the flattened image."""

    def __init__(self, width: int, inputs: int, classes: int) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes)
        )


class ConvNet(nn.Module):
    """Two stages of two 3x3 convolutions, the second of twice the width at half the size."""

    def __init__(self, width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvUnit(channels, width),
            ConvUnit(width, width),
            ConvUnit(width, 2 * width, stride=2),
            ConvUnit(2 * width, 2 * width),
        )
        self.classifier = nn.Linear(2 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).mean((2, 3)))


class ConvUnit(nn.Sequential):
    """3x3 convolution, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__(conv3x3(inputs, outputs, stride), nn.BatchNorm2d(outputs), nn.ReLU())


class ResNet(nn.Module):
    """Stem, three stages of basic blocks, global average pooling and a linear classifier."""

    def __init__(self, depth: int, channels: int, classes: int, *, wide: bool) -> None:
        super().__init__()
        stem, *widths = (32, 64, 128, 256) if wide else (16, 16, 32, 64)
        self.stem = ConvUnit(channels, stem)
        stages, inputs = [], stem
        for index, width in enumerate(widths):
            strides = [2 if index else 1] + [1] * ((depth - 2) // 6 - 1)
            blocks = []
            for stride in strides:
                blocks.append(BasicBlock(inputs, width, stride))
                inputs = width
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.stages(self.stem(images)).mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvUnit(inputs, outputs, stride), conv3x3(outputs, outputs), nn.BatchNorm2d(outputs)
        )
        self.shortcut = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.body(images) + self.shortcut(images))


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size; batch normalisation follows, so no bias."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
