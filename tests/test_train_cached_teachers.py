# SPDX-License-Identifier: Apache-2.0
"""Cached teachers: their answers are the teacher's own, by keys; damage, staleness, range."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from kdkernels.train import InputError
from kdkernels.train.data import Batches, load_data, mix_up, quarter_turns
from kdkernels.train.encoding import Form
from kdkernels.train.models import build_model
from kdkernels.train.models.layers import Network
from kdkernels.train.teacher_cache import CachedTeachers
from kdkernels.train.teachers import Teachers

BATCH_SIZE = 100  # so that the last batch of a view has to be filled up
TAPS = ("stages.0", "classifier:input")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Scikit-learn's digits."""
    cache_dir = tmp_path_factory.mktemp("data")
    return load_data("digits", val_fraction=0.1, split_seed=0, image_size=None, cache_dir=cache_dir)


def make(data, folder, *, network=None, form=None, taps=(), **changes):
    """A cache of one teacher with the weights of seed 0."""
    torch.manual_seed(0)
    network = network or build_model("convnet4", data.shape, 10)
    teachers = Teachers(Fabric(accelerator="cpu", devices=1), [network], [taps])
    settings = {"batch_size": BATCH_SIZE, "augment": "crop", "seed": 1, "device": "cpu"} | changes
    return CachedTeachers(teachers, Batches(data, **settings), folder, form or Form())


def test_answers_are_the_teachers_own_wherever_an_image_stands(data, tmp_path):
    cached = make(data, tmp_path, taps=TAPS, views=2, distinct_views=3)
    for number in (0, cached.batches.per_epoch + 3, 3 * cached.batches.per_epoch - 1):
        batch = cached.batches(number)
        (found,) = cached(batch, [0])
        expected = cached.teachers[0](batch.images)
        assert torch.equal(found.logits, expected.logits)
        for tap in TAPS:
            assert torch.equal(found.features[tap], expected.features[tap])
            assert found.features[tap].stride() == expected.features[tap].stride()
    assert cached.cost["teacher_cache"]["views_made"] == 3


def test_images_that_are_no_views_go_to_the_teacher(data, tmp_path):
    cached = make(data, tmp_path)
    for change in (quarter_turns, lambda batch: mix_up(batch, 1.0, 10, np.random.default_rng(0))):
        batch = change(cached.batches(0))
        (found,) = cached(batch, [0])
        assert torch.equal(found.logits, cached.teachers[0](batch.images).logits)
    assert not list(tmp_path.iterdir())


def test_whatever_decides_an_output_is_in_the_key(data, tmp_path, monkeypatch):
    torch.manual_seed(1)
    other = build_model("convnet4", data.shape, 10)
    alike = build_model("convnet4", data.shape, 10)
    alike.load_state_dict(build_first(data).state_dict())
    alike.stages[0][0][2] = torch.nn.SiLU()
    smaller = replace(data, train=replace(data.train, rows=data.train.rows[1:]))
    caches = [
        make(data, tmp_path),
        make(replace(data, digest="other"), tmp_path),
        make(smaller, tmp_path),
        make(data, tmp_path, network=other),
        make(data, tmp_path, network=alike),
        make(data, tmp_path, taps=TAPS[:1]),
        make(data, tmp_path, augment="none"),
        make(data, tmp_path, seed=2),
        make(data, tmp_path, batch_size=50),
        make(data, tmp_path, shares=4),
        make(data, tmp_path, form=Form("fp16")),
        make(data, tmp_path, form=Form("fp32", 3, 4.0)),
        make(data, tmp_path, form=Form("fp32", 3, 2.0)),
        make(replace(data, mean=data.mean + 1), tmp_path),
    ]
    assert len({cache.folders[0] for cache in caches}) == len(caches)
    same = [
        make(data, tmp_path),
        make(data, tmp_path, seed=2, augment_seed=1),
        make(data, tmp_path, distinct_views=4, mixup=0.2),
    ]
    assert {cache.folders[0] for cache in same} == {caches[0].folders[0]}
    half = make(data, tmp_path, form=Form("fp16")).folders
    monkeypatch.setattr(torch, "__version__", "another")
    assert make(data, tmp_path).folders != caches[0].folders
    assert make(data, tmp_path, form=Form("fp16")).folders == half


def build_first(data):
    torch.manual_seed(0)
    return build_model("convnet4", data.shape, 10)


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "index", "foreign"])
def test_a_damaged_cache_is_named(data, tmp_path, damage):
    cached = make(data, tmp_path, form=Form("fp32", 3, 4.0))
    cached.fill(0, [0])
    folder = cached.folders[0] / "view-0"
    path = folder / ("index.json" if damage in ("index", "foreign") else "top-classes.npy")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-1]
    elif damage == "index":
        del content[len(content) // 2 :]
    elif damage == "changed":
        content[-1] ^= 1
    path.write_bytes(content)
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        other = make(data, tmp_path, seed=2, form=Form("fp32", 3, 4.0))
        other.fill(0, [0])
        shutil.rmtree(folder)
        (other.folders[0] / "view-0").rename(folder)
    with pytest.raises(InputError, match=rf"{path}: damaged teacher cache .*; delete {folder}"):
        make(data, tmp_path, form=Form("fp32", 3, 4.0)).fill(0, [0])


class Louder(Network):
    """Prints and weighs what a ``Network`` does, and gives out something else."""

    def forward(self, images):
        return 1.2 * super().forward(images)

    def _get_name(self):
        return "Network"


def test_a_teacher_that_only_its_code_tells_apart_is_noticed(data, tmp_path):
    make(data, tmp_path).fill(0, [0])
    network = build_first(data)
    network.__class__ = Louder
    changed = make(data, tmp_path, network=network)
    with pytest.raises(InputError, match=r"logits.npy: stale teacher cache: not what the teacher"):
        changed.fill(0, [0])


def test_classes_that_a_teacher_rules_out_are_found_again(data, tmp_path):
    def network():
        first = build_first(data)
        first.classifier.bias.data[3] = -torch.inf
        return first

    make(data, tmp_path, network=network()).fill(0, [0])
    cached = make(data, tmp_path, network=network())
    cached.fill(0, [0])
    assert cached.cost["teacher_cache"]["views_made"] == 0


def test_of_two_that_start_together_one_makes_a_view(data, tmp_path):
    caches = [make(data, tmp_path) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda cached: cached.fill(0, [0, 1]), caches))
    assert sum(cached.cost["teacher_cache"]["views_made"] for cached in caches) == 2


def test_what_fp16_cannot_hold_is_refused(data, tmp_path):
    network = build_first(data)
    with torch.no_grad():
        network.classifier.weight.mul_(1e6)
    cached = make(data, tmp_path, network=network, form=Form("fp16"))
    with pytest.raises(InputError, match=r"--cache-dtype fp16: the teacher's outputs reach \d"):
        cached.fill(0, [0])
    assert not list(cached.folders[0].glob("view-0*/"))
