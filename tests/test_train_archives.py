# SPDX-License-Identifier: Apache-2.0
"""Data sets in tars: what the folder in them is, and damage."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_datasets import load, pack, write_cifar10, write_images

from kdkernels.train import InputError

REAL = Path(__file__).parents[2] / "shared" / "data" / "tiny-imagenet-even100-32px.tar.xz"


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_is_the_folder_in_it(tmp_path, mode):
    for part in ("train", "test"):
        write_images(tmp_path / "set" / part)
    folder = load(tmp_path / "set", tmp_path / "cache")
    data = load(pack(tmp_path / "set", tmp_path / "set.tar.any", mode), tmp_path / "cache")
    assert (data.name, data.classes, data.digest) == ("set", folder.classes, folder.digest)
    for one, other in zip(
        (data.train, data.val, data.test), (folder.train, folder.val, folder.test), strict=True
    ):
        assert np.array_equal(one.rows, other.rows)


def test_a_tar_of_cifar(tmp_path):
    cifar10 = write_cifar10(tmp_path / "data" / "cifar-10-batches-py")
    path = pack(cifar10, tmp_path / "cifar-10-python.tar.gz", "w:gz")
    data = load(path, tmp_path / "cache")
    assert data.name == "cifar10" and data.digest == load(cifar10, tmp_path / "cache").digest


def test_a_tar_is_opened_once(tmp_path, monkeypatch):
    write_images(tmp_path / "set")
    path = pack(tmp_path / "set", tmp_path / "set.tar", "w")
    digest = load(path, tmp_path / "cache").digest
    monkeypatch.setattr(tarfile, "open", None)
    assert load(path, tmp_path / "cache").digest == digest
    os.utime(path, (0, 0))
    with pytest.raises(InputError, match=r"set\.tar: not a readable archive"):
        load(path, tmp_path / "cache")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9])
def test_a_truncated_tar_is_named(tmp_path, mode, share):
    write_images(tmp_path / "set")
    path = pack(tmp_path / "set", tmp_path / "set.tar", mode)
    content = path.read_bytes()
    # An archive ends in blocks of zeros, which may be cut short.
    path.write_bytes(content[: int(share * len(content.rstrip(b"\0")))])
    with pytest.raises(InputError, match=r"set\.tar: not a readable archive"):
        load(path, tmp_path / "cache")


def test_a_tar_cut_between_files_is_named(tmp_path):
    write_images(tmp_path / "set")
    path = pack(tmp_path / "set", tmp_path / "set.tar", "w")
    with tarfile.open(path) as archive:
        stop = archive.getmembers()[9].offset
    for end in (stop, stop + 100):
        path.write_bytes(path.read_bytes()[:end])
        with pytest.raises(InputError, match="not a readable archive"):
            load(path, tmp_path / "cache")


def test_a_corrupt_image_in_a_tar_is_named(tmp_path):
    write_images(tmp_path / "set")
    (tmp_path / "set" / "dog" / "5.png").write_bytes(b"no image")
    path = pack(tmp_path / "set", tmp_path / "set.tar", "w")
    with pytest.raises(InputError, match=r"not readable: .*set\.tar: set/dog/5\.png \("):
        load(path, tmp_path / "cache")


def test_links_in_a_tar_are_refused(tmp_path):
    write_images(tmp_path / "set")
    (tmp_path / "set" / "dog" / "link.png").symlink_to("5.png")
    path = pack(tmp_path / "set", tmp_path / "set.tar", "w")
    with pytest.raises(InputError, match=r"dog/link\.png: a link; expected the file itself"):
        load(path, tmp_path / "cache")


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is missing")
@pytest.mark.slow
def test_100_classes_of_tiny_imagenet(tmp_path):
    data = load(REAL, tmp_path, val_fraction=0.1)
    assert (len(data.classes), data.shape) == (100, (32, 32, 3))
    assert (len(data.train), len(data.val), len(data.test)) == (45000, 5000, 5000)
    for split, count in ((data.train, 450), (data.val, 50), (data.test, 50)):
        assert (np.bincount(split.labels[split.rows]) == count).all()
    with tarfile.open(REAL) as archive:
        member = next(entry for entry in archive if entry.isfile() and "/" in entry.name)
        pixels = np.asarray(Image.open(archive.extractfile(member)).convert("RGB"))
    assert any(np.array_equal(pixels, image) for image in data.train.images[:500])
