# SPDX-License-Identifier: Apache-2.0
"""Images as one ``uint8`` array and the rows of it that make a training, validation or test set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kdkernels.train.errors import InputError


@dataclass(frozen=True)
class Split:
    """Rows of a shared image array: ``images`` (N, H, W, C) uint8, ``labels`` (N,), ``rows`` (n,).

    The array may be a memory map; only the rows asked for are read.
    """

    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, positions: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels at ``positions`` of this split."""
        rows = self.rows[positions]
        return self.images[rows], self.labels[rows]

    @classmethod
    def whole(cls, images: np.ndarray, labels: np.ndarray) -> Split:
        """Every row of the arrays."""
        return cls(images, labels, np.arange(len(labels)))


@dataclass(frozen=True)
class Dataset:
    """A named data set: ``train`` fits, ``val`` selects, ``test`` is read once at the end.

    ``mean`` and ``std`` (C,) are those of the training pixels, in units of 0 to 255. ``augment``
    is the augmentation that suits these images, used where the user asks for none by name.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split
    mean: np.ndarray
    std: np.ndarray
    augment: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.train.images.shape[1:]

    @classmethod
    def build(
        cls,
        name: str,
        classes: tuple[str, ...],
        augment: str,
        train: Split,
        val: Split,
        test: Split,
    ) -> Dataset:
        """A data set with the statistics of its training pixels; an empty split is refused."""
        for part, split in {"training": train, "validation": val, "test": test}.items():
            if not len(split):
                raise InputError(f"--data {name}: the {part} set is empty: too few images")
        mean, std = _pixel_statistics(train)
        return cls(name, classes, train, val, test, mean, std, augment)


def split_off(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Split into (rest, part): ``fraction`` of every class, drawn by ``seed``, makes the part.

    A class of two images or more keeps at least one on either side.
    """
    rng = np.random.default_rng(seed)
    rest, part = [], []
    labels = split.labels[split.rows]
    for label in np.unique(labels):
        rows = rng.permutation(split.rows[labels == label])
        count = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        part.append(rows[:count])
        rest.append(rows[count:])
    return tuple(
        Split(split.images, split.labels, np.sort(np.concatenate(rows))) for rows in (rest, part)
    )


def _pixel_statistics(split: Split, chunk: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    channels = split.images.shape[-1]
    total, squares, count = np.zeros(channels), np.zeros(channels), 0
    for start in range(0, len(split), chunk):
        pixels = split.take(slice(start, start + chunk))[0].reshape(-1, channels).astype(np.float64)
        total += pixels.sum(0)
        squares += np.square(pixels).sum(0)
        count += len(pixels)
    mean = total / count
    variance = np.maximum(squares / count - np.square(mean), 0.0)
    # A constant channel carries nothing; dividing it by 1 keeps it at zero.
    std = np.where(variance > 0, np.sqrt(variance), 1.0)
    return mean.astype(np.float32), std.astype(np.float32)
