# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100 in the layout their authors publish: pickled batches of flat rows."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdkernels.train.data.dataset import Split
from kdkernels.train.errors import InputError

SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class Layout:
    """Where one of the two sets keeps its images, labels and class names."""

    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    labels: str
    meta: str
    classes: str


LAYOUTS = (
    Layout(
        "cifar10",
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "labels",
        "batches.meta",
        "label_names",
    ),
    Layout(
        "cifar100",
        "cifar-100-python",
        ("train",),
        "test",
        "fine_labels",
        "meta",
        "fine_label_names",
    ),
)


def find(folder: Path) -> tuple[Layout, Path] | None:
    """The layout a folder holds, or is, and its root; None if neither."""
    found = [
        (layout, root)
        for layout in LAYOUTS
        for root in (folder / layout.folder, folder.resolve())
        if root.name == layout.folder and root.is_dir()
    ]
    if len(found) > 1:
        roots = " and ".join(str(root) for _, root in found)
        raise InputError(f"--data {folder}: holds {roots}; name one of them")
    return found[0] if found else None


def load(layout: Layout, root: Path) -> tuple[tuple[str, ...], Split, Split]:
    """Class names, training and test images of a layout at ``root``."""
    meta = root / layout.meta
    classes = tuple(_field(_unpickle(meta), layout.classes, meta))
    parts = [_batch(root / name, layout, len(classes)) for name in layout.train]
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    test = _batch(root / layout.test, layout, len(classes))
    return classes, Split.whole(images, labels), Split.whole(*test)


class _ArraysOnly(pickle.Unpickler):
    """Rebuilds NumPy arrays and built-in containers, nothing else: a data set must not run code."""

    allowed = {
        (f"numpy.{core}.{module}", name)
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
    } | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"refusing to load {module}.{name}")
        return super().find_class(module, name)


def _unpickle(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: missing from the CIFAR folder")
    try:
        with path.open("rb") as file:
            # Written by Python 2: its byte strings, array data included, are latin-1 here.
            content = _ArraysOnly(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise InputError(f"{path}: not a readable CIFAR file ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a dictionary, got {type(content).__name__}")
    return content


def _field(content: dict[str, Any], name: str, path: Path) -> Any:
    if name not in content:
        raise InputError(f"{path}: has no {name!r}, only {', '.join(map(repr, content))}")
    return content[name]


def _batch(path: Path, layout: Layout, classes: int) -> tuple[np.ndarray, np.ndarray]:
    content = _unpickle(path)
    flat = _field(content, "data", path)
    labels = np.asarray(_field(content, layout.labels, path))
    expected = f"uint8 data of shape (N, {np.prod(SHAPE)}) and N labels below {classes}"
    if (
        not isinstance(flat, np.ndarray)
        or flat.dtype != np.uint8
        or flat.shape != (len(labels), np.prod(SHAPE))
        or labels.dtype.kind not in "iu"
        or not ((labels >= 0) & (labels < classes)).all()
    ):
        raise InputError(f"{path}: expected {expected}")
    images = flat.reshape(-1, *SHAPE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels.astype(np.int64)
