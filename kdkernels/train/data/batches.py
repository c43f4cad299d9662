# SPDX-License-Identifier: Apache-2.0
"""Training batches, gathered and augmented on the device without worker processes.

Every random choice is a function of (seed, step), never of a generator carried along: a run
resumed at any step sees the batches it would have seen, and the same views can be made again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdkernels.train.data.dataset import Dataset

AUGMENTATIONS = ("auto", "none", "crop", "crop-flip")
# Padding of the random crop as a share of the image side: 4 pixels at 32, as is customary.
CROP_PADDING = 1 / 8


class Batch(NamedTuple):
    """One training batch."""

    images: Tensor  # (B, C, H, W) float32, normalised
    labels: Tensor  # (B,) int64


class Batches:
    """The training batch of any step: epochs of shuffled, equally sized batches.

    The rest of an epoch that does not fill a batch is left out; another shuffle brings it in.
    """

    def __init__(
        self, data: Dataset, *, batch_size: int, augment: str, seed: int, device: torch.device
    ) -> None:
        self.data, self.device, self.seed = data, device, seed
        self.normalise = normaliser(data, device)
        self.batch_size = min(batch_size, len(data.train))
        self.per_epoch = len(data.train) // self.batch_size
        self.augment = data.augment if augment == "auto" else augment
        self._epoch, self._order = -1, None

    def __call__(self, step: int) -> Batch:
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.data.train))
            self._epoch, self._order = epoch, order
        chosen = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        images, labels = (torch.from_numpy(array) for array in self.data.train.take(chosen))
        images = images.to(self.device, non_blocking=True)
        if self.augment != "none":
            rng = np.random.default_rng((self.seed, 1, step))
            images = crop_and_flip(images, rng, flip=self.augment == "crop-flip")
        return Batch(self.normalise(images), labels.to(self.device, non_blocking=True))


def crop_and_flip(images: Tensor, rng: np.random.Generator, *, flip: bool) -> Tensor:
    """Shift each image by up to the crop padding and mirror half of them: one gather for both."""
    count, height, width, _ = images.shape  # (B, H, W, C)
    pad = max(1, round(CROP_PADDING * min(height, width)))
    padded = torch.nn.functional.pad(images, (0, 0, pad, pad, pad, pad))
    top, left = rng.integers(0, 2 * pad + 1, (2, count, 1))
    rows = top + np.arange(height)
    columns = left + np.arange(width)
    if flip:
        mirrored = rng.random((count, 1)) < 0.5
        columns = np.where(mirrored, columns[:, ::-1], columns)
    rows, columns = (torch.from_numpy(index).to(images.device) for index in (rows, columns))
    sample = torch.arange(count, device=images.device)
    return padded[sample[:, None, None], rows[:, :, None], columns[:, None, :]]


def normaliser(data: Dataset, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From uint8 images (B, H, W, C) to normalised float32 network input (B, C, H, W).

    Memory stays channels-last, in which convolutions are fastest on CPUs and GPUs alike.
    """
    mean, std = (torch.from_numpy(array).to(device) for array in (data.mean, data.std))
    return lambda images: ((images.float() - mean) / std).permute(0, 3, 1, 2)
