# SPDX-License-Identifier: Apache-2.0
"""The smallest classifiers, for digits and tests: ``mlp<width>`` and ``convnet<width>``."""

from __future__ import annotations

import re

from torch import nn

from kdkernels.train.models.layers import ConvUnit, Network
from kdkernels.train.models.taps import Taps

NAMES = "mlp<width>, convnet<width>"


def build(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module | None:
    """The network of that name, None if it is none of these."""
    height, width, channels = shape
    if found := re.fullmatch(r"mlp([1-9]\d*)", name):
        return MLP(int(found[1]), height * width * channels, classes)
    if found := re.fullmatch(r"convnet([1-9]\d*)", name):
        return _convnet(int(found[1]), channels, classes)
    return None


class MLP(nn.Sequential):
    """One hidden layer on the flattened image."""

    taps = Taps(None, ("2",), ("2:input",), "3:input", "3")

    def __init__(self, width: int, inputs: int, classes: int) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes)
        )


def _convnet(width: int, channels: int, classes: int) -> Network:
    """Two stages of two 3x3 convolutions, the second of twice the width at half the size."""
    stages = [
        nn.Sequential(ConvUnit(width, width)),
        nn.Sequential(ConvUnit(width, 2 * width, 2), ConvUnit(2 * width, 2 * width)),
    ]
    return Network(ConvUnit(channels, width), stages, 2 * width, classes)
