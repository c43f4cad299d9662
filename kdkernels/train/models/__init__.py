# SPDX-License-Identifier: Apache-2.0
"""Image classifiers for teachers and students, named as in the distillation literature.

All of this package's own take images of any size from 8x8 and any number of channels, and have
their features where :func:`usual_taps` says. A new architecture is a file here and a line in
``build_model``.
"""

from __future__ import annotations

import difflib

from torch import nn

from kdkernels.train.errors import InputError
from kdkernels.train.models import (
    mobilenet,
    resnet,
    shufflenetv1,
    shufflenetv2,
    small,
    timm,
    vgg,
    wrn,
)
from kdkernels.train.models.taps import Taps, usual_taps

__all__ = ["MODELS", "Taps", "build_model", "usual_taps"]

CONVOLUTIONAL = (resnet, wrn, vgg, mobilenet, shufflenetv1, shufflenetv2)
MODELS = ", ".join(family.NAMES for family in (small, *CONVOLUTIONAL, timm))
MIN_SIZE = 8
# Some for each pattern, of which errors name the nearest.
EXAMPLES = [
    *(f"{name}{width}" for name in ("mlp", "convnet") for width in (8, 16, 32, 64)),
    *(f"resnet{6 * n + 2}" for n in (1, 2, 3, 5, 7, 9, 18)),
    *("resnet8x4", "resnet32x4", "wrn16-1", "wrn16-2", "wrn40-1", "wrn40-2", "MobileNetV2"),
    *(f"ResNet{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"vgg{depth}" for depth in vgg.DEPTHS),
    *("ShuffleV1", "ShuffleV2"),
]


def build_model(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The model called ``name`` for images of ``shape`` (H, W, C), e.g. ``"resnet20"``."""
    height, width, channels = shape
    if model := timm.build(name, shape, classes):
        return model
    if min(height, width) < MIN_SIZE:
        raise InputError(
            f"model {name}: expected images of {MIN_SIZE}x{MIN_SIZE} or more pixels, "
            f"got {width}x{height}"
        )
    if model := small.build(name, shape, classes):
        return model
    for family in CONVOLUTIONAL:
        if model := family.build(name, channels, classes):
            return model
    near = difflib.get_close_matches(name, EXAMPLES, 3)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    raise InputError(f"model {name!r}: expected one of {MODELS}{hint}")
