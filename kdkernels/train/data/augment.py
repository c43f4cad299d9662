# SPDX-License-Identifier: Apache-2.0
"""Augmentation of whole batches on their device, from choices drawn beforehand.

The choices for every image are drawn by a view's number, so that a view of an image is a function
of the seed, the number and the image: it does not matter in which batch it is met.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kdkernels.train.errors import InputError

if TYPE_CHECKING:
    from kdkernels.train.data.batches import Batch

# Padding of the random crop as a share of the image side: 4 pixels at 32, as is customary.
CROP_PADDING = 1 / 8
# Side of the square that cutout blanks: 8 pixels at 32, as its authors (arXiv 1708.04552) cut from
# the images of CIFAR-100.
CUTOUT_SIDE = 1 / 4


@dataclass(frozen=True)
class Augmentation:
    """Random crop after padding with black, mirroring of every other image, a blanked square."""

    crop: bool = False
    flip: bool = False
    cutout: bool = False

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """From the names of its parts joined by dashes, as in ``"crop-flip"``, or ``"none"``."""
        parts = [] if text == "none" else text.split("-")
        known = tuple(cls.__dataclass_fields__)
        if len(set(parts)) < len(parts) or not set(parts) <= set(known):
            raise InputError(
                f"--augment: expected auto, none, or some of {', '.join(known)} joined by dashes, "
                f"got {text!r}"
            )
        return cls(**dict.fromkeys(parts, True))

    @staticmethod
    def draw(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
        """Choices (count, 5) for so many images.

        Rows and columns to shift by, whether to mirror, row and column of the blanked square's
        middle: all of them, whatever is used, so that one part does not change the others.
        """
        shifts = 2 * _padding(height, width) + 1
        return rng.integers(0, (shifts, shifts, 2, height, width), (count, 5), dtype=np.int16)

    def __call__(
        self, images: Tensor, choices: Tensor, normalise: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Network input (B, C, H, W) of augmented uint8 images (B, H, W, C)."""
        top, left, mirrored, middle_row, middle_column = choices[:, :, None].unbind(1)
        if self.crop or self.flip:
            images = self._shift_and_mirror(images, top, left, mirrored.bool())
        inputs = normalise(images)
        if self.cutout:
            height, width = inputs.shape[2:]
            side = max(1, round(CUTOUT_SIDE * min(height, width)))
            # The middle may be anywhere, so squares reach over the edge, as published.
            rows = _within(height, middle_row - side // 2, side)
            columns = _within(width, middle_column - side // 2, side)
            # Behind the normalisation: blank is the mean colour, not black.
            inputs.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)
        return inputs

    def _shift_and_mirror(
        self, images: Tensor, top: Tensor, left: Tensor, mirrored: Tensor
    ) -> Tensor:
        count, height, width, channels = images.shape
        rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
        if self.flip:
            columns = torch.where(mirrored, columns.flip(0), columns)
        if self.crop:
            pad = _padding(height, width)
            images = F.pad(images, (0, 0, pad, pad, pad, pad))
            rows, columns = rows + top, columns + left
        rows, columns = rows.expand(count, -1), columns.expand(count, -1)
        # One gather of pixels for both.
        first = torch.arange(count, device=images.device)[:, None] * images.shape[1]
        pixels = (first + rows)[:, :, None] * images.shape[2] + columns[:, None, :]
        chosen = images.reshape(-1, channels).index_select(0, pixels.reshape(-1))
        return chosen.view(count, height, width, channels)


def mix_up(batch: Batch, alpha: float, classes: int, rng: np.random.Generator) -> Batch:
    """Mix every image and its label with another's of the batch (mixup, arXiv 1710.09412).

    One share, drawn from Beta(alpha, alpha), for the whole batch, and the same partners in each of
    its views. Labels become probabilities (B, K).
    """
    share = rng.beta(alpha, alpha)
    views = len(batch.views)
    order = rng.permutation(len(batch.images) // views)
    order = torch.from_numpy(order).to(batch.images.device)

    def mixed(values: Tensor) -> Tensor:
        partners = values.unflatten(0, (views, -1)).index_select(1, order).flatten(0, 1)
        return torch.lerp(partners, values, share)

    labels = batch.labels
    if labels.ndim == 1:
        labels = F.one_hot(labels, classes).to(batch.images.dtype)
    return batch._replace(images=mixed(batch.images), labels=mixed(labels))


def quarter_turns(batch: Batch) -> Batch:
    """The batch in its four orientations, one after the other; ``turns`` tells which.

    Self-supervised distillation (SSKD, arXiv 2006.07114) learns from these.
    """
    height, width = batch.images.shape[2:]
    if height != width:
        raise InputError(f"quarter turns: expected square images, got {width}x{height}")
    turned = [torch.rot90(batch.images, turns, (2, 3)) for turns in range(4)]
    images = torch.cat(turned).contiguous(memory_format=torch.channels_last)
    turns = torch.arange(4, device=images.device).repeat_interleave(len(batch.images))
    return batch._replace(
        images=images,
        labels=torch.cat([batch.labels] * 4),
        rows=None if batch.rows is None else torch.cat([batch.rows] * 4),
        turns=turns,
    )


def _padding(height: int, width: int) -> int:
    return max(1, round(CROP_PADDING * min(height, width)))


def _within(size: int, start: Tensor, length: int) -> Tensor:
    positions = torch.arange(size, device=start.device)
    return (positions >= start) & (positions < start + length)
