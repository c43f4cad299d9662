# SPDX-License-Identifier: Apache-2.0
"""Data sets: splits, published layouts, image folders, augmentation, and damaged files."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from kdkernels.train import InputError
from kdkernels.train.data import Batches, load_data, normaliser
from kdkernels.train.data.batches import crop_and_flip


def load(path, cache_dir, **changes):
    settings = {"val_fraction": 0.25, "split_seed": 0, "image_size": None} | changes
    return load_data(str(path), cache_dir=cache_dir, **settings)


def everything(split):
    return split.take(slice(None))


def test_digits_are_split_by_class_and_do_not_overlap(tmp_path):
    data = load("digits", tmp_path)
    parts = [set(split.rows) for split in (data.train, data.val, data.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797
    for split in (data.train, data.val, data.test):
        counts = np.bincount(everything(split)[1])
        assert counts.max() - counts.min() <= 0.1 * len(split) / 10 + 2
    assert np.array_equal(data.test.rows, load("digits", tmp_path).test.rows)
    assert not np.array_equal(data.test.rows, load("digits", tmp_path, split_seed=1).test.rows)


def test_network_input_is_normalised(tmp_path):
    data = load("digits", tmp_path)
    images = torch.from_numpy(everything(data.train)[0])
    inputs = normaliser(data, torch.device("cpu"))(images)
    assert inputs.shape == (len(data.train), 1, 8, 8)
    assert inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert inputs.std(correction=0).item() == pytest.approx(1, abs=1e-5)


def test_an_epoch_has_each_image_once_and_batches_depend_on_the_step_alone(tmp_path):
    data = load("digits", tmp_path)
    settings = {"batch_size": len(data.train) // 4, "augment": "crop", "device": "cpu"}
    batches, again = (Batches(data, seed=1, **settings) for _ in range(2))
    epoch = [batches(step) for step in range(batches.per_epoch)]
    labels = torch.cat([batch.labels for batch in epoch])
    counts = torch.bincount(labels) - torch.from_numpy(np.bincount(everything(data.train)[1]))
    assert len(labels) >= len(data.train) - 3 and counts.max() <= 0
    assert torch.equal(again(2).images, epoch[2].images)
    assert not torch.equal(batches(2 + batches.per_epoch).images, epoch[2].images)


def test_augmentation_is_applied_as_asked(tmp_path):
    data = load("digits", tmp_path)

    def batch(augment):
        return Batches(data, batch_size=64, augment=augment, seed=1, device="cpu")(0).images

    assert torch.equal(batch("auto"), batch("crop"))
    assert len({batch(augment).sum().item() for augment in ("none", "crop", "crop-flip")}) == 3


@pytest.mark.parametrize("flip", [False, True])
def test_augmented_images_are_shifts_and_mirrors(flip):
    images = torch.randint(1, 256, (64, 16, 16, 2), dtype=torch.uint8)
    augmented = crop_and_flip(images, np.random.default_rng(0), flip=flip)
    padded = torch.nn.functional.pad(images, (0, 0, 2, 2, 2, 2))
    mirrored = 0
    for image, result in zip(padded, augmented, strict=True):
        windows = [image[i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
        plain = any(torch.equal(window, result) for window in windows)
        mirror = any(torch.equal(window.flip(1), result) for window in windows)
        assert plain or (flip and mirror)
        mirrored += mirror
    assert 16 < mirrored < 48 if flip else mirrored == 0


def write_pickle(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def cifar_batch(count, classes, label_name, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    return {"data": pixels, label_name: [i % classes for i in range(count)]}


@pytest.fixture
def cifar10(tmp_path):
    root = tmp_path / "data" / "cifar-10-batches-py"
    write_pickle(root / "batches.meta", {"label_names": [f"c{i}" for i in range(10)]})
    for index in range(1, 6):
        write_pickle(root / f"data_batch_{index}", cifar_batch(20, 10, "labels", index))
    write_pickle(root / "test_batch", cifar_batch(30, 10, "labels", 0))
    return root


def test_cifar10_layout(cifar10, tmp_path):
    for path in (cifar10, cifar10.parent):
        data = load(path, tmp_path)
        assert (data.name, data.shape, len(data.classes)) == ("cifar10", (32, 32, 3), 10)
        assert (len(data.train), len(data.val), len(data.test)) == (80, 20, 30)
    images, labels = everything(data.test)
    pixels = cifar_batch(30, 10, "labels", 0)["data"]
    assert images[7, 3, 5, 2] == pixels[7, 2 * 1024 + 3 * 32 + 5]
    assert list(labels[:12]) == [*range(10), 0, 1]


def test_cifar100_layout_uses_fine_labels(tmp_path):
    root = tmp_path / "cifar-100-python"
    write_pickle(root / "meta", {"fine_label_names": [f"c{i}" for i in range(100)]})
    write_pickle(root / "train", cifar_batch(400, 100, "fine_labels", 1))
    write_pickle(root / "test", cifar_batch(100, 100, "fine_labels", 2))
    data = load(tmp_path, tmp_path)
    assert (data.name, len(data.classes)) == ("cifar100", 100)
    assert (len(data.train), len(data.val), len(data.test)) == (300, 100, 100)


def test_python_2_pickles_are_read(cifar10, tmp_path):
    # As Python 2 wrote it: keys and array bytes are its 8-bit strings.
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ"
        b"\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + b"\xe9" * 3072 + b"tb"
    )
    content = b"\x80\x02}(U\x04data" + array + b"U\x06labels]K\x04au."
    (cifar10 / "test_batch").write_bytes(content)
    images, labels = everything(load(cifar10, tmp_path).test)
    assert images.shape == (1, 32, 32, 3) and (images == 0xE9).all() and list(labels) == [4]


def test_pickles_run_no_code(cifar10, tmp_path, capsys):
    class Attack:
        def __reduce__(self):
            return (print, ("code was run",))

    write_pickle(cifar10 / "data_batch_3", {"data": Attack(), "labels": []})
    with pytest.raises(InputError, match=r"data_batch_3: .*refusing to load \w+\.print"):
        load(cifar10, tmp_path)
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["missing", "truncated", "label", "shape", "keys"])
def test_damaged_cifar_files_are_named(cifar10, tmp_path, damage):
    path = cifar10 / "data_batch_2"
    content = cifar_batch(20, 10, "labels", 2)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "label":
        write_pickle(path, content | {"labels": [10] * 20})
    elif damage == "shape":
        write_pickle(path, content | {"data": content["data"][:, :-1]})
    else:
        write_pickle(path, {"data": content["data"]})
    with pytest.raises(InputError, match="data_batch_2: "):
        load(cifar10, tmp_path)


def write_images(root, classes=("cat", "dog"), count=8, size=(12, 10)):
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")


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


def test_images_are_decoded_once(tmp_path, monkeypatch):
    write_images(tmp_path / "set")
    first = load(tmp_path / "set", tmp_path / "cache")
    monkeypatch.setattr(Image, "open", None)
    again = load(tmp_path / "set", tmp_path / "cache")
    assert isinstance(again.train.images, np.memmap)
    assert np.array_equal(first.train.images, again.train.images)


def test_a_changed_folder_is_decoded_anew(tmp_path):
    write_images(tmp_path / "set")
    load(tmp_path / "set", tmp_path / "cache")
    Image.new("RGB", (12, 10), "white").save(tmp_path / "set" / "cat" / "9.png")
    data = load(tmp_path / "set", tmp_path / "cache")
    assert len(data.train.images) == 17


def test_a_corrupt_image_is_named_and_leaves_no_cache(tmp_path):
    write_images(tmp_path / "set")
    path = tmp_path / "set" / "dog" / "5.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"dog.5\.png: not a readable image"):
        load(tmp_path / "set", tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_damaged_cache_is_named(tmp_path):
    write_images(tmp_path / "set")
    load(tmp_path / "set", tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{path.name}: damaged cache"):
        load(tmp_path / "set", tmp_path / "cache")


def test_images_of_several_sizes_need_image_size(tmp_path):
    write_images(tmp_path / "set")
    Image.new("RGB", (30, 20)).save(tmp_path / "set" / "cat" / "9.png")
    with pytest.raises(InputError, match=r"9\.png: 30x20 pixels where .* 12x10; give --image-size"):
        load(tmp_path / "set", tmp_path / "cache")
    assert load(tmp_path / "set", tmp_path / "cache", image_size=8).shape == (8, 8, 3)


def test_folders_that_are_no_data_set_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a CIFAR folder nor an image folder"):
        load(tmp_path / "empty", tmp_path / "cache")
    write_images(tmp_path / "odd" / "train", classes=("cat",))
    write_images(tmp_path / "odd" / "test", classes=("dog",))
    with pytest.raises(InputError, match="class 'dog' has no training images"):
        load(tmp_path / "odd", tmp_path / "cache")
