# SPDX-License-Identifier: Apache-2.0
"""Folders of images: one folder for each class, within ``train``, ``val``, ``test`` or none."""

from __future__ import annotations

import io
import itertools
import posixpath
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from kdkernels.train.data.cache import Allocate, Contents
from kdkernels.train.data.sources import Source
from kdkernels.train.errors import InputError

KIND = "image folder"
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
PARTS = ("train", "val", "test")
# Files read ahead of the threads that decode them, and files a thread takes at a time: handing over
# every single one would take longer than decoding a small image.
CHUNK, GROUP = 1024, 32


class Item(NamedTuple):
    """An image file."""

    part: str
    label: str
    name: str


def decode(source: Source, image_size: int | None, allocate: Allocate) -> Contents | None:
    """Decode ``train|val|test/<class>/*`` or ``<class>/*``; None if there are no images.

    The parts are those the folder has; without any there is one, named ``"all"``. A folder of a
    part's name with images, but no folders of images, in it is a class.
    """
    images = [name for name in source.names if _suffix(name) in SUFFIXES]
    if not images:
        return None
    has_parts = _has_parts(source, images)
    items = sorted(_items(images, has_parts), key=lambda item: (*PARTS, "all").index(item.part))
    if not items:
        raise InputError(
            f"{source.path}: expected a folder of images for each class, found images in one "
            f"folder only"
        )
    part = items[0].part
    classes = tuple(sorted({item.label for item in items if item.part == part}))
    index = {label: number for number, label in enumerate(classes)}
    for item in items:
        if item.label not in index:
            where = source.where(posixpath.dirname(item.name))
            raise InputError(f"{where}: class {item.label!r} has no training images")
    if without := sorted(_class_folders(source, has_parts) - index.keys()):
        where = source.where(posixpath.join(part if has_parts else "", without[0]))
        raise InputError(
            f"{where}: a class without images ({', '.join(sorted(SUFFIXES))}); add some, or take "
            f"the folder away"
        )
    _decode_images(source, [item.name for item in items], image_size, allocate)
    labels = np.array([index[item.label] for item in items], dtype=np.int64)
    parts, start = {}, 0
    for part, group in itertools.groupby(items, key=lambda item: item.part):
        parts[part] = (start, start := start + len(list(group)))
    ignored = Counter(map(_suffix, set(source.names) - {item.name for item in items}))
    return Contents(source.name, KIND, classes, labels, parts, dict(ignored))


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _has_parts(source: Source, images: list[str]) -> bool:
    """Whether images are ``train|val|test/<class>/*``; what may or may not be so is refused."""
    folders = {top for top, slash, _ in (name.partition("/") for name in images) if slash}
    parts = {name.partition("/")[0] for name in images if name.count("/") > 1} & set(PARTS)
    if not parts:
        if folders and folders <= set(PARTS):
            raise InputError(
                f"{source.path}: images lie in {_list(folders)} themselves; expected a folder for "
                f"each class in them"
            )
        return False
    if "train" not in parts:
        raise InputError(
            f"{source.path}: {_list(parts)} with folders of images in it, but no training images; "
            f"expected train/<class>/* (or, of a class of that name, no folders in it)"
        )
    if others := folders - set(PARTS):
        raise InputError(
            f"{source.path}: images in {_list(others)} beside {_list(parts)}, which has folders of "
            f"images in it and so is no class; expected no others than train, val and test"
        )
    return True


def _list(names: set[str]) -> str:
    return ", ".join(f"{name}/" for name in sorted(names))


def _class_folders(source: Source, has_parts: bool) -> set[str]:
    """The folders in which training images of a class are expected, with or without any."""
    start = "train/" if has_parts else ""
    paths = (*source.names, *(f"{name}/" for name in source.empty_folders))
    inner = [path.removeprefix(start) for path in paths if path.startswith(start)]
    return {path.partition("/")[0] for path in inner if "/" in path}


def _items(images: list[str], has_parts: bool) -> Iterator[Item]:
    for name in images:
        part, _, rest = name.partition("/") if has_parts else ("all", "", name)
        label, slash, _ = rest.partition("/")
        if slash and part in (*PARTS, "all"):
            yield Item(part, label, name)


def _decode_images(
    source: Source, names: list[str], image_size: int | None, allocate: Allocate
) -> None:
    rows = {name: row for row, name in enumerate(names)}

    def decoded(group: list[tuple[str, bytes]]) -> list[tuple[str, np.ndarray | Unreadable]]:
        return [(name, _decode(content, image_size)) for name, content in group]

    files = source.read(names)
    first = images = None
    broken, odd = [], []
    with ThreadPoolExecutor() as pool:
        while chunk := list(itertools.islice(files, CHUNK)):
            groups = [chunk[start : start + GROUP] for start in range(0, len(chunk), GROUP)]
            for name, pixels in itertools.chain.from_iterable(pool.map(decoded, groups)):
                if isinstance(pixels, Unreadable):
                    broken.append(f"{source.where(name)} ({pixels.why})")
                    continue
                if first is None:
                    first, images = (name, pixels.shape), allocate((len(names), *pixels.shape))
                if pixels.shape != first[1]:
                    odd.append(f"{source.where(name)} ({_size(pixels.shape)})")
                    continue
                images[rows[name]] = pixels
    if broken:
        raise InputError(f"{len(broken)} of {len(names)} images not readable: {_first(broken)}")
    if odd:
        raise InputError(
            f"{len(odd)} of {len(names)} images of other sizes than {first[0]}, which has "
            f"{_size(first[1])} pixels; give --image-size to resize them all: {_first(odd)}"
        )


def _first(images: list[str], most: int = 10) -> str:
    more = f", and {len(images) - most} more" if len(images) > most else ""
    return ", ".join(images[:most]) + more


class Unreadable(NamedTuple):
    """In the place of an image."""

    why: str


def _decode(content: bytes, image_size: int | None) -> np.ndarray | Unreadable:
    try:
        with Image.open(io.BytesIO(content)) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # which Pillow's conversion would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert("RGB")
            if image_size is not None:
                image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return Unreadable(str(error).partition(" <_io.")[0])  # no name of the file it is not


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
