# SPDX-License-Identifier: Apache-2.0
"""The images of ``train_speed.py``, or what stands in for them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from kdkernels.train.data import Dataset, Split, load_data

STAND_IN = "stand-in"
VAL, TEST = 256, 1000  # images: read after every short training, so few


def load(path: Path, cache_dir: Path) -> Dataset:
    """The data, or what stands in for it."""
    if path.exists():
        return load_data(
            str(path), val_fraction=0.1, split_seed=0, image_size=None, cache_dir=cache_dir
        )
    print(
        f"WARNING: {path} does not exist: this measures a STAND-IN of made-up images, not the data "
        "of the results kept here, and its accuracies mean nothing",
        file=sys.stderr,
    )
    return stand_in()


def shortened(data: Dataset) -> Dataset:
    """With so many images for validation and test as are worth the time."""
    rng = np.random.default_rng(0)
    val, test = (
        replace(split, rows=rng.permutation(split.rows)[:count])
        for split, count in ((data.val, VAL), (data.test, TEST))
    )
    return replace(data, val=val, test=test)


def stand_in(count: int = 6400, classes: int = 100) -> Dataset:
    """Blurred noise of its own for every class, with noise of each image's own."""
    rng = np.random.default_rng(0)
    labels = np.arange(count + VAL + TEST) % classes
    prototypes = rng.integers(0, 256, (classes, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    noise = rng.normal(0, 40, (len(labels), 32, 32, 3))
    images = (prototypes[labels] + noise).clip(0, 255).astype(np.uint8)
    parts = np.split(np.arange(len(labels)), [count, count + VAL])
    splits = [Split(images, labels, rows) for rows in parts]
    names = tuple(map(str, range(classes)))
    return Dataset.build(STAND_IN, names, STAND_IN, "crop-flip", *splits)
