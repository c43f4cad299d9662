# SPDX-License-Identifier: Apache-2.0
"""``distill`` with a user's own loaders: their batches, as they come."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
)

from kdkernels.train import InputError, checkpoint, distill, loop
from kdkernels.train.data import LoaderBatches, LoaderData, LoaderSplit
from kdkernels.train.report.cli import main

QUICK = {"accelerator": "cpu", "epochs": 3}

pytestmark = pytest.mark.usefixtures("one_thread")


def network(width=8, classes=4):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 64, width), nn.ReLU(), nn.Linear(width, classes)
    )


class Noisy(TensorDataset):
    """Random augmentation of its own, as users' data sets have."""

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        return image + 0.1 * torch.randn_like(image), label


@pytest.fixture
def sets():
    """Training, validation and test images: a pattern for each of 4 classes, in noise."""
    labels = torch.arange(300) % 4
    images = torch.randn(300, 3, 8, 8) + torch.randn(4, 3, 8, 8)[labels]
    parts = zip(images.split([200, 50, 50]), labels.split([200, 50, 50]), strict=True)
    kinds = Noisy, TensorDataset, TensorDataset
    return [kind(*part) for kind, part in zip(kinds, parts, strict=True)]


def load(data, sampler=None):
    return DataLoader(data, batch_size=32, sampler=sampler, shuffle=sampler is None)


@pytest.mark.parametrize("method", ["kd", "skd+dkd"])
def test_own_loaders_train(sets, tmp_path, method):
    train, val, test = map(load, sets)
    teacher = network(32)
    distill(teacher, None, train, val=val, test=test, method="ce", **QUICK)
    student, out = network(), tmp_path / "run"
    results = distill(student, teacher, train, val=val, test=test, method=method, out=out, **QUICK)
    assert results["test"]["accuracy"] > 0.8 and results["test"]["agreement"] > 0.8
    assert results["steps"] == 3 * 7  # the last batch of an epoch has 8 images
    assert main([str(out), "--out", str(tmp_path / "report.html")]) == 0
    assert checkpoint.read_json(out / "config.json")["data"] == "loaders"


def test_batches_are_used_as_they_come(sets):
    seen = []

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network()

        def forward(self, images):
            if self.training:
                seen.append(images.detach().clone())
            return self.network(images)

    train = DataLoader(TensorDataset(*sets[1].tensors), batch_size=32)
    settings = {"val": sets[1], "test": sets[2], "method": "ce", "precision": "32-true"}
    distill(Seen(), None, train, **settings, **QUICK | {"epochs": 1})
    assert torch.equal(torch.cat(seen), sets[1].tensors[0])


class Drawn(Noisy):
    """Noise from a generator of its own."""

    generator = None

    def __getitem__(self, index):
        image, label = TensorDataset.__getitem__(self, index)
        return image + 0.1 * torch.randn(image.shape, generator=self.generator), label


def by_the_loader(train, val, generator):
    return DataLoader(train, 32, shuffle=True, generator=generator), val


def by_the_sampler(train, val, generator):
    return DataLoader(train, 32, sampler=RandomSampler(train, generator=generator)), val


def by_the_batch_sampler(train, val, generator):
    batches = BatchSampler(RandomSampler(train, generator=generator), 32, drop_last=False)
    return DataLoader(train, batch_sampler=batches), val


def by_the_data(train, val, generator):
    train = Drawn(*train.tensors)
    train.generator = generator
    return load(Subset(train, range(100))), val


def by_all_loaders(train, val, generator):
    """Passes over the held-out images draw from it too."""
    return [DataLoader(data, 32, shuffle=True, generator=generator) for data in (train, val)]


def by_the_loader_for_workers(train, val, generator):
    return DataLoader(train, 32, shuffle=True, generator=generator, num_workers=1), val


@pytest.mark.parametrize(
    "drawn",
    [
        lambda train, val, _: (load(train), val),
        by_the_loader, by_the_sampler, by_the_batch_sampler, by_the_data, by_all_loaders,
        by_the_loader_for_workers,
    ],
)  # fmt: skip
def test_a_run_with_loaders_goes_on(sets, tmp_path, monkeypatch, drawn):
    def train(out, **settings):
        student, teacher = network(), network(16)
        loader, val = drawn(*sets[:2], torch.Generator().manual_seed(5))
        held = {"val": val, "test": load(sets[2])}
        settings = QUICK | {"epochs": 2} | settings
        distill(student, teacher, loader, **held, out=out, **settings)
        return student.state_dict()

    whole = train(tmp_path / "whole")
    save = loop.save

    def stop_after(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save", stop_after)
        train(tmp_path / "parts")
    parts = train(tmp_path / "parts", resume=True)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    ends = (
        checkpoint.load_state(tmp_path / name / "seed-0" / "checkpoint.pt")
        for name in ("whole", "parts")
    )
    assert_same_end(*ends)


def assert_same_end(one, other):
    """The last epoch's weights, and the random numbers that would come next."""
    for part in ("student", "loader", "rng"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)


def test_other_generators_than_the_run_began_with_are_named(sets, tmp_path):
    def train(loader, **settings):
        held = {"val": sets[1], "test": sets[2]}
        settings = QUICK | {"epochs": 1, "method": "ce", "out": tmp_path} | settings
        distill(network(), None, loader, **held, **settings)

    train(load(sets[0]))
    loader = DataLoader(sets[0], 32, shuffle=True, generator=torch.Generator())
    with pytest.raises(InputError, match="training loader: expected 0 generators in it as when"):
        train(loader, resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val": None}, "val, test: expected a DataLoader or data set each"),
        ({"teacher_cache": "x"}, "teacher_cache: not with a DataLoader"),
        ({"checkpoint_every": 5}, "checkpoint_every: not with a DataLoader"),
        ({"augment": "crop"}, "augment: not with a DataLoader"),
        ({"batch_size": 8}, "batch_size: not with a DataLoader"),
        (
            {"method": "crd"},
            "method crd looks training images up by their number, .*: expected arrays",
        ),
        ({"method": "education"}, "method education looks training images up by their number"),
    ],
)
def test_what_loaders_cannot_do_is_said(sets, settings, message):
    settings = {"val": sets[1], "test": sets[2], "augment": "none"} | settings
    taps = {"student_taps": ["1"], "teacher_taps": ["1"]}
    options = taps if settings.get("method") == "crd" else {}
    settings = {"options": options} | settings
    with pytest.raises(InputError, match=message):
        distill(network(), network(), load(sets[0]), **QUICK, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y, y), r"batches \(images, labels\) of tensors, got a list"),
        (lambda x, y: ((255 * x).byte(), y), "images .* in floating point, got torch.uint8 of"),
        (
            lambda x, y: (x, y.float()),
            "a whole number for each of 32 images as label, got torch",
        ),
        (lambda x, y: (x, y + 1), "labels from 0 to 3, as many as the student has logits, got 4"),
    ],
)
def test_batches_that_do_not_fit_are_named(sets, change, message):
    train = load(TensorDataset(*change(*sets[1].tensors)))
    with pytest.raises(InputError, match=f"training loader: expected {message}"):
        distill(network(), None, train, val=sets[1], test=sets[2], method="ce", **QUICK)


def test_a_loader_without_batches_is_named(sets):
    train = DataLoader(sets[0], batch_size=201, drop_last=True)
    with pytest.raises(InputError, match="training loader: expected at least one batch, got none"):
        distill(network(), None, train, val=sets[1], test=sets[2], method="ce", **QUICK)


class Stream(IterableDataset):
    """Says that it has more images than it gives out."""

    def __init__(self, data, said):
        self.data, self.said = data, said

    def __len__(self):
        return self.said

    def __iter__(self):
        return map(self.data.__getitem__, range(len(self.data)))


def test_a_loader_that_ends_early_is_named(sets):
    train = DataLoader(Stream(sets[0], 300), batch_size=100)
    with pytest.raises(InputError, match="training loader: expected 3 batches, its length, got 2"):
        distill(network(), None, train, val=sets[1], test=sets[2], method="ce", **QUICK)


def test_images_are_counted_as_they_come(sets):
    few = RandomSampler(sets[0], replacement=True, num_samples=50)
    split = LoaderSplit("training", load(sets[0], few))
    batches = LoaderBatches(LoaderData((), (8, 8, 3), split, split, split), torch.device("cpu"))
    assert [len(batches(step).labels) for step in range(4)] == [32, 18, 32, 18]
    assert batches.batch_size == 25


def test_held_out_sets_go_with_a_loader(sets):
    images = np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 4
    with pytest.raises(InputError, match="val, test: expected with a DataLoader as data"):
        distill(network(), None, images, val=sets[1], test=sets[2], method="ce", **QUICK)
