# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's event files beside a run's own log."""

from __future__ import annotations

import importlib.util
import json

import pytest

from kdkernels.train import Config, logs, loop, run
from kdkernels.train.cli import main

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
    assert {"lr", "samples_per_second", "loss_share"} <= shown.keys()


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
