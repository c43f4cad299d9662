# SPDX-License-Identifier: Apache-2.0
"""Decoded data sets: memory-mapped arrays in a folder of the cache, each made once.

The folder's name holds a digest of what it was made from, so that a changed source is decoded anew;
the digest of its content, checked whenever it is opened, tells damage and names the data set to
whatever else is kept about it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

import numpy as np

from kdkernels.train.data.sources import Source
from kdkernels.train.errors import InputError

# Part of every key: raise it when decoding changes.
VERSION = 3


@dataclass(frozen=True)
class Contents:
    """What a data set is besides its images: ``parts`` are the first row and the end of each.

    ``ignored`` counts, by suffix, the files that are no images of a class.
    """

    name: str
    kind: str
    classes: tuple[str, ...]
    labels: np.ndarray
    parts: Mapping[str, tuple[int, int]]
    ignored: Mapping[str, int] = field(default_factory=dict)


# Makes room for images of a shape (N, H, W, C).
Allocate = Callable[[tuple[int, int, int, int]], np.ndarray]


@dataclass(frozen=True)
class Decoded:
    """A decoded data set; ``digest`` is that of its images and labels."""

    images: np.ndarray  # (N, H, W, C) uint8
    contents: Contents
    digest: str


def load(
    source: Source,
    recipe: str,
    cache_dir: Path,
    decode: Callable[[Allocate], Contents],
) -> Decoded:
    """The decoded ``source``, from the cache or else by ``decode``, of which ``recipe`` tells."""
    key = hashlib.sha256(f"{VERSION} {recipe} {source.stamp}".encode()).hexdigest()[:24]
    folder = cache_dir / f"{source.name}-{key}"
    if not folder.is_dir():
        with alone(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                _fill(folder, decode)
    try:
        return _open(folder)
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}: damaged cache of {source.path} ({error}); delete it"
        ) from error


def digest(images: np.ndarray, labels: np.ndarray) -> str:
    """A name for the content of a data set."""
    content = hashlib.sha256(f"{images.shape} {labels.dtype}".encode())
    for array in (images, labels):
        content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return content.hexdigest()


def _open(folder: Path) -> Decoded:
    # Copy-on-write rather than read-only, which torch.from_numpy would warn about.
    images = np.load(folder / "images.npy", mmap_mode="c")
    labels = np.load(folder / "labels.npy")
    index = json.loads((folder / "index.json").read_text())
    found = digest(images, labels)
    if found != index.pop("digest"):
        raise ValueError("its content is not what was written")
    index["classes"] = tuple(index["classes"])
    return Decoded(images, Contents(labels=labels, **index), found)


def _fill(folder: Path, decode: Callable[[Allocate], Contents]) -> None:
    with made_whole(folder) as unfinished:
        maps = []

        def allocate(shape: tuple[int, int, int, int]) -> np.ndarray:
            maps.append(new_map(unfinished / "images.npy", np.uint8, shape))
            return maps[0]

        contents = decode(allocate)
        np.save(unfinished / "labels.npy", contents.labels)
        index = asdict(contents) | {"digest": digest(maps[0], contents.labels)}
        del index["labels"]
        (unfinished / "index.json").write_text(json.dumps(index, indent=2))


@contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``folder`` if that goes well and is gone otherwise."""
    unfinished = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
    unfinished.mkdir()
    try:
        yield unfinished
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def new_map(path: Path, dtype: np.dtype | type, shape: tuple[int, ...]) -> np.ndarray:
    """An array in a new file that is mapped into memory and has its room on the disk."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    # Writing to a map that the disk has no room for kills the process.
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process at a time; the lock of one that dies is free, and no file is left of it."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, lock):  # the one before took it away, another may have a new one
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
