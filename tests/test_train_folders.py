# SPDX-License-Identifier: Apache-2.0
"""Image folders: parts, sizes, shades, and what is wrong with one."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image
from small_datasets import everything, load, pack, write_images

from kdkernels.train import InputError

ORIENTATION = 0x0112  # of EXIF's tags


def test_image_folder_with_train_val_and_test(tmp_path):
    for part, count in {"train": 8, "val": 4, "test": 6}.items():
        write_images(tmp_path / "set" / part, count=count)
    data = load(tmp_path / "set", tmp_path / "cache")
    assert (data.name, data.classes, data.shape) == ("set", ("cat", "dog"), (10, 12, 3))
    assert (len(data.train), len(data.val), len(data.test)) == (16, 8, 12)
    images, labels = everything(data.test)
    first = np.asarray(Image.open(tmp_path / "set" / "test" / "dog" / "0.png"))
    assert np.array_equal(images[labels == 1][0], first)


@pytest.mark.parametrize("part", ["val", "test"])
def test_a_lone_held_out_part_is_the_test_set(tmp_path, part):
    write_images(tmp_path / "set" / "train")
    write_images(tmp_path / "set" / part, count=3)
    data = load(tmp_path / "set", tmp_path / "cache")
    assert (len(data.train), len(data.val), len(data.test)) == (12, 4, 6)


def test_single_level_folder_is_split(tmp_path):
    write_images(tmp_path / "set", count=20)
    data = load(tmp_path / "set", tmp_path / "cache")
    assert (len(data.train), len(data.val), len(data.test)) == (24, 8, 8)


@pytest.mark.parametrize("classes", [("car", "train"), ("bus", "test", "train", "val")])
def test_a_class_may_be_called_as_a_part_is(tmp_path, classes):
    write_images(tmp_path / "set", classes=classes)
    data = load(tmp_path / "set", tmp_path / "cache")
    assert data.classes == classes
    assert len(data.train) + len(data.val) + len(data.test) == 8 * len(classes)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "test"), "images lie in test/, train/ themselves; expected a folder for each"),
        (("val/cat", "test/cat"), "test/, val/ with folders of images in it, but no training im"),
        (("train/cat", "train/dog", "valid/cat"), "images in valid/ beside train/, which has fol"),
        (("train/steam", "car"), "images in car/ beside train/, .* and so is no class"),
    ],
)
def test_folders_that_may_be_parts_or_classes_are_refused(tmp_path, folders, message):
    write_images(tmp_path / "set", classes=folders)
    with pytest.raises(InputError, match=f"--data: .*set: {message}"):
        load(tmp_path / "set", tmp_path / "cache")


def test_grey_images_of_16_bits_keep_their_shades(tmp_path):
    shades = np.linspace(0, 65535, 144).astype(np.uint16).reshape(12, 12)
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(8):
            Image.fromarray(shades).save(tmp_path / "data" / label / f"{number}.png")
    images = everything(load(tmp_path / "data", tmp_path / "cache").train)[0]
    assert np.array_equal(images[0, :, :, 0], shades >> 8)


@pytest.mark.parametrize(
    ("count", "named"), [(1, r"dog.0\.png \([^<)]*\)+$"), (12, r"dog.0\.png .*, and 2 more$")]
)
def test_corrupt_images_are_all_named_and_leave_nothing_behind(tmp_path, count, named):
    write_images(tmp_path / "set", count=12)
    for path in sorted((tmp_path / "set" / "dog").iterdir())[:count]:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=rf"{count} of 24 images not readable: .*{named}"):
        load(tmp_path / "set", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_images_of_several_sizes_need_image_size(tmp_path):
    write_images(tmp_path / "set")
    for name in ("8.png", "9.png"):
        Image.new("RGB", (30, 20)).save(tmp_path / "set" / "cat" / name)
    message = r"2 of 18 .* has 12x10 pixels; give --image-size .* .*8\.png \(30x20\), .*9\.png \(30"
    with pytest.raises(InputError, match=message):
        load(tmp_path / "set", tmp_path / "cache")
    assert load(tmp_path / "set", tmp_path / "cache", image_size=8).shape == (8, 8, 3)


def test_folders_that_are_no_data_set_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a CIFAR folder nor an image folder"):
        load(tmp_path / "empty", tmp_path / "cache")
    with pytest.raises(InputError, match="nowhere: expected 'digits', a folder, a tar"):
        load(tmp_path / "nowhere", tmp_path / "cache")
    with pytest.raises(InputError, match="--image-size: digits has images of one size"):
        load("digits", tmp_path / "cache", image_size=16)
    write_images(tmp_path / "odd" / "train", classes=("cat",))
    write_images(tmp_path / "odd" / "test", classes=("dog",))
    with pytest.raises(InputError, match="class 'dog' has no training images"):
        load(tmp_path / "odd", tmp_path / "cache")


@pytest.mark.parametrize("content", [None, "notes.txt", "inner/photo.heic"])
@pytest.mark.parametrize("form", ["folder", "parts", "tar", "zip"])
def test_a_class_without_images_is_named(tmp_path, content, form):
    root = tmp_path / "set" / "train" if form == "parts" else tmp_path / "set"
    write_images(root, classes=("cat", "dog"))
    if form == "parts":
        write_images(tmp_path / "set" / "test")
    (root / "eel" / "inner").mkdir(parents=True)
    if content:
        (root / "eel" / content).touch()
    path = tmp_path / "set"
    if form == "tar":
        path = pack(path, tmp_path / "set.tar", "w")
    elif form == "zip":
        path = shutil.make_archive(tmp_path / "packed", "zip", tmp_path, "set")
    with pytest.raises(InputError, match=r"--data: .*set.*eel: a class without images \(\.bmp, "):
        load(path, tmp_path / "cache")


def test_images_without_class_folders_are_refused(tmp_path):
    write_images(tmp_path / "set", classes=("cat",))
    with pytest.raises(InputError, match="expected a folder of images for each class"):
        load(tmp_path / "set", tmp_path / "cache")


def test_what_was_read_is_said_and_what_was_ignored(tmp_path):
    write_images(tmp_path / "set", count=20)
    for name in ("cat/a.txt", "dog/b.txt", "dog/c.HEIC", "README", "lost.png"):
        (tmp_path / "set" / name).touch()
    for _ in range(2):  # decoded, then from the cache
        (line,) = load(tmp_path / "set", tmp_path / "cache").described()
        assert line == (
            "set: 40 images of 12x10 pixels in 2 classes (24 training, 8 validation, 8 test); "
            "ignored 5 other files (2 .txt, 1 without suffix, 1 .heic, 1 .png)"
        )


@pytest.mark.parametrize("form", ["few", "part"])
def test_classes_that_a_split_lacks_are_said(tmp_path, form):
    write_images(tmp_path / "set" / "train")
    if form == "few":
        write_images(tmp_path / "set" / "train", classes=("eel",), count=1)
        write_images(tmp_path / "set" / "test", classes=("cat", "dog", "eel"))
        missing = "validation images of eel"
    else:
        write_images(tmp_path / "set" / "test", classes=("cat",))
        missing = "test images of dog"
    lines = load(tmp_path / "set", tmp_path / "cache").described()
    assert lines[1:] == [f"warning: set: no {missing}"]


def test_photos_are_turned_as_the_camera_was(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # to be turned clockwise
    for name in ("cat", "dog"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(8):
            Image.fromarray(pixels).save(tmp_path / "set" / name / f"{number}.png", exif=exif)
    data = load(tmp_path / "set", tmp_path / "cache")
    assert np.array_equal(everything(data.train)[0][0], np.rot90(pixels, -1))
