# SPDX-License-Identifier: Apache-2.0
"""Image data sets: built-in digits, CIFAR-10/100 as published, any folder of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from kdkernels.train.data import cifar, folder
from kdkernels.train.data.batches import AUGMENTATIONS, Batch, Batches, normaliser
from kdkernels.train.data.dataset import Dataset, Split, split_off
from kdkernels.train.errors import InputError

__all__ = ["AUGMENTATIONS", "Batch", "Batches", "Dataset", "Split", "load_data", "normaliser"]

# Half of the digits test, as in scikit-learn's own example; other sets give up a fifth.
DIGITS_TEST_FRACTION = 0.5
TEST_FRACTION = 0.2


def load_data(
    name_or_path: str,
    *,
    val_fraction: float,
    split_seed: int,
    image_size: int | None,
    cache_dir: Path,
) -> Dataset:
    """Load ``"digits"``, a folder holding CIFAR-10/100's python version, or an image folder.

    A set without a test or validation part gets one, stratified and drawn by ``split_seed``:
    validation is ``val_fraction`` of the training images.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"--val-fraction: expected a number between 0 and 1, got {val_fraction}")

    def without_val(train: Split) -> tuple[Split, Split]:
        return split_off(train, val_fraction, split_seed)

    if name_or_path == "digits":
        # Pixels are 0 to 16; uint8 keeps them exactly.
        digits = load_digits()
        images = digits.images.astype(np.uint8)[..., None]
        everything = Split.whole(images, digits.target.astype(np.int64))
        train, test = split_off(everything, DIGITS_TEST_FRACTION, split_seed)
        classes = tuple(map(str, digits.target_names))
        return Dataset.build("digits", classes, "crop", *without_val(train), test)

    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        raise InputError(f"--data {name_or_path}: expected 'digits' or a folder, found neither")
    found = cifar.find(path)
    if found:
        layout, root = found
        classes, train, test = cifar.load(layout, root)
        return Dataset.build(layout.name, classes, "crop-flip", *without_val(train), test)

    classes, splits = folder.load(path, image_size, cache_dir)
    train = splits.get("train", splits.get("all"))
    val, test = splits.get("val"), splits.get("test")
    # With one held-out part only, that part is the test set: selection must not see it.
    if test is None:
        val, test = None, val
    if test is None:
        train, test = split_off(train, TEST_FRACTION, split_seed)
    if val is None:
        train, val = without_val(train)
    return Dataset.build(path.name, classes, "crop-flip", train, val, test)
