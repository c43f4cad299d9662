# SPDX-License-Identifier: Apache-2.0
"""A student that grows: a network of which at first only the front runs, with a head of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from kdkernels.train.errors import InputError
from kdkernels.train.models import usual_taps
from kdkernels.train.taps import Tapped, shown_two


class GrowingStudent(nn.Module):
    """``network`` in stages: in grade g it runs up to ``ends[g]`` and answers through ``heads[g]``.

    The last grade is the whole network and has no head here. All weights exist from the start, so
    that optimizers, wrappers and checkpoints need not know of growth; those not yet, or no longer,
    in use get no gradient. A grade computes nothing behind its end.
    """

    def __init__(self, network: nn.Module, ends: Sequence[str], heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.network, self.heads = network, nn.ModuleList(heads)
        self.ends = tuple(ends)
        self.register_buffer("_grade", torch.tensor(0))  # so that copies and checkpoints have it
        self._known_grade = 0  # on the host, which so need not wait for a GPU

    @property
    def grade(self) -> int:
        """The grade, from 0; of a copy that follows by its tensors, only in evaluation mode."""
        if not self.training:
            self._known_grade = int(self._grade)
        return self._known_grade

    @grade.setter
    def grade(self, value: int) -> None:
        self._grade.fill_(value)
        self._known_grade = value

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._known_grade = int(self._grade)

    def forward(self, images: Tensor) -> Tensor:
        if self.grade == len(self.heads):
            return self.network(images)
        end = self.network.get_submodule(self.ends[self.grade])
        stop = end.register_forward_hook(_stop)
        try:
            self.network(images)
        except _Reached as reached:
            return self.heads[self.grade](reached.features)
        finally:
            stop.remove()
        raise InputError(f"module {self.ends[self.grade]!r}: the network did not call it")


def grow(network: nn.Module, shape: tuple[int, int, int], classes: Sequence[int]) -> GrowingStudent:
    """``network`` in as many grades as ``classes`` has entries: those that it tells apart in each.

    Grades end where the network's stages do, the last with the network. The heads of the others
    are the authors': a 1x1 convolution to the width of the network's pooled features, batch
    normalisation, pooling, a linear classifier; of features without a height and width, the
    classifier alone.
    """
    taps, grades = usual_taps(network), len(classes)
    if len(taps.stages) < grades:
        raise InputError(
            f"{grades} grades: expected a student of as many stages, got {len(taps.stages)}"
        )
    ends = [taps.stages[grade * len(taps.stages) // grades - 1] for grade in range(1, grades)]
    tapped = Tapped(network, [*ends, taps.pooled], what="student")
    features = shown_two(tapped, shape, what="student").features
    pooled = features[taps.pooled].shape[1]
    heads = [
        _head(features[end], pooled, count) for end, count in zip(ends, classes[:-1], strict=True)
    ]
    return GrowingStudent(network, ends, heads)


def _head(features: Tensor, width: int, classes: int) -> nn.Module:
    channels = features.shape[1]
    if features.ndim == 2:
        return nn.Linear(channels, classes)
    if features.ndim != 4:
        raise InputError(
            f"a student that grows: expected features (B, C) or (B, C, H, W) of its stages, got "
            f"{tuple(features.shape)}"
        )
    return nn.Sequential(
        nn.Conv2d(channels, width, 1),
        nn.BatchNorm2d(width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, classes),
    )


class _Reached(Exception):
    """The features at which a forward pass may end."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def _stop(module: nn.Module, arguments: tuple, features: Tensor) -> NoReturn:
    raise _Reached(features)
