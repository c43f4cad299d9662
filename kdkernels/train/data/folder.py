# SPDX-License-Identifier: Apache-2.0
"""Image folders: a folder per class, decoded once into a memory-mapped array in the user's cache.

The cache file is named by a digest of the listing (paths, sizes, modification times) and the image
size, so that a changed folder is decoded anew and an unchanged one is never decoded twice.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from kdkernels.train.data.dataset import Split
from kdkernels.train.errors import InputError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def load(
    folder: Path, image_size: int | None, cache_dir: Path
) -> tuple[tuple[str, ...], dict[str, Split]]:
    """Class names and splits of a folder of ``train|val|test/<class>/*`` or of ``<class>/*``.

    The splits are those the folder has; a folder without ``train`` is one split named ``"all"``.
    """
    parts = [name for name in ("train", "val", "test") if (folder / name).is_dir()]
    roots = {name: folder / name for name in parts} if "train" in parts else {"all": folder}
    classes = tuple(sorted(path.name for path in _children(next(iter(roots.values())))))
    files, labels, counts = [], [], {}
    for part, root in roots.items():
        before = len(files)
        for path in sorted(_children(root)):
            if path.name not in classes:
                raise InputError(f"{path}: class {path.name!r} has no training images")
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            files += found
            labels += [classes.index(path.name)] * len(found)
        counts[part] = range(before, len(files))
    if not files:
        raise InputError(
            f"--data {folder}: neither a CIFAR folder nor an image folder; expected <class>/* or "
            f"train/<class>/* with images ({', '.join(sorted(SUFFIXES))})"
        )
    images = _decoded(folder, files, image_size, cache_dir)
    labels = np.array(labels, dtype=np.int64)
    return classes, {name: Split(images, labels, np.array(rows)) for name, rows in counts.items()}


def _children(root: Path) -> Iterator[Path]:
    return (path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _decoded(
    folder: Path, files: list[Path], image_size: int | None, cache_dir: Path
) -> np.ndarray:
    listing = hashlib.sha256(f"{folder.resolve()} {image_size}".encode())
    for file in files:
        status = file.stat()
        entry = f"\n{file.relative_to(folder)} {status.st_size} {status.st_mtime_ns}"
        listing.update(entry.encode())
    path = cache_dir / f"{listing.hexdigest()[:32]}.npy"
    if not path.is_file():
        _decode(files, image_size, path)
    try:
        # Copy-on-write rather than read-only, which torch.from_numpy would warn about.
        return np.load(path, mmap_mode="c")
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: damaged cache of {folder} ({error}); delete it") from error


def _decode(files: list[Path], image_size: int | None, path: Path) -> None:
    first = _read(files[0], image_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        images = np.lib.format.open_memmap(
            partial, mode="w+", dtype=np.uint8, shape=(len(files), *first.shape)
        )
        with ThreadPoolExecutor() as pool:
            decoded = pool.map(lambda file: _read(file, image_size), files)
            for row, (file, pixels) in enumerate(zip(files, decoded, strict=True)):
                if pixels.shape != first.shape:
                    raise InputError(
                        f"{file}: {pixels.shape[1]}x{pixels.shape[0]} pixels where {files[0]} has "
                        f"{first.shape[1]}x{first.shape[0]}; give --image-size to resize them all"
                    )
                images[row] = pixels
        images.flush()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read(file: Path, image_size: int | None) -> np.ndarray:
    try:
        with Image.open(file) as image:
            image = image.convert("RGB")
            if image_size is not None:
                image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BICUBIC)
            return np.asarray(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{file}: not a readable image ({error})") from error
