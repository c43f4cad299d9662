# SPDX-License-Identifier: Apache-2.0
"""A user's own loaders in the place of a data set in memory: their batches, as they come."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from kdkernels.train.data.batches import Batch
from kdkernels.train.errors import InputError


class LoaderSplit:
    """The batches (images, labels) of a loader, whose images are a network's input already."""

    def __init__(self, part: str, loader: DataLoader, classes: int | None = None) -> None:
        self.part, self.loader, self.classes = part, loader, classes
        try:
            self.count = len(loader)
        except TypeError as error:
            raise InputError(f"{part} loader: expected one that knows its length") from error
        if not self.count:
            raise self._unfit("at least one batch", "none (is drop_last set?)")

    def batches(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) and labels, (B,) or probabilities (B, K), of one pass."""
        for batch in self.loader:
            images, labels = self._checked(batch)
            images = images.to(
                device, torch.float32, non_blocking=True, memory_format=torch.channels_last
            )
            yield images, labels.to(device, non_blocking=True)

    def peek(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """:meth:`batches` that leave the loader's own generators where they were."""
        before = self.random_state()
        try:
            yield from self.batches(device)
        finally:
            self.set_random_state(before)

    def random_state(self) -> list[Tensor]:
        """Where the loader's own generators stand."""
        return [generator.get_state() for generator in _generators(self.loader)]

    def set_random_state(self, states: Sequence[Tensor]) -> None:
        """Put its generators back where they were."""
        generators = _generators(self.loader)
        if len(generators) != len(states):
            raise InputError(
                f"{self.part} loader: expected {len(states)} generators in it as when the run "
                f"began, got {len(generators)}"
            )
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    def _checked(self, batch: Any) -> tuple[Tensor, Tensor]:
        pair = isinstance(batch, Sequence) and len(batch) == 2
        if not pair or not all(isinstance(x, Tensor) for x in batch):
            raise self._unfit("batches (images, labels) of tensors", f"a {type(batch).__name__}")
        images, labels = batch
        if images.ndim != 4 or not images.is_floating_point():
            wanted = "images (B, C, H, W) as networks take them, in floating point"
            raise self._unfit(wanted, f"{images.dtype} of shape {tuple(images.shape)}")
        if labels.ndim == 2 and labels.is_floating_point() and self.part == "training":
            return images, labels
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            wanted = f"a whole number for each of {len(images)} images as label"
            raise self._unfit(wanted, f"{labels.dtype} of shape {tuple(labels.shape)}")
        least, most = (int(label) for label in labels.aminmax())
        if self.classes and not 0 <= least <= most < self.classes:
            wanted = f"labels from 0 to {self.classes - 1}, as many as the student has logits"
            raise self._unfit(wanted, str(least if least < 0 else most))
        return images, labels.long()

    def _unfit(self, expected: str, got: str) -> InputError:
        return InputError(f"{self.part} loader: expected {expected}, got {got}")


@dataclass(frozen=True)
class LoaderData:
    """What methods and the loop read of a ``Dataset``, where there are loaders instead."""

    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # height, width and channels of an image
    train: LoaderSplit
    val: LoaderSplit
    test: LoaderSplit
    name: str = "loaders"

    def described(self) -> list[str]:
        """What was given, in a line."""
        train, val, test = (f"{x.count:,} {x.part}" for x in (self.train, self.val, self.test))
        height, width, _ = self.shape
        return [
            f"loaders: {train}, {val} and {test} batches of images of {width}x{height} pixels in "
            f"{len(self.classes)} classes"
        ]


class LoaderBatches:
    """A loader's batches as the loop asks for them: step by step, from the start of an epoch on.

    What generators of its own the loader draws from is part of a checkpoint.
    """

    def __init__(self, data: LoaderData, device: torch.device) -> None:
        self.data, self.device, self.per_epoch = data, device, data.train.count
        self.batch_size = math.nan  # the mean of the epoch so far: the last may be smaller
        self._pass: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._images = 0  # so far in this pass

    def __call__(self, step: int, share: int = 0) -> Batch:
        position = step % self.per_epoch
        if position == 0:
            self._pass, self._images = self.data.train.batches(self.device), 0
        if (batch := next(self._pass, None)) is None:
            raise InputError(
                f"training loader: expected {self.per_epoch} batches, its length, got {position}"
            )
        self._images += len(batch[0])
        self.batch_size = self._images / (position + 1)
        return Batch(*batch)

    def state_dict(self) -> dict[str, Any]:
        """What the order of the next epochs comes from, beside torch's own random state."""
        return {"generators": self.data.train.random_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was asked for, between epochs."""
        self.data.train.set_random_state(state["generators"])


def shape_of(split: LoaderSplit) -> tuple[int, int, int]:
    """Height, width and channels of a loader's images, from its first batch."""
    with torch.random.fork_rng(devices=[]), closing(split.peek(torch.device("cpu"))) as batches:
        images, _ = next(batches)
    return (*images.shape[2:], images.shape[1])


def _generators(loader: DataLoader) -> list[torch.Generator]:
    """Those of a loader, and of the samplers and data sets that it is made of."""
    found, parts = [], [loader]
    for part in parts:  # which grow on the way
        own = getattr(part, "__dict__", {})
        found += [value for value in own.values() if isinstance(value, torch.Generator)]
        inner = [own[name] for name in ("sampler", "batch_sampler", "dataset") if name in own]
        parts += [one for one in inner if all(one is not known for known in parts)]
    return found
