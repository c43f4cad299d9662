# SPDX-License-Identifier: Apache-2.0
"""Image data sets: built-in digits, CIFAR-10/100 as published, folders of images, NumPy arrays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from kdkernels.train.data import arrays, cache, cifar, folder
from kdkernels.train.data.augment import Augmentation, mix_up, quarter_turns
from kdkernels.train.data.batches import Batch, Batches, normaliser, steps_in_short
from kdkernels.train.data.dataset import Dataset, Split, split_off
from kdkernels.train.data.loaders import LoaderBatches, LoaderData, LoaderSplit, shape_of
from kdkernels.train.data.sources import open_source
from kdkernels.train.errors import InputError

__all__ = [
    "Augmentation",
    "Batch",
    "Batches",
    "Dataset",
    "LoaderBatches",
    "LoaderData",
    "LoaderSplit",
    "Split",
    "from_arrays",
    "load_data",
    "mix_up",
    "normaliser",
    "quarter_turns",
    "shape_of",
    "split_off",
    "steps_in_short",
]

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
    """Load ``"digits"`` or what lies at a path: a folder, a tar of one, or an .npz.

    A folder holds CIFAR-10 or CIFAR-100 (python version), images, or NumPy arrays. A set without a
    test or validation part gets one, stratified and drawn by ``split_seed``: validation is
    ``val_fraction`` of the training images. Anything but the digits is decoded into ``cache_dir``
    once.
    """
    if name_or_path == "digits":
        decoded, test_fraction, augment = _digits(), DIGITS_TEST_FRACTION, "crop"
    else:
        path = Path(name_or_path).expanduser()
        if not path.exists():
            raise InputError(
                f"--data {name_or_path}: expected 'digits', a folder, a tar of one or an .npz, "
                f"found nothing there"
            )
        try:
            decoded = _decoded(path, image_size, cache_dir)
        except InputError as error:
            raise InputError(f"--data: {error}") from error
        test_fraction, augment = TEST_FRACTION, "crop-flip"
    contents = decoded.contents
    if image_size is not None and contents.kind != folder.KIND:
        raise InputError(
            f"--image-size: {contents.name} has images of one size; it is for image folders"
        )
    parts = {
        part: Split(decoded.images, contents.labels, np.arange(*rows))
        for part, rows in contents.parts.items()
    }
    train = parts.get("train", parts.get("all"))
    val, test = parts.get("val"), parts.get("test")
    # With one held-out part only, that part is the test set: selection must not see it.
    if test is None:
        val, test = None, val
    if test is None:
        train, test = split_off(train, test_fraction, split_seed)
    if val is None:
        train, val = split_off(train, val_fraction, split_seed)
    named = contents.name, contents.classes, decoded.digest, augment
    return Dataset.build(*named, train, val, test, contents.ignored)


def from_arrays(
    images: np.ndarray, labels: np.ndarray, *, val_fraction: float, split_seed: int
) -> Dataset:
    """A data set of arrays in memory, with validation and test parts as :func:`load_data` draws."""
    images = arrays.checked_images(images, "data")
    labels = arrays.checked_labels(labels, len(images), "data")
    if not len(images):
        raise InputError("data: no images")
    rest, test = split_off(Split(images, labels, np.arange(len(images))), TEST_FRACTION, split_seed)
    train, val = split_off(rest, val_fraction, split_seed)
    classes = tuple(map(str, range(labels.max() + 1)))
    digest = cache.digest(images, labels)
    return Dataset.build("arrays", classes, digest, "crop-flip", train, val, test)


def _decoded(path: Path, image_size: int | None, cache_dir: Path) -> cache.Decoded:
    source = open_source(path)

    def decode(allocate: cache.Allocate) -> cache.Contents:
        contents = (
            cifar.decode(source, allocate)
            or arrays.decode(source, allocate)
            or folder.decode(source, image_size, allocate)
        )
        if contents is None:
            raise InputError(
                f"{path}: neither a CIFAR folder nor an image folder nor NumPy arrays; "
                f"expected <class>/* or train/<class>/* with images "
                f"({', '.join(sorted(folder.SUFFIXES))}), or images.npy and labels.npy"
            )
        return contents

    return cache.load(source, f"image_size={image_size}", cache_dir, decode)


def _digits() -> cache.Decoded:
    digits = load_digits()
    # Pixels are 0 to 16; uint8 keeps them exactly.
    images = digits.images.astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    names = tuple(map(str, digits.target_names))
    contents = cache.Contents("digits", "built in", names, labels, {"all": (0, len(labels))})
    return cache.Decoded(images, contents, cache.digest(images, labels))
