# SPDX-License-Identifier: Apache-2.0
"""Decoded images on disk: made once, by one process, anew after a change; damage is named."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from small_datasets import cached, load, write_images

from kdkernels.train import InputError


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
