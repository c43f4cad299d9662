# SPDX-License-Identifier: Apache-2.0
"""``distill``: a user's own modules and images."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kdkernels.train import InputError, distill, load_student
from kdkernels.train.data import from_arrays, load_data
from kdkernels.train.report.cli import main

QUICK = {"accelerator": "cpu", "epochs": 6, "augment": "none"}

pytestmark = pytest.mark.usefixtures("one_thread")


def network(width=8, classes=4):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 64, width), nn.ReLU(), nn.Linear(width, classes)
    )


@pytest.fixture
def images():
    """Squares of a colour for each of 4 classes, in noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 4
    pixels = rng.integers(0, 80, (400, 8, 8, 3))
    pixels[np.arange(400), :, :, labels % 3] += 60 + 40 * (labels == 3)[:, None, None]
    return pixels.astype(np.uint8), labels


@pytest.mark.parametrize("method", ["kd", "skd"])
def test_own_modules_learn_from_own_arrays(images, method):
    student, teacher = network(), network(32)
    distill(teacher, None, images, method="ce", **QUICK)
    fixed = {name: value.clone() for name, value in teacher.state_dict().items()}
    results = distill(
        student, teacher, images, method=method, options={"temperature": 2.0}, **QUICK
    )
    assert results["test"]["accuracy"] > 0.8 and results["test"]["agreement"] > 0.8
    assert all(torch.equal(fixed[name], value) for name, value in teacher.state_dict().items())


def test_all_forms_of_data_train_alike(images, tmp_path):
    pixels, labels = images
    np.savez(tmp_path / "set.npz", images=pixels, labels=labels)
    pairs = [(Image.fromarray(image), int(label)) for image, label in zip(*images, strict=True)]
    path = str(tmp_path / "set.npz")
    loaded = load_data(
        path, val_fraction=0.1, split_seed=0, image_size=None, cache_dir=tmp_path / "cache"
    )
    tensors = torch.from_numpy(pixels), torch.from_numpy(labels)
    weights = []
    for data in (images, tensors, pairs, path, loaded):
        student = network()
        distill(student, None, data, method="ce", cache_dir=str(tmp_path / "cache"), **QUICK)
        weights.append(student.state_dict())
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=0)


def test_a_run_in_a_folder_goes_on(images, tmp_path):
    out = tmp_path / "run"
    first = distill(network(), None, images, method="ce", out=out, **QUICK)
    with pytest.raises(InputError, match="not empty"):
        distill(network(), None, images, method="ce", out=out, **QUICK)
    again = distill(network(), None, images, method="ce", out=out, resume=True, **QUICK)
    assert again["val"] == first["val"] and again["test"] == first["test"]
    assert main([str(out), "--out", str(tmp_path / "report.html")]) == 0
    shown = (tmp_path / "report.html").read_text()
    assert f"{100 * first['test']['accuracy']:.2f}" in shown


class Tied(nn.Module):
    """Its two names of the same weights are kept as two."""

    def __init__(self):
        super().__init__()
        self.inner = network()
        self.again = self.inner

    def forward(self, images):
        return {"logits": self.again(images)}


@pytest.mark.parametrize("make", [network, Tied])
def test_an_own_student_is_kept_and_loaded(images, tmp_path, make):
    student, path = make(), tmp_path / "run" / "seed-0" / "model.safetensors"
    distill(student, None, images, method="ce", out=tmp_path / "run", **QUICK)
    with pytest.raises(InputError, match=r"your own, .*: build one .* load_student\(path, network"):
        load_student(path)
    loaded = load_student(path, make())
    torch.testing.assert_close(loaded.network.state_dict(), student.state_dict(), rtol=0, atol=0)
    right = loaded(torch.from_numpy(images[0])).argmax(-1) == torch.from_numpy(images[1])
    assert right.float().mean() > 0.8
    with pytest.raises(InputError, match="does not fit"):
        load_student(path, network(classes=5))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ((5, 4), r"student: expected logits \(2, 4\) .* 4 classes; got \(2, 5\)"),
        ((4, 7), r"teacher: expected logits \(2, 4\) .* 4 classes; got \(2, 7\)"),
    ],
)
def test_models_of_other_classes_are_refused(images, classes, message):
    student, teacher = (network(classes=count) for count in classes)
    with pytest.raises(InputError, match=message):
        distill(student, teacher, images, **QUICK)


class Wrapped(nn.Module):
    """Gives out what ``form`` makes of the logits."""

    def __init__(self, form):
        super().__init__()
        self.network, self.form = network(), form

    def forward(self, images):
        return self.form(self.network(images))


@pytest.mark.parametrize(
    "form",
    [lambda x: {"logits": x, "hidden": None}, lambda x: SimpleNamespace(logits=x)],
    ids=["mapping", "attribute"],
)
def test_outputs_that_have_logits_do(images, form):
    plain, student = network(), Wrapped(form)
    for model in (plain, student):
        distill(model, Wrapped(form), images, **QUICK | {"epochs": 1})
    for name, value in plain.state_dict().items():
        assert torch.equal(student.network.state_dict()[name], value)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (lambda x: {"out": x}, "expected logits as a tensor, or .* 'logits', got a dict with out"),
        (lambda x: (x, x), "expected logits as a tensor, .* got a tuple"),
        (lambda x: x.mean(), r"expected logits \(2, 4\) .* got \(\)"),
    ],
)
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_outputs_without_logits_are_named(images, form, message, who):
    student, teacher = network(), Wrapped(form)
    if who == "student":
        student, teacher = teacher, student
    with pytest.raises(InputError, match=f"{who}: {message}"):
        distill(student, teacher, images, **QUICK)


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_models_for_other_images_are_named(images, who):
    other = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())
    student, teacher = (other, network()) if who == "student" else (network(), other)
    message = rf"{who}: fails on images of the data, .*\(2, 3, 8, 8\): .* to have 1 channels"
    with pytest.raises(InputError, match=message):
        distill(student, teacher, images, **QUICK)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ("resnet8", None, "student: expected a network .* got 'resnet8'"),
        (None, "resnet56", "teacher: expected a trained network .* got 'resnet56'; load_student"),
        (None, [3], "teacher: expected a trained network .* got a int"),
        (None, [network(), network()], "teacher: method kd expects 1 trained network, got 2"),
    ],
)
def test_what_is_no_network_is_named(images, student, teacher, message):
    with pytest.raises(InputError, match=message):
        distill(student or network(), teacher, images, **QUICK)


@pytest.mark.parametrize("method", ["at", "crd"])
def test_modules_to_compare_are_asked_for(images, method):
    message = r"student: .* 'teacher_taps'.*\(student_taps and teacher_taps\)\. It has 0, 1, 2, 3;"
    with pytest.raises(InputError, match=message):
        distill(network(), network(), images, method=method, **QUICK)


def test_a_frozen_student_is_refused(images):
    with pytest.raises(InputError, match=r"student: .* no parameter that requires a gradient"):
        distill(network().requires_grad_(False), None, images, method="ce", **QUICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x.astype(np.float32), y), "data: expected images as uint8"),
        (lambda x, y: (x, y[:-1]), "data: expected a whole number for each of 400"),
        (lambda x, y: (x[:0], y[:0]), "data: no images"),
    ],
)
def test_arrays_that_are_no_images_are_refused(images, change, message):
    with pytest.raises(InputError, match=message):
        distill(network(), None, change(*images), method="ce", **QUICK)


@pytest.mark.parametrize(
    ("sizes", "got"), [((8, 9), r"\[\(8, 8, 3\), \(9, 8, 3\)\]"), ((), "none")]
)
def test_pairs_are_of_one_size(sizes, got):
    pairs = [(np.zeros((size, 8, 3), np.uint8), 0) for size in sizes]
    with pytest.raises(InputError, match=f"data: expected images of one size, got {got}"):
        distill(network(), None, pairs, method="ce", **QUICK)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 1}, r"distill\(\): 'epoch': not one of its settings; the nearest are epochs"),
        ({"temperature": 4.0}, r"'temperature': .* those of the method go into options="),
        ({"batch_size": "8"}, "batch_size: expected a whole number, got '8'"),
        ({"max_steps": 1.5}, "max_steps: expected a whole number, got 1.5"),
        ({"lr": "x"}, "lr: expected a number, got 'x'"),
        ({"optimizer": "adam"}, "optimizer: expected one of sgd, adamw, got 'adam'"),
        ({"method": "kd"}, "teacher: method kd expects 1 trained network, got 0"),
        ({"backend": "cuda"}, "backend cuda: cannot run here"),
        ({"resume": True}, "resume: expected out, the folder"),
        ({"teacher_epochs": 5}, "teacher_epochs: the teacher comes trained here; give the network"),
        ({"teacher_checkpoint": "x"}, r"teacher_checkpoint: .* load_student\(path\)\.network has"),
        ({"teacher_seed": 0}, "teacher_seed: the teacher comes trained"),
        (
            {"method": "kd", "options": {"temp": 4}},
            "^temp: not an option .* alpha, temperature",
        ),
        ({"image_size": 8}, "image_size: it is for image folders"),
    ],
)
def test_settings_that_do_not_fit_are_named(images, settings, message):
    with pytest.raises(InputError, match=message):
        distill(network(), None, images, **QUICK | {"method": "ce"} | settings)


def test_a_data_set_that_is_split_already_is_not_split_again(images):
    data = from_arrays(*images, val_fraction=0.1, split_seed=0)
    with pytest.raises(InputError, match="val_fraction: not with a Dataset"):
        distill(network(), None, data, method="ce", val_fraction=0.2, **QUICK)


def test_the_example_runs(monkeypatch, capsys):
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "own_models.py"))
    example["main"](epochs=4)
    assert float(capsys.readouterr().out.split()[-2]) > 60  # of ten classes
