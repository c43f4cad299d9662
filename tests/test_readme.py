# SPDX-License-Identifier: Apache-2.0
"""README's Python runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from small_datasets import write_images
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdkernels.train.cli import main

README = Path(__file__).parents[1] / "README.md"

pytestmark = pytest.mark.usefixtures("one_thread")


def snippets(word):
    """Those in which it is."""
    found = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return [code for code in found if word in code]


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4))


def test_losses():
    names = {}
    for code in snippets("Loss"):
        exec(code, names)
    assert names["loss"].isfinite()


def test_distill(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arrays = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8), np.arange(40) % 4
    batches = DataLoader(TensorDataset(torch.randn(8, 3, 8, 8), torch.arange(8) % 4), batch_size=8)
    names = {"student": network(), "teacher": network(), "images": arrays[0], "labels": arrays[1]}
    names |= dict.fromkeys(("train_loader", "val_loader", "test_loader"), batches)
    for code in snippets("distill("):
        exec(code, names)
        assert names.pop("results")["epochs"] == 60
    assert (tmp_path / "runs" / "mine" / "results.json").exists()


def test_the_student_of_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "my-images", count=10, size=(32, 32))
    run = (
        "--data my-images --method ce --student mlp8 --max-steps 1 --accelerator cpu --cache-dir x"
    )
    assert main([*run.split(), "--out", "runs/my-images-skd-resnet20"]) == 0
    (code,) = snippets("load_student")
    exec(code)
    assert capsys.readouterr().out.split()[-1] in ("cat", "dog")
