# SPDX-License-Identifier: Apache-2.0
"""Maps a student's features to a teacher's width and size, with the suites' initialisation.

Sized by channels, or by the shapes (B, C, H, W) that a dry run of both networks gives:
``ConvReg(student_features.shape, teacher_features.shape)``. Not losses: losses take what they make.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from kdkernels import checks


def _channels(name: str, **channels: int) -> None:
    for argument, value in channels.items():
        if checks.integer(name, argument, value) < 1:
            raise ValueError(f"{name}: {argument} must be at least 1, got {value}.")


def _map_shape(name: str, argument: str, shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W) of a shape (B, C, H, W) or (C, H, W)."""
    sizes = tuple(shape)[-3:]
    if len(tuple(shape)) not in (3, 4) or any(not isinstance(n, int) or n < 1 for n in sizes):
        raise ValueError(
            f"{name}: {argument} must be the shape (B, C, H, W) of a map, got {tuple(shape)}."
        )
    return sizes


class ConvReg(nn.Sequential):
    """FitNet's regressor as in mdistiller: a convolution to the teacher's shape, BN and ReLU.

    3x3 with stride 2 from twice the teacher's height, transposed 4x4 with stride 2 from half of it,
    else without padding from a greater or equal one.

    Args:
        student_shape, teacher_shape: (B, C, H, W), or without B.
        relu: False leaves the ReLU out, as connectors to pre-activations do.
    """

    def __init__(
        self, student_shape: Sequence[int], teacher_shape: Sequence[int], *, relu: bool = True
    ) -> None:
        name = type(self).__name__
        c_in, h_in, w_in = _map_shape(name, "student_shape", student_shape)
        c_out, h_out, w_out = _map_shape(name, "teacher_shape", teacher_shape)
        if (h_in, w_in) == (2 * h_out, 2 * w_out):
            conv = nn.Conv2d(c_in, c_out, 3, stride=2, padding=1)
        elif (2 * h_in, 2 * w_in) == (h_out, w_out):
            conv = nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1)
        elif h_in >= h_out and w_in >= w_out:
            conv = nn.Conv2d(c_in, c_out, (1 + h_in - h_out, 1 + w_in - w_out))
        else:
            raise NotImplementedError(
                f"{name}: there is no regressor from {(h_in, w_in)} to {(h_out, w_out)}."
            )
        super().__init__(conv, nn.BatchNorm2d(c_out), *[nn.ReLU()] * relu)


class Connector(nn.Sequential):
    """OFD's: a 1x1 convolution without bias, N(0, sqrt(2 / teacher_channels)), and BN."""

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        _channels(
            type(self).__name__,
            student_channels=student_channels,
            teacher_channels=teacher_channels,
        )
        conv = nn.Conv2d(student_channels, teacher_channels, 1, bias=False)
        nn.init.normal_(conv.weight, std=math.sqrt(2 / teacher_channels))
        super().__init__(conv, nn.BatchNorm2d(teacher_channels))


class PointwiseRegressor(nn.Sequential):
    """VID's: three 1x1 convolutions without bias, ReLUs between them."""

    def __init__(
        self, student_channels: int, teacher_channels: int, mid_channels: int | None = None
    ) -> None:
        mid = teacher_channels if mid_channels is None else mid_channels
        _channels(
            type(self).__name__,
            student_channels=student_channels,
            teacher_channels=teacher_channels,
            mid_channels=mid,
        )
        super().__init__(
            nn.Conv2d(student_channels, mid, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(mid, mid, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(mid, teacher_channels, 1, bias=False),
        )


class Generator(nn.Sequential):
    """MGD's: two 3x3 convolutions with a ReLU between them."""

    def __init__(self, channels: int) -> None:
        _channels(type(self).__name__, channels=channels)
        super().__init__(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )


def align(student_channels: int, teacher_channels: int) -> nn.Module:
    """A 1x1 convolution where the widths differ, else nothing."""
    _channels("align", student_channels=student_channels, teacher_channels=teacher_channels)
    if student_channels == teacher_channels:
        return nn.Identity()
    return nn.Conv2d(student_channels, teacher_channels, 1)
