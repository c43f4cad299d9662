# SPDX-License-Identifier: Apache-2.0
"""``load_student``: what a run has trained, ready to be used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_datasets import everything, load

from kdkernels.train import Config, InputError, checkpoint, load_student, predictions, run
from kdkernels.train.models import build_model

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_loaded_student_predicts_what_the_run_did(tmp_path):
    out = tmp_path / "run"
    settings = {"epochs": 2, "precision": "32-true", "accelerator": "cpu"}
    run(Config(method="ce", student="convnet4", out=str(out), **settings))
    student = load_student(out / "seed-0" / "model.safetensors")
    data = load("digits", tmp_path, val_fraction=Config.val_fraction)
    images, _ = everything(data.test)
    with torch.no_grad():
        confidence, chosen = student(torch.from_numpy(images)).softmax(-1).max(-1)
    kept = predictions.load(out / "seed-0" / "test.npz")
    np.testing.assert_array_equal(chosen, kept.student)
    np.testing.assert_allclose(confidence, kept.student_confidence, rtol=1e-4)
    assert student.classes == data.classes and student.shape == data.shape
    assert not student.training


@pytest.fixture
def model(tmp_path):
    """An untrained model, as a function of what is kept for its use."""

    def save(weights=None, **use):
        weights = weights or build_model("mlp8", (8, 8, 3), 2).state_dict()
        checkpoint.save_model(tmp_path / "x.safetensors", "mlp8", weights, (8, 8, 3), 2, **use)
        return tmp_path / "x.safetensors"

    return save


def test_the_same_model_is_the_same_bytes(model):
    weights = build_model("mlp8", (8, 8, 3), 2).state_dict()
    use = {name: [1.0] for name in ("names", "mean", "std", "a", "b", "c")}
    contents = {model(weights, **use).read_bytes() for _ in range(8)}
    assert len(contents) == 1


def test_models_that_are_not_of_a_run_are_named(model, tmp_path):
    with pytest.raises(InputError, match=r"x\.safetensors: expected .* of a run, found no mean"):
        load_student(model())
    with pytest.raises(InputError, match=r"expected the model\.safetensors in this folder"):
        load_student(tmp_path)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 8, 8, 3), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)],
    ids=["floating point", "channels first"],
)
def test_other_images_than_trained_on_are_refused(model, images):
    student = load_student(model(names=["a", "b"], mean=[1.0] * 3, std=[2.0] * 3))
    assert student(torch.zeros(5, 8, 8, 3, dtype=torch.uint8)).shape == (5, 2)
    with pytest.raises(InputError, match=r"images: expected uint8 of shape \(B, 8, 8, 3\), got"):
        student(images)
