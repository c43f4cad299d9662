# SPDX-License-Identifier: Apache-2.0
"""Small data sets on disk, for the tests of what reads them."""

from __future__ import annotations

import pickle
import tarfile

import numpy as np
from PIL import Image

from kdkernels.train.data import load_data


def load(path, cache_dir, **changes):
    settings = {"val_fraction": 0.25, "split_seed": 0, "image_size": None} | changes
    return load_data(str(path), cache_dir=cache_dir, **settings)


def everything(split):
    return split.take(slice(None))


def cached(cache_dir):
    """The folders of decoded data sets."""
    return [path for path in cache_dir.iterdir() if path.is_dir()]


def write_images(root, classes=("cat", "dog"), count=8, size=(12, 10)):
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")


def pack(folder, path, mode):
    with tarfile.open(path, mode) as archive:
        # Any order will do.
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.add(file, f"./{file.relative_to(folder.parent)}", recursive=False)
    return path


def arrays(parts, names="{part}_{what}", shape=(9, 8, 3)):
    rng = np.random.default_rng(0)
    made = {}
    for part, count in parts.items():
        pixels = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        made[names.format(part=part, what="images")] = pixels
        made[names.format(part=part, what="labels")] = np.arange(count) % 3
    return made


def write_pickle(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def cifar_batch(count, classes, label_name, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    return {"data": pixels, label_name: [i % classes for i in range(count)]}


def write_cifar10(root):
    """CIFAR-10 as published, of few images."""
    write_pickle(root / "batches.meta", {"label_names": [f"c{i}" for i in range(10)]})
    for index in range(1, 6):
        write_pickle(root / f"data_batch_{index}", cifar_batch(20, 10, "labels", index))
    write_pickle(root / "test_batch", cifar_batch(30, 10, "labels", 0))
    return root
