# SPDX-License-Identifier: Apache-2.0
"""Data sets: splits, published layouts, image folders, archives, arrays, and damaged files."""

from __future__ import annotations

import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdkernels.train import InputError
from kdkernels.train.data import load_data, normaliser

REAL = Path(__file__).parents[2] / "shared" / "data" / "tiny-imagenet-even100-32px.tar.xz"


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


def cached(cache_dir):
    """The folders of decoded data sets."""
    return [path for path in cache_dir.iterdir() if path.is_dir()]


def test_images_are_decoded_once_and_mapped(tmp_path, monkeypatch):
    write_images(tmp_path / "set")
    first = load(tmp_path / "set", tmp_path / "cache")
    monkeypatch.setattr(Image, "open", None)
    again = load(tmp_path / "set", tmp_path / "cache")
    assert isinstance(again.train.images, np.memmap)
    assert np.array_equal(first.train.images, again.train.images)
    assert first.digest == again.digest


def test_a_changed_folder_is_decoded_anew(tmp_path):
    write_images(tmp_path / "set")
    before = load(tmp_path / "set", tmp_path / "cache")
    Image.new("RGB", (12, 10), "white").save(tmp_path / "set" / "cat" / "9.png")
    more = load(tmp_path / "set", tmp_path / "cache")
    assert len(more.train.images) == 17
    Image.new("RGB", (12, 10), "black").save(tmp_path / "set" / "cat" / "9.png")
    other = load(tmp_path / "set", tmp_path / "cache")
    assert len({before.digest, more.digest, other.digest}) == 3


def test_the_digest_is_of_the_content_wherever_it_lies(tmp_path):
    write_images(tmp_path / "set")
    before = load(tmp_path / "set", tmp_path / "cache").digest
    (tmp_path / "set").rename(tmp_path / "moved")
    assert load(tmp_path / "moved", tmp_path / "cache").digest == before


def test_grey_images_of_16_bits_keep_their_shades(tmp_path):
    shades = np.linspace(0, 65535, 144).astype(np.uint16).reshape(12, 12)
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(8):
            Image.fromarray(shades).save(tmp_path / "data" / label / f"{number}.png")
    images = everything(load(tmp_path / "data", tmp_path / "cache").train)[0]
    assert np.array_equal(images[0, :, :, 0], shades >> 8)


def test_a_corrupt_image_is_named_and_leaves_no_cache(tmp_path):
    write_images(tmp_path / "set")
    path = tmp_path / "set" / "dog" / "5.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"dog.5\.png: not a readable image"):
        load(tmp_path / "set", tmp_path / "cache")
    assert not cached(tmp_path / "cache")


@pytest.mark.parametrize("damage", ["truncated", "changed", "label", "missing", "index"])
def test_a_damaged_cache_is_named(tmp_path, damage):
    write_images(tmp_path / "set")
    load(tmp_path / "set", tmp_path / "cache")
    (folder,) = cached(tmp_path / "cache")
    name = {"label": "labels.npy", "index": "index.json"}.get(damage, "images.npy")
    content = bytearray((folder / name).read_bytes())
    if damage == "truncated":
        del content[-1]
    elif damage == "index":
        del content[len(content) // 2 :]
    else:
        content[-1] ^= 1
    (folder / name).write_bytes(content)
    if damage == "missing":
        (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{folder.name}: damaged cache of .*set.*; delete it"):
        load(tmp_path / "set", tmp_path / "cache")


def test_what_a_killed_process_left_is_no_hindrance(tmp_path):
    write_images(tmp_path / "set")
    digest = load(tmp_path / "set", tmp_path / "cache").digest
    (folder,) = cached(tmp_path / "cache")
    folder.rename(folder.with_name(f"{folder.name}.partial"))
    (tmp_path / "cache" / f"{folder.name}.partial" / "index.json").unlink()
    assert load(tmp_path / "set", tmp_path / "cache").digest == digest
    assert cached(tmp_path / "cache") == [folder]


def test_two_that_start_together_decode_once(tmp_path, monkeypatch):
    write_images(tmp_path / "set")
    opened, decode = [], Image.open
    monkeypatch.setattr(Image, "open", lambda file: opened.append(file) or decode(file))
    with ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(load, tmp_path / "set", tmp_path / "cache") for _ in range(2)]
    assert len({load.result().digest for load in loads}) == 1
    assert len(opened) == 16


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
    with pytest.raises(InputError, match="nowhere: expected 'digits', a folder, a tar"):
        load(tmp_path / "nowhere", tmp_path / "cache")
    with pytest.raises(InputError, match="--image-size: digits has images of one size"):
        load("digits", tmp_path / "cache", image_size=16)
    write_images(tmp_path / "odd" / "train", classes=("cat",))
    write_images(tmp_path / "odd" / "test", classes=("dog",))
    with pytest.raises(InputError, match="class 'dog' has no training images"):
        load(tmp_path / "odd", tmp_path / "cache")


def pack(folder, path, mode):
    with tarfile.open(path, mode) as archive:
        # Any order will do.
        for file in sorted(folder.rglob("*"), reverse=True):
            archive.add(file, f"./{file.relative_to(folder.parent)}", recursive=False)
    return path


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


def test_a_tar_of_cifar(cifar10, tmp_path):
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
    with pytest.raises(InputError, match=r"set\.tar: set/dog/5\.png: not a readable image"):
        load(path, tmp_path / "cache")


def test_links_in_a_tar_are_refused(tmp_path):
    write_images(tmp_path / "set")
    (tmp_path / "set" / "dog" / "link.png").symlink_to("5.png")
    path = pack(tmp_path / "set", tmp_path / "set.tar", "w")
    with pytest.raises(InputError, match=r"dog/link\.png: a link; expected the file itself"):
        load(path, tmp_path / "cache")


def arrays(parts, names="{part}_{what}", shape=(9, 8, 3)):
    rng = np.random.default_rng(0)
    made = {}
    for part, count in parts.items():
        pixels = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        made[names.format(part=part, what="images")] = pixels
        made[names.format(part=part, what="labels")] = np.arange(count) % 3
    return made


@pytest.mark.parametrize("form", ["npz", "compressed", "folder", "tar"])
def test_arrays_in_parts(tmp_path, form):
    content = arrays({"train": 30, "val": 6, "test": 9})
    path = tmp_path / "set.npz"
    if form in ("npz", "compressed"):
        (np.savez if form == "npz" else np.savez_compressed)(path, **content)
    else:
        path = tmp_path / "set"
        path.mkdir()
        for name, array in content.items():
            np.save(path / f"{name}.npy", array)
    if form == "tar":
        path = pack(path, tmp_path / "set.tgz", "w:gz")
    data = load(path, tmp_path / "cache")
    assert (data.name, data.classes, data.shape) == ("set", ("0", "1", "2"), (9, 8, 3))
    assert isinstance(data.train.images, np.memmap)
    for part in ("train", "val", "test"):
        images, labels = everything(getattr(data, part))
        assert np.array_equal(images, content[f"{part}_images"])
        assert np.array_equal(labels, content[f"{part}_labels"])


def test_a_pair_of_arrays_is_split(tmp_path):
    content = arrays({"all": 30}, "{what}", shape=(8, 8))
    np.savez(tmp_path / "set.npz", x=content["images"], y=content["labels"][:, None])
    data = load(tmp_path / "set.npz", tmp_path / "cache")
    assert (data.shape, len(data.train), len(data.val), len(data.test)) == ((8, 8, 1), 18, 6, 6)


def test_a_lone_held_out_array_is_the_test_set(tmp_path):
    content = arrays({"train": 30, "test": 9}, "{what}_{part}")
    np.savez(
        tmp_path / "set.npz",
        **{name.replace("images", "x").replace("labels", "y"): a for name, a in content.items()},
    )
    data = load(tmp_path / "set.npz", tmp_path / "cache")
    assert (len(data.train), len(data.val), len(data.test)) == (24, 6, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "set.npz: expected arrays images and labels"),
        ({"images": np.zeros((30, 8, 8))}, r"uint8 of shape .* got float64 of shape \(30, 8, 8\)"),
        ({"images": np.zeros((30, 3, 8, 8), np.uint8)}, "at most 4 channels"),
        ({"labels": np.zeros(29, int)}, r"each of 30 images .* got int64 of shape \(29,\)"),
        ({"labels": np.zeros(30)}, "got float64"),
        ({"labels": np.full(30, -1)}, "expected labels from 0 up, got -1"),
        ({"labels": np.array([print] * 30)}, "labels.npy: not a readable array"),
    ],
)
def test_unusable_arrays_are_named(tmp_path, changes, message):
    content = arrays({"all": 30}, "{what}") | changes
    path = tmp_path / "set.npz"
    np.savez(path, **{name: array for name, array in content.items() if array is not None})
    with pytest.raises(InputError, match=message):
        load(path, tmp_path / "cache")


def test_a_truncated_npz_is_named(tmp_path):
    path = tmp_path / "set.npz"
    np.savez(path, **arrays({"all": 30}, "{what}"))
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    for damaged in (content, content[:4000]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"set\.npz: not a readable archive"):
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
