# SPDX-License-Identifier: Apache-2.0
"""Images as one ``uint8`` array and the rows of it that make a training, validation or test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

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


@dataclass(frozen=True)
class Dataset:
    """A named data set: ``train`` fits, ``val`` selects, ``test`` is read once at the end.

    ``mean`` and ``std`` (C,) are those of the training pixels, in units of 0 to 255. ``augment``
    is the augmentation that suits these images, used where the user asks for none by name.
    ``ignored`` counts, by suffix, the files found with them that are no images of a class.
    ``digest`` names all pixels and labels: what is kept about the images elsewhere is kept under
    it.
    """

    name: str
    classes: tuple[str, ...]
    digest: str
    train: Split
    val: Split
    test: Split
    mean: np.ndarray
    std: np.ndarray
    augment: str
    ignored: Mapping[str, int] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, Split]:
        """The three by the names that messages have for them."""
        return {"training": self.train, "validation": self.val, "test": self.test}

    @property
    def classes_in_short(self) -> str:
        """The first and the last."""
        return f"classes {self.classes[0]}..{self.classes[-1]}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.train.images.shape[1:]

    @classmethod
    def build(
        cls,
        name: str,
        classes: tuple[str, ...],
        digest: str,
        augment: str,
        train: Split,
        val: Split,
        test: Split,
        ignored: Mapping[str, int] | None = None,
    ) -> Dataset:
        """A data set with the statistics of its training pixels; an empty split is refused."""
        for part, split in {"training": train, "validation": val, "test": test}.items():
            if not len(split):
                raise InputError(f"--data {name}: the {part} set is empty: too few images")
        mean, std = _pixel_statistics(train)
        return cls(name, classes, digest, train, val, test, mean, std, augment, ignored or {})

    def described(self) -> list[str]:
        """What was read, in a line, and a warning for each split in which classes are missing."""
        counts = {part: len(split) for part, split in self.splits.items()}
        each = ", ".join(f"{count:,} {part}" for part, count in counts.items())
        height, width, _ = self.shape
        line = (
            f"{self.name}: {sum(counts.values()):,} images of {width}x{height} pixels in "
            f"{len(self.classes)} classes ({each})"
        )
        if self.ignored:
            kinds = sorted(self.ignored.items(), key=lambda kind: (-kind[1], kind[0]))
            each = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in kinds)
            line += f"; ignored {sum(self.ignored.values()):,} other files ({each})"
        lines = [line]
        for part, split in self.splits.items():
            found = np.bincount(split.labels[split.rows], minlength=len(self.classes))
            if not found.all():
                missing = [self.classes[label] for label in np.flatnonzero(found == 0)]
                lines.append(f"warning: {self.name}: no {part} images of {_listed(missing)}")
        return lines

    def only(self, classes: range) -> Dataset:
        """The images of some classes in a row, numbered from 0; seen as part of the whole set.

        Pixels are normalised by the whole set's statistics.
        """
        if len(classes) == len(self.classes):
            return self

        names = self.classes[classes.start : classes.stop]

        def part(split: Split) -> Split:
            labels = split.labels[split.rows]
            rows = split.rows[(labels >= classes.start) & (labels < classes.stop)]
            if not len(rows):
                raise InputError(
                    f"--data {self.name}: no images of {', '.join(names)} to train, validate or "
                    f"test on: too few images"
                )
            return Split(split.images, split.labels - classes.start, rows)

        return replace(
            self,
            classes=names,
            digest=f"{self.digest}-{classes.start}-{classes.stop}",
            **{name: part(getattr(self, name)) for name in ("train", "val", "test")},
        )


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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


def _pixel_statistics(split: Split, chunk: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    # From histograms: exact, and faster than sums in floating point.
    counts = torch.zeros(split.images.shape[-1], 256, dtype=torch.int64)
    for start in range(0, len(split), chunk):
        images = torch.from_numpy(split.take(slice(start, start + chunk))[0])
        for channel, histogram in enumerate(counts):
            histogram += torch.bincount(images[..., channel].flatten(), minlength=256)
    values, shares = np.arange(256.0), (counts.double() / counts[0].sum()).numpy()
    mean = shares @ values
    variance = (shares * np.square(values - mean[:, None])).sum(1)
    # A constant channel carries nothing; dividing it by 1 keeps it at zero.
    std = np.where(variance > 0, np.sqrt(variance), 1.0)
    return mean.astype(np.float32), std.astype(np.float32)
