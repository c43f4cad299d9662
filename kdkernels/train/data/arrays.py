# SPDX-License-Identifier: Apache-2.0
"""NumPy arrays of images and labels: an .npz, or .npy files in a folder.

They are called ``images`` and ``labels`` or, part by part, ``train_images``, ``train_labels`` and
so on for ``val`` and ``test``. ``x`` and ``y`` do as well, and so do ``x_train`` and its like.
"""

from __future__ import annotations

import io
import re

import numpy as np

from kdkernels.train.data.cache import Allocate, Contents
from kdkernels.train.data.sources import Source
from kdkernels.train.errors import InputError

KIND = "arrays"
PARTS = ("train", "val", "test", "all")
NAME = re.compile(
    r"(?:(?P<before>train|val|test)_)?(?:(?P<images>images|x)|labels|y)"
    r"(?:_(?P<behind>train|val|test))?\.npy"
)
MAX_CHANNELS = 4


def decode(source: Source, allocate: Allocate) -> Contents | None:
    """Take over the arrays of a source; None if it has none of these names."""
    files = {name: found for name in source.names if (found := NAME.fullmatch(name))}
    if not files:
        return None
    images, labels = {}, {}
    for name, content in source.read(files):
        part = files[name]["before"] or files[name]["behind"] or "all"
        of_kind = images if files[name]["images"] else labels
        of_kind[part] = _array(content, source.where(name))
    if images.keys() != labels.keys() or not {"train", "all"} & images.keys():
        raise InputError(
            f"{source.path}: expected arrays images and labels, or train_images and train_labels, "
            f"also for val and test; got {', '.join(sorted(files))}"
        )
    order = [part for part in PARTS if part in images]
    for part in order:
        where = source.path if part == "all" else f"{source.path}, {part}"
        images[part] = checked_images(images[part], str(where))
        labels[part] = checked_labels(labels[part], len(images[part]), str(where))
    shapes = {images[part].shape[1:] for part in order}
    if len(shapes) > 1:
        raise InputError(f"{source.path}: images of different sizes: {sorted(shapes)}")
    joined = np.concatenate([labels[part] for part in order])
    room = allocate((len(joined), *shapes.pop()))
    parts, start = {}, 0
    for part in order:
        parts[part] = (start, start := start + len(labels[part]))
        room[slice(*parts[part])] = images[part]
    classes = tuple(map(str, range(joined.max() + 1)))
    return Contents(source.name, KIND, classes, joined, parts)


def _array(content: bytes, where: str) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{where}: not a readable array ({error})") from error


def checked_images(images: np.ndarray, where: str) -> np.ndarray:
    """Images as (N, H, W, C), or an error that says where they are from."""
    channels = images.shape[3] if images.ndim == 4 else 1
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or not 0 < channels <= MAX_CHANNELS:
        raise InputError(
            f"{where}: expected images as uint8 of shape (N, H, W) or (N, H, W, C) with at most "
            f"{MAX_CHANNELS} channels, got {images.dtype} of shape {images.shape}"
        )
    return images.reshape(*images.shape[:3], channels)


def checked_labels(labels: np.ndarray, count: int, where: str) -> np.ndarray:
    """Labels (N,) of so many images, or an error that says where they are from."""
    if labels.shape not in ((count,), (count, 1)) or labels.dtype.kind not in "iu":
        raise InputError(
            f"{where}: expected a whole number for each of {count} images as label, "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if count and labels.min() < 0:
        raise InputError(f"{where}: expected labels from 0 up, got {labels.min()}")
    return labels.reshape(-1).astype(np.int64)
