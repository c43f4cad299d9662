# SPDX-License-Identifier: Apache-2.0
"""Data sets: splits, published layouts, arrays, and damaged files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_datasets import arrays, cifar_batch, everything, load, pack, write_cifar10, write_pickle

from kdkernels.train import InputError
from kdkernels.train.data import normaliser


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


@pytest.fixture
def cifar10(tmp_path):
    return write_cifar10(tmp_path / "data" / "cifar-10-batches-py")


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
