# SPDX-License-Identifier: Apache-2.0
"""Education distillation: what specialists teach, what a student keeps or forgets, whole runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from kdkernels import functional as KF
from kdkernels.train import Config, checkpoint, loop, run
from kdkernels.train.cli import main
from kdkernels.train.data import Batch, load_data
from kdkernels.train.methods import METHODS, Output, Run
from kdkernels.train.models import build_model
from kdkernels.train.teacher_cache import CachedTeachers

SHAPE = (8, 8, 1)
QUICK = {
    "method": "education", "student": "convnet8", "accelerator": "cpu", "augment": "none",
    "precision": "32-true",
}  # fmt: skip
GRADES = {"grades": 2, "boundaries": [0.4]}  # of 30 epochs, 12 and 18
HALVES = {"grades": 2, "boundaries": [0.5]}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return load_data("digits", val_fraction=0.1, split_seed=0, image_size=None, cache_dir=cache)


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """A finished run of two grades, of which others take the teachers."""
    out = tmp_path_factory.mktemp("school") / "replay"
    config = Config(**QUICK, teacher="convnet16", teacher_epochs=8, epochs=30, out=str(out))
    run(config, GRADES)
    return out


def teachers_of(school):
    return ",".join(str(school / f"teacher-{n}" / "model.safetensors") for n in (1, 2))


def begun(digits, steps=60, steps_per_epoch=10, **options):
    method = METHODS["education"](backend="reference", **options)
    method.begin(Run(digits, steps, steps_per_epoch))
    return method


def log_of(folder):
    return [json.loads(line) for line in (folder / "seed-0" / "log.jsonl").open()]


@pytest.mark.parametrize("mixed", [False, True])
def test_the_teacher_speaks_inside_its_group_only(digits, mixed):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(6, 7, generator=generator, dtype=torch.double, requires_grad=True)
    teacher = torch.randn(6, 4, generator=generator, dtype=torch.double)
    labels = torch.tensor([3, 4, 5, 6, 3, 4])
    batch = Batch(torch.empty(6, 1, 8, 8), labels, classes=(3, 7))
    if mixed:
        batch = batch._replace(labels=torch.nn.functional.one_hot(labels, 10).double())
    method = begun(digits, alpha=1.0)
    loss = method.losses(batch, Output(student), [Output(teacher)])["education"]
    window = student[:, 3:7].detach().requires_grad_()
    expected = KF.kl_div(window, teacher, temperature=4.0, backend="reference")
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(student.grad[:, 3:7], window.grad)
    assert not student.grad[:, :3].any()
    # The labels speak of all classes seen so far.
    student.grad = None
    begun(digits, alpha=0.0).losses(batch, Output(student), [Output(teacher)])[
        "education"
    ].backward()
    assert student.grad[:, :3].all()


def test_specialists_are_of_their_group_and_the_student_is_exported_whole(school):
    results = json.loads((school / "results.json").read_text())
    for place in ("teacher-1", "teacher-2"):
        _, model = checkpoint.load_model(school / place / "model.safetensors", SHAPE, 5)
        assert model.classifier.out_features == 5
        assert results[place]["test"]["accuracy"] > 0.8
    _, student = checkpoint.load_model(school / "seed-0" / "model.safetensors", SHAPE, 10)
    assert student.state_dict().keys() == build_model("convnet8", SHAPE, 10).state_dict().keys()
    assert results["runs"][0]["val"]["best_epoch"] > 12
    assert "agreement" not in results["runs"][0]["test"]


def test_replay_keeps_the_first_group_and_without_it_there_is_a_cliff(school, tmp_path):
    out = tmp_path / "none"
    config = Config(**QUICK, teacher_checkpoint=teachers_of(school), epochs=30, out=str(out))
    run(config, GRADES | {"replay": False})
    before, kept, lost = (
        log[epoch]["val"]["accuracy_of_group_1"]
        for log, epoch in ((log_of(school), 11), (log_of(school), 29), (log_of(out), 29))
    )
    print(before, kept, lost)
    assert log_of(school)[11]["val"]["accuracy_of_group_2"] == 0  # not yet among its classes
    assert before > 0.6 and kept > before - 0.25 and lost < 0.1
    assert log_of(school)[29]["val"]["accuracy_of_group_2"] > 0.5


def test_one_grade_is_kd(tmp_path):
    config = QUICK | {"student": "mlp8", "epochs": 2}
    teacher = {"teacher": "mlp16", "teacher_epochs": 2}
    run(Config(**config, **teacher, out=str(tmp_path / "one")), {"grades": 1})
    kd = Config(
        **config | {"method": "kd"}, out=str(tmp_path / "kd"),
        teacher_checkpoint=str(tmp_path / "one" / "teacher" / "model.safetensors"),
    )  # fmt: skip
    run(kd, {"alpha": 0.7})
    one, other = (
        checkpoint.load_model(tmp_path / name / "seed-0" / "model.safetensors", SHAPE, 10)[1]
        for name in ("one", "kd")
    )
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [4, 8])
def test_a_run_resumes_bit_equal_across_a_promotion(school, tmp_path, stop):
    """Stopped before the promotion, at the third epoch's start, and in the middle of a grade."""
    config = QUICK | {"teacher_checkpoint": teachers_of(school), "epochs": 4, "augment": "auto"}
    config["checkpoint_every"] = 5
    run(Config(**config, out=str(tmp_path / "whole")), HALVES)
    save, saves = loop.save, []

    def save_and_stop(*arguments):
        save(*arguments)
        saves.append(1)
        if len(saves) == stop:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save", save_and_stop)
        with pytest.raises(Stop):
            run(Config(**config, out=str(tmp_path / "again")), HALVES)
    run(Config(**config, out=str(tmp_path / "again"), resume=True), HALVES)
    whole, again = (
        checkpoint.load_state(tmp_path / name / "seed-0" / "checkpoint.pt")
        for name in ("whole", "again")
    )
    for part in ("student", "method", "optimizer", "rng"):
        torch.testing.assert_close(whole[part], again[part], rtol=0, atol=0)
    for one, other in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "again"), strict=True):
        assert (one["train"], one["val"]) == (other["train"], other["val"])


def exported(folder):
    path = folder / "seed-0" / "model.safetensors"
    return checkpoint.load_model(path, SHAPE, 10)[1].state_dict()


def test_cached_specialists_teach_to_the_same_bits(digits, school, tmp_path, monkeypatch):
    """And the cache holds what they are asked, of their classes, and no more."""
    asked, answer = set(), CachedTeachers.__call__

    def noting(cached, batch, indices):
        asked.update((cached.folders[i].name, view) for i in indices for view in batch.views)
        return answer(cached, batch, indices)

    monkeypatch.setattr(CachedTeachers, "__call__", noting)
    config = QUICK | {"teacher_checkpoint": teachers_of(school), "epochs": 4, "augment": "crop"}
    for name, cache in (("plain", {}), ("cached", {"teacher_cache": str(tmp_path / "cache")})):
        results = run(Config(**config, **cache, out=str(tmp_path / name)), {"grades": 2})
    plain, cached = (exported(tmp_path / name) for name in ("plain", "cached"))
    torch.testing.assert_close(plain, cached, rtol=0, atol=0)
    kept = {
        (view.parent.name, int(view.name.removeprefix("view-"))): len(np.load(view / "logits.npy"))
        for view in (tmp_path / "cache").glob("*/view-*/")
    }
    assert kept.keys() == asked
    assert len(kept) == results["runs"][0]["teacher_cache"]["views_made"]
    assert len(set(kept.values())) == 2  # the images of either group
    assert sum(set(kept.values())) == len(digits.train)


@pytest.mark.parametrize("settings", [{"ema": 0.9}, {"accumulate": 2}, {"mixup": 0.2}])
def test_a_growing_student_goes_with(school, tmp_path, settings):
    config = QUICK | {"teacher_checkpoint": teachers_of(school), "epochs": 6} | settings
    run(Config(**config, out=str(tmp_path)), HALVES)
    log = log_of(tmp_path)
    for first, last in ((0, 2), (3, 5)):  # of a grade
        assert log[last]["train"]["education"] < log[first]["train"]["education"]
    assert log[2]["val"]["accuracy_of_group_1"] > 0.2 > log[2]["val"]["accuracy_of_group_2"] == 0


def test_the_log_says_which_specialist_and_grade(tmp_path, capsys):
    config = QUICK | {"student": "convnet4", "teacher": "convnet4", "teacher_epochs": 1}
    results = run(Config(**config, epochs=2, out=str(tmp_path / "run")), HALVES)
    lines = capsys.readouterr().out
    for begin in (
        "teacher 1 of 2, convnet4 (classes 0..4): epoch 1/1, loss",
        "teacher 2 of 2, convnet4 (classes 5..9): epoch 1/1, loss",
        "education convnet4 seed 0: epoch 1/2 (grade 1 of 2), loss",
        "education convnet4 seed 0: epoch 2/2 (grade 2 of 2), loss",
    ):
        assert begin in lines
    assert results["teacher-2"]["classes"] == tuple("56789")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--grades 3", "3 grades: expected a student of as many stages, got 2"),
        ("--grades 2 --epochs 1", "--boundaries: every grade must last an epoch or more; of 1"),
        ("--grades 2 --boundaries .5 .6", "--boundaries: expected 1 for 2 grades, got [0.5, 0.6]"),
        ("--grades 2 --boundaries 0", "grades would begin after [0, 0]"),
        ("--grades 6", "--grades 6: expected at most 5 for 10 classes: a specialist needs two"),
        ("--method education+kd --grades 2", "--method: education goes with no other method"),
        ("--grades 2 --teacher-checkpoint x", "--teacher-checkpoint: x: no such model file"),
        (
            "--grades 2 --teacher-checkpoint README.md",
            "--teacher-checkpoint: expected 2 joined by commas",
        ),
    ],
)
def test_bad_options_are_named_and_write_nothing(arguments, message, tmp_path, capsys):
    out = tmp_path / "out"
    common = "--method education --student convnet8 --accelerator cpu --replay false"
    teacher = [] if "--teacher-checkpoint" in arguments else ["--teacher", "convnet4"]
    assert main([*common.split(), *teacher, *arguments.split(), "--out", str(out)]) == 1
    assert message in capsys.readouterr().err
    assert not out.exists()
