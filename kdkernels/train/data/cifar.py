# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10 and CIFAR-100 in the layout their authors publish: pickled batches of flat rows."""

from __future__ import annotations

import io
import pickle
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdkernels.train.data.cache import Allocate, Contents
from kdkernels.train.data.sources import Source
from kdkernels.train.errors import InputError

KIND = "CIFAR"
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


def decode(source: Source, allocate: Allocate) -> Contents | None:
    """Decode the CIFAR set that a source holds, or is; None if there is none."""
    found = list(_find(source))
    if len(found) > 1:
        folders = " and ".join(layout.folder for layout, _ in found)
        raise InputError(f"{source.path}: holds {folders}; name one of them")
    if not found:
        return None
    ((layout, folder),) = found
    files = {f"{folder}{name}": name for name in (layout.meta, *layout.train, layout.test)}
    for name in files.keys() - set(source.names):
        raise InputError(f"{source.where(name)}: missing from the CIFAR folder")
    content = {
        files[name]: _unpickle(content, source.where(name)) for name, content in source.read(files)
    }

    def where(name: str) -> str:
        return source.where(f"{folder}{name}")

    classes = tuple(_field(content[layout.meta], layout.classes, where(layout.meta)))
    batches = [
        _batch(content[name], layout, len(classes), where(name))
        for name in (*layout.train, layout.test)
    ]
    images, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    allocate(images.shape)[...] = images
    stop = len(labels) - len(batches[-1][1])
    parts = {"train": (0, stop), "test": (stop, len(labels))}
    return Contents(layout.name, KIND, classes, labels, parts)


def _find(source: Source) -> Iterator[tuple[Layout, str]]:
    """Layouts in a source, each with the folder (and a slash) below which its files are named."""
    for folder in sorted({posixpath.dirname(name) for name in source.names}):
        root = posixpath.basename(folder or source.root.rstrip("/")) or source.name
        for layout in LAYOUTS:
            if root == layout.folder:
                yield layout, f"{folder}/" if folder else ""


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


def _unpickle(content: bytes, where: str) -> dict[str, Any]:
    try:
        # Written by Python 2: its byte strings, array data included, are latin-1 here.
        content = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise InputError(f"{where}: not a readable CIFAR file ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected a dictionary, got {type(content).__name__}")
    return content


def _field(content: dict[str, Any], name: str, where: str) -> Any:
    if name not in content:
        raise InputError(f"{where}: has no {name!r}, only {', '.join(map(repr, content))}")
    return content[name]


def _batch(
    content: dict[str, Any], layout: Layout, classes: int, where: str
) -> tuple[np.ndarray, np.ndarray]:
    flat = _field(content, "data", where)
    labels = np.asarray(_field(content, layout.labels, where))
    if (
        not isinstance(flat, np.ndarray)
        or flat.dtype != np.uint8
        or flat.shape != (len(labels), np.prod(SHAPE))
        or labels.dtype.kind not in "iu"
        or not ((labels >= 0) & (labels < classes)).all()
    ):
        raise InputError(
            f"{where}: expected uint8 data of shape (N, {np.prod(SHAPE)}) and N labels below "
            f"{classes}"
        )
    return flat.reshape(-1, *SHAPE).transpose(0, 2, 3, 1), labels.astype(np.int64)
