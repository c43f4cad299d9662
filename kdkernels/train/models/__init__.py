# SPDX-License-Identifier: Apache-2.0
"""Image classifiers for teachers and students, named as in the distillation literature.

All of this package's own take images of any size from 8x8 and any number of channels, and have
their features where :func:`usual_taps` says. A new architecture is a file here and a line in
``build_model``.
"""

from __future__ import annotations

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
    raise InputError(f"model {name!r}: expected one of {MODELS}")
