# SPDX-License-Identifier: Apache-2.0
"""Methods over inner features: what they compare, what they train, that their mechanism works."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from kdkernels.train import Config, InputError, checkpoint, run
from kdkernels.train.data import Batch, load_data
from kdkernels.train.methods import Run
from kdkernels.train.models import build_model
from kdkernels.train.options import make_method
from kdkernels.train.taps import Tapped

SHAPE, CLASSES = (8, 8, 1), 10

pytestmark = pytest.mark.usefixtures("one_thread")


def step_of(name, student="resnet8", teacher="resnet8x4", **options):
    """The method and the outputs of two networks where it taps them."""
    torch.manual_seed(0)
    networks = [build_model(model, SHAPE, CLASSES).eval() for model in (student, teacher)]
    method = make_method(name, "reference", options)
    taps = method.taps(networks[0], networks[1:])
    images = torch.randn(4, 1, 8, 8)
    outputs = [Tapped(n, paths)(images) for n, paths in zip(networks, taps, strict=True)]
    method.setup(outputs[0], outputs[1:])
    return method, Batch(images, torch.tensor([0, 1, 2, 3])), outputs[0], outputs[1:]


def test_at_is_its_formula_at_the_end_of_every_stage():
    method, batch, student, (teacher,) = step_of("at")
    assert list(student.features) == list(teacher.features) == [f"stages.{i}" for i in range(3)]
    expected = 0
    for stage in range(3):
        s, t = (
            F.normalize(out.features[f"stages.{stage}"].square().mean(1).flatten(1))
            for out in (student, teacher)
        )
        expected = expected + (s - t).square().mean()
    terms = method.losses(batch, student, [teacher])
    torch.testing.assert_close(terms["at"], expected)
    torch.testing.assert_close(terms["ce"], F.cross_entropy(student.logits, batch.labels))


@pytest.mark.parametrize(
    ("pixels", "options", "weight"),
    [(32, {}, 1000), (64, {}, 1000), (8, {}, 62.5), (8, {"at_weight": 1000.0}, 1000)],
)
def test_at_weighs_less_where_its_mean_is_over_fewer_positions(pixels, options, weight):
    method = make_method("at", "reference", options)
    method.begin(Run(SimpleNamespace(shape=(pixels, pixels, 3)), steps=1, steps_per_epoch=1))
    assert method.weights(0) == {"at": weight}


def test_features_are_those_the_user_names():
    method, batch, student, teachers = step_of(
        "at", student_taps=["stem"], teacher_taps=["stages.0.0.body.0.2:input"]
    )
    assert list(student.features) == ["stem"]
    assert list(teachers[0].features) == ["stages.0.0.body.0.2:input"]
    assert method.losses(batch, student, teachers)["at"] > 0


def test_features_that_do_not_pair_are_refused():
    with pytest.raises(InputError, match=r"'stages.2'\] and .*'stages.3'\] do not pair: name as"):
        step_of("at", teacher="ResNet18")


def test_places_that_a_method_cannot_use_are_refused():
    with pytest.raises(InputError, match="no features where the literature compares them: name"):
        step_of("fitnet", student="mlp8", teacher="mlp16")
    stages = ["stages.0", "stages.1"]
    with pytest.raises(InputError, match=r"--method crd: compares one place of either network"):
        step_of("crd", student_taps=stages, teacher_taps=stages)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("at", r"--method at: teacher: expected maps \(B, C, H, W\), got features \(2, 16\)"),
        ("fitnet", r"--method fitnet: ConvReg: teacher_shape must be .*, got \(2, 16\)"),
    ],
)
def test_features_of_a_wrong_shape_are_refused_before_a_teacher_is_trained(tmp_path, name, message):
    out = tmp_path / "run"
    config = Config(
        method=name, student="convnet4", teacher="mlp16", accelerator="cpu", out=str(out)
    )
    with pytest.raises(InputError, match=message):
        run(config, {"student_taps": ["stages.1"], "teacher_taps": ["2"]})
    assert not out.exists()


def test_fitnet_projects_the_student_to_the_teachers_shape():
    method, batch, student, teachers = step_of("fitnet")
    (hint,) = (project(student.features["stages.1"]) for project in method.regressors)
    teacher = teachers[0].features["stages.1"]
    assert hint.shape == teacher.shape != student.features["stages.1"].shape
    terms = method.losses(batch, student, teachers)
    torch.testing.assert_close(terms["hint"], F.mse_loss(hint, teacher), rtol=1e-3, atol=1e-3)
    (group,) = method.parameter_groups()
    assert {id(p) for p in group["params"]} == {id(p) for p in method.regressors.parameters()}


def test_skd_leaves_the_features_of_at_alone():
    method, batch, student, teachers = step_of("skd+at")
    with torch.no_grad():
        method.methods["skd"].simplifier.output_weight.normal_()
    terms = method.losses(batch, student, method.teach(batch, teachers))
    alone = method.methods["at"].losses(batch, student, teachers)
    assert terms.keys() == {"skd.keep", "skd.skd", "at.at"} and alone.keys() == {"at"}
    torch.testing.assert_close(terms["at.at"], alone["at"])


def digits():
    options = {"val_fraction": 0.1, "split_seed": 0, "image_size": None, "cache_dir": Path()}
    return load_data("digits", **options)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    out = tmp_path_factory.mktemp("teacher")
    config = Config(method="ce", student="convnet8", epochs=6, accelerator="cpu", out=str(out))
    run(config)
    return str(out / "seed-0" / "model.safetensors")


OPTIONS = {"at": {}, "crd": {"negatives": 256, "dim": 16}, "fitnet": {}}


def trained(name, teacher, out, **config):
    settings = {"student": "convnet4", "epochs": 3, "accelerator": "cpu"} | config
    run(Config(method=name, teacher_checkpoint=teacher, out=str(out), **settings), OPTIONS[name])
    return [json.loads(line) for line in (out / "seed-0" / "log.jsonl").open()]


@pytest.mark.parametrize("name", OPTIONS)
def test_runs_learn_alike_fused_and_by_reference(name, teacher, tmp_path):
    fused, plain = (
        trained(name, teacher, tmp_path / backend, backend=backend)
        for backend in ("auto", "reference")
    )
    for one, other in zip(fused, plain, strict=True):
        assert one["train"] == pytest.approx(other["train"], rel=1e-3)
    term = {"fitnet": "hint"}.get(name, name)
    assert fused[-1]["train"][term] < fused[0]["train"][term]


def test_crd_tells_a_samples_other_embedding_from_those_of_other_classes(teacher, tmp_path):
    trained("crd", teacher, tmp_path / "crd", epochs=15)
    method = checkpoint.load_state(tmp_path / "crd/seed-0/checkpoint.pt")["method"]
    train = digits().train
    labels = torch.from_numpy(train.labels[train.rows])
    scores = method["contrast.student_bank"] @ method["contrast.teacher_bank"].T
    below = scores.diagonal()[:, None] > scores
    share = below[labels[:, None] != labels].float().mean()
    print(share)  # half of them at the start
    assert share > 0.65
