# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the trainer: its baseline computes what the trainer does, and it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from kdkernels.train.data import Batch
from kdkernels.train.methods import Output
from kdkernels.train.options import make_method

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def plain_loop(monkeypatch):
    """The baseline, which is no part of the package."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return pytest.importorskip("plain_loop")


def test_the_plain_loops_loss_is_that_of_kd(plain_loop):
    student, teacher = torch.randn(2, 16, 10)
    labels = torch.randint(10, (16,))
    loss = 0.1 * F.cross_entropy(student, labels) + 0.9 * plain_loop.distill_kl(student, teacher)
    method = make_method("kd", "auto", {})
    terms = method.losses(Batch(torch.empty(0), labels), Output(student), [Output(teacher)])
    torch.testing.assert_close(terms["kd"], loss)


def test_the_plain_loops_images_are_normalised_crops(plain_loop):
    data = pytest.importorskip("train_speed_data").stand_in(64)
    pixels, label = plain_loop.Images(data)[3]
    images, labels = data.train.take(slice(3, 4))
    assert pixels.shape == (3, 32, 32) and label == labels[0]
    mean, std = (torch.from_numpy(x)[:, None, None] for x in (data.mean, data.std))
    found = (pixels * std + mean).round().to(torch.uint8)
    shown = torch.from_numpy(images[0]).permute(2, 0, 1)
    for channel, whole in zip(found, shown, strict=True):
        assert set(channel.unique().tolist()) <= {0, *whole.unique().tolist()}


@pytest.mark.slow
def test_every_contender_runs_on_the_stand_in(tmp_path):
    command = (
        f"{sys.executable} train_speed.py --data missing --student convnet2 --teacher convnet4 "
        f"--teacher-steps 2 --steps 12 --rounds 2 --work {tmp_path / 'work'} --output {tmp_path}"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    ran = subprocess.run(
        command.split(), cwd=BENCHMARKS, check=True, env=environment, stderr=subprocess.PIPE
    )
    assert b"STAND-IN" in ran.stderr
    (path,) = tmp_path.glob("*/*.json")
    result = json.loads(path.read_text())
    for rounds in result["rounds"].values():
        assert len(rounds) == 2
        assert all(run["samples_per_second"] > 0 for turn in rounds for run in turn.values())
    assert all(len(runs) == 3 for runs in result["accuracy"]["runs"].values())
    table = path.with_suffix(".md").read_text()
    assert "| crd, " in table and "Whole trainings" in table
    other = command.replace("--steps 12", "--steps 13").split()
    refused = subprocess.run(other, cwd=BENCHMARKS, env=environment, stderr=subprocess.PIPE)
    assert refused.returncode == 1 and b"is of other settings" in refused.stderr
    assert json.loads(path.read_text()) == result
