# SPDX-License-Identifier: Apache-2.0
"""A run's own log, gradient norms in it, and TensorBoard's event files beside it."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdkernels.train import Config, checkpoint, logs, loop, run
from kdkernels.train.cli import main
from kdkernels.train.learner import gradient_norms
from kdkernels.train.methods import Output

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path):
    def make(**options):
        common = {"method": "ce", "student": "mlp8", "epochs": 4, "accelerator": "cpu"}
        return Config(**common, tensorboard=True, out=str(tmp_path / "run"), **options)

    return make


def events(folder):
    """What TensorBoard would show, by name: (step, value) of every scalar."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = accumulator.EventAccumulator(str(folder / "seed-0/tensorboard"))
    shown.Reload()
    tags = shown.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in tags}


def test_tensorboard_without_its_package_is_refused_before_training(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        logs.importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )
    out = tmp_path / "run"
    arguments = ["--method", "ce", "--tensorboard", "--accelerator", "cpu", "--out", str(out)]
    assert main(arguments) == 1
    assert "pip install 'kdkernels[tensorboard]'" in capsys.readouterr().err
    assert not out.exists()


def test_tensorboard_shows_what_the_log_says(config, tmp_path):
    pytest.importorskip("tensorboard")
    run(config())
    shown = events(tmp_path / "run")
    lines = (tmp_path / "run/seed-0/log.jsonl").read_text().splitlines()
    for tag, keys in {"train/ce": ("train", "ce"), "val/accuracy": ("val", "accuracy")}.items():
        records = map(json.loads, lines)
        expected = [(record["step"], record[keys[0]][keys[1]]) for record in records]
        assert shown[tag] == [(step, pytest.approx(value)) for step, value in expected]
    assert {"lr", "samples_per_second", "loss_share", "gradient_norms/ce"} <= shown.keys()


def test_a_resumed_run_goes_on_with_its_events(config, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    save, saves = loop.save, []

    def stop_before_the_third(*arguments):
        saves.append(1)
        if len(saves) == 3:
            raise KeyboardInterrupt
        save(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save", stop_before_the_third)
        run(config())
    run(config(resume=True))
    steps = [step for step, _ in events(tmp_path / "run")["train/loss"]]
    assert len(steps) == 4 and steps == sorted(set(steps))


def test_gradient_norms_are_those_of_the_weighted_terms():
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    feature = torch.randn(4, 5, dtype=torch.double, requires_grad=True)
    labels, own = torch.tensor([0, 1, 2, 0]), nn.Parameter(torch.ones(2))
    terms = {
        "ce": F.cross_entropy(logits, labels),
        "both": feature.square().sum() + logits.sum(),
        "own": own.sum(),
        "constant": torch.ones(()),
    }
    norms = gradient_norms(terms, {"both": 0.5}, Output(logits, {"stem": feature}))
    ce = (logits.softmax(-1) - F.one_hot(labels, 3)) / 4
    both = 0.5 * torch.cat([2 * feature.flatten(), torch.ones(12)])
    assert norms.keys() == {"ce", "both"}
    torch.testing.assert_close(norms["ce"], ce.norm())
    torch.testing.assert_close(norms["both"], both.norm())
    assert logits.grad is None and own.grad is None


def test_looking_at_gradients_changes_nothing(tmp_path, monkeypatch):
    """Seldom or in every step: the weights are the same to the bit, and the log has the norms."""
    config = {
        "method": "skd+dkd+crd", "student": "mlp8", "teacher": "mlp16", "teacher_epochs": 1,
        "epochs": 2, "accelerator": "cpu",
    }  # fmt: skip
    weights, measured = [], []
    for every in (100, 1):
        monkeypatch.setattr(loop, "READ_EVERY", every)
        out = tmp_path / str(every)
        run(Config(**config, out=str(out)), {"negatives": 16, "warmup": 1})
        weights.append(checkpoint.load_state(out / "seed-0" / "checkpoint.pt")["student"])
        measured.append(checkpoint.read_lines(out / "seed-0" / "log.jsonl")[-1]["gradient_norms"])
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    for norms in measured:
        assert norms.keys() == {"skd.skd", "dkd.dkd", "crd.crd"}
        assert min(norms.values()) > 0
    assert measured[0] != measured[1]
