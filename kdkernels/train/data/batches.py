# SPDX-License-Identifier: Apache-2.0
"""Training batches, gathered and augmented on the device without worker processes.

Every random choice is a function of the seed and of where training stands, never of a generator
carried along: a run resumed at any step sees the batches it would have seen. The order of the
images comes from (seed, epoch), mixing from (seed, step), and augmentation from (seed, view,
image): what is kept about the views of an image, a teacher's logits say, can be found again in any
epoch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdkernels.train.data.augment import Augmentation, mix_up
from kdkernels.train.data.dataset import Dataset
from kdkernels.train.errors import InputError

# What a generator is for: its second key beside the seed.
ORDER, AUGMENT, MIX = range(3)
# An array is kept on a GPU whole if it takes up to this share of its memory.
RESIDENT_SHARE = 0.25
# An epoch of fewer steps is warned of.
FEW_STEPS = 10


class Batch(NamedTuple):
    """One training batch of B images in V views, all images of a view before the next."""

    images: Tensor  # (V * B, C, H, W) float32, normalised
    labels: Tensor  # (V * B,) int64, or (V * B, K) probabilities if images are mixed
    rows: Tensor | None = None  # (V * B,) int64: positions in the training set
    views: tuple[int, ...] = (0,)  # numbers of the V views
    classes: tuple[int, int] | None = None  # it is of these, up to but not including the last
    turns: Tensor | None = None  # of each image by 90 degrees, from augment.quarter_turns


class Batches:
    """The training batch of any step: epochs of shuffled, equally sized batches.

    The rest of an epoch that does not fill a batch is left out; another shuffle brings it in. Each
    image comes in ``views`` views, new ones in every epoch; if ``distinct_views`` is given, there
    are so many in all and they come round again. ``mixup`` is the alpha of
    :func:`~kdkernels.train.data.augment.mix_up`, 0 for none. Batches are handed out in so many
    ``shares``, one for each process and micro-batch.
    """

    def __init__(
        self,
        data: Dataset,
        *,
        batch_size: int,
        augment: str,
        seed: int,
        device: torch.device | str,
        views: int = 1,
        distinct_views: int | None = None,
        augment_seed: int | None = None,
        mixup: float = 0.0,
        shares: int = 1,
    ) -> None:
        self.data, self.device, self.seed = data, torch.device(device), seed
        self.normalise = normaliser(data, self.device)
        if batch_size % shares or len(data.train) < shares:
            raise InputError(
                f"--batch-size {batch_size}: expected a multiple of {shares} (micro-batches x "
                f"processes) for {len(data.train)} training images"
            )
        self.batch_size = min(batch_size, len(data.train) // shares * shares)
        self.shares = shares
        self.per_epoch = len(data.train) // self.batch_size
        self.augment = Augmentation.parse(data.augment if augment == "auto" else augment)
        self.augment_seed = seed if augment_seed is None else augment_seed
        self.views, self.distinct_views, self.mixup = views, distinct_views, mixup
        if self.augment == Augmentation():
            self.distinct_views = 1
        self._images = near(data.train.images, self.device)
        self._labels = torch.from_numpy(data.train.labels)
        self._rows = torch.from_numpy(data.train.rows)
        self.pool = torch.arange(len(data.train))  # rows it is of
        self.classes: tuple[int, int] | None = None
        self._epoch, self._order = -1, torch.empty(0)
        self._choices: dict[int, Tensor] = {}  # of the views lately used

    def __call__(self, step: int, share: int = 0) -> Batch:
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, ORDER, epoch))
            self._order = self.pool[torch.from_numpy(rng.permutation(len(self.pool)))]
            self._epoch = epoch
        rows = self._order[position * self.batch_size : (position + 1) * self.batch_size]
        size = self.batch_size // self.shares
        own = slice(share * size, (share + 1) * size)
        if not self.mixup:
            rows = rows[own]
        views = self.views_of(epoch)
        images = [self.view(rows, view) for view in views]
        batch = Batch(
            images=torch.cat(images) if len(images) > 1 else images[0],
            labels=self._labels[self._rows[rows]].repeat(self.views).to(self.device),
            rows=rows.repeat(self.views).to(self.device),
            views=tuple(views),
            classes=self.classes,
        )
        if self.mixup:
            rng = np.random.default_rng((self.seed, MIX, step))
            # Partners may be of other shares: mixed as a whole, so that shares change nothing.
            batch = _part(mix_up(batch, self.mixup, len(self.data.classes), rng), own)
        return batch

    def views_of(self, epoch: int) -> list[int]:
        """Numbers of the views that an epoch shows."""
        views = range(epoch * self.views, (epoch + 1) * self.views)
        return [view % self.distinct_views if self.distinct_views else view for view in views]

    def only(self, classes: range) -> Batches:
        """Batches of the images of some classes in a row, in epochs of their own.

        Rows, labels and the views of an image stay what they are.
        """
        part = copy.copy(self)
        labels = self._labels[self._rows]
        own = (labels >= classes.start) & (labels < classes.stop)
        part.pool, part.classes = own.nonzero().flatten(), (classes.start, classes.stop)
        if len(part.pool) < self.shares:
            raise InputError(
                f"--data {self.data.name}: {len(part.pool)} training images of classes "
                f"{classes.start} to {classes.stop - 1}, fewer than micro-batches x processes"
            )
        part.batch_size = min(self.batch_size, len(part.pool) // self.shares * self.shares)
        part.per_epoch = len(part.pool) // part.batch_size
        part._epoch, part._choices = -1, {}
        return part

    def view(self, rows: Tensor, view: int) -> Tensor:
        """Network input for images of the training set, in the view of that number."""
        rows_of_all = self._rows[rows].to(self._images.device)
        images = self._images.index_select(0, rows_of_all).to(self.device)
        if self.augment == Augmentation():
            return self.normalise(images)
        choices = self._drawn(view)[rows].to(self.device, torch.int64)
        return self.augment(images, choices, self.normalise)

    def _drawn(self, view: int) -> Tensor:
        if view not in self._choices:
            if len(self._choices) >= self.views:
                del self._choices[next(iter(self._choices))]
            rng = np.random.default_rng((self.augment_seed, AUGMENT, view))
            height, width, _ = self.data.shape
            choices = self.augment.draw(rng, len(self.data.train), height, width)
            self._choices[view] = torch.from_numpy(choices)
        return self._choices[view]


def steps_in_short(images: int, batch_size: int) -> list[str]:
    """How many steps an epoch has and what it leaves out; a warning if they are few."""
    steps, left = divmod(images, min(batch_size, images))
    out = f" (the {left} images that are left come in other epochs)" if left else ""
    number = f"{steps:,} step{'s' * (steps > 1)}"
    lines = [f"{number} of {min(batch_size, images)} images an epoch{out}"]
    smaller = 2 ** int(math.log2(max(images / FEW_STEPS, 1)))
    if steps < FEW_STEPS and smaller < batch_size:
        lines.append(
            f"warning: {number} an epoch: few; a --batch-size of {smaller} makes "
            f"{images // smaller}"
        )
    return lines


def _part(batch: Batch, own: slice) -> Batch:
    """The samples ``own``, in all views."""

    def narrowed(value: Tensor | None) -> Tensor | None:
        if value is None:
            return None
        return value.unflatten(0, (len(batch.views), -1))[:, own].flatten(0, 1)

    images, labels, rows, turns = map(
        narrowed, (batch.images, batch.labels, batch.rows, batch.turns)
    )
    return batch._replace(images=images, labels=labels, rows=rows, turns=turns)


def normaliser(data: Dataset, device: torch.device) -> Callable[[Tensor], Tensor]:
    """From uint8 images (B, H, W, C) to normalised float32 network input (B, C, H, W).

    Memory stays channels-last, in which convolutions are fastest on CPUs and GPUs alike.
    """
    # Repeated over a row of pixels: long inner loops are several times as fast.
    width = data.shape[1]
    mean, scale = (
        torch.from_numpy(array).repeat(width).to(device) for array in (data.mean, 1 / data.std)
    )

    def normalise(images: Tensor) -> Tensor:
        inputs = images.flatten(2).float().sub_(mean).mul_(scale)
        return inputs.view(images.shape).permute(0, 3, 1, 2)

    return normalise


def near(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on a GPU that has room for it, else where it is."""
    if device.type == "cuda":
        room = RESIDENT_SHARE * torch.cuda.get_device_properties(device).total_memory
        if array.nbytes <= room:
            return torch.from_numpy(array).to(device)
    return torch.from_numpy(array)
