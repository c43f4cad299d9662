# SPDX-License-Identifier: Apache-2.0
"""``benchmarks/accuracy.py`` on a protocol of seconds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def accuracy(tmp_path, monkeypatch):
    """The script with networks, epochs and images of its own, and a function that runs it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import accuracy

    small = {
        "TEACHER": "mlp16", "TEACHER_EPOCHS": 1, "STUDENT": "resnet8", "EPOCHS": 3, "SEEDS": (0, 1),
        "TRAIN_PER_CLASS": 20, "VAL_PER_CLASS": 4,
    }  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(accuracy, name, value)
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 6
    images = rng.integers(0, 200, (300, 8, 8, 3)) + 9 * labels[:, None, None, None]
    np.savez(tmp_path / "data.npz", images=images.astype(np.uint8), labels=labels)

    def run(*methods):
        arguments = ["--work", tmp_path / "work", "--results", tmp_path, "--methods", *methods]
        monkeypatch.setattr(sys, "argv", ["", *map(str, [tmp_path / "data.npz", *arguments])])
        accuracy.main()
        return json.loads((tmp_path / "results.json").read_text())

    return run


def test_results_are_kept_method_by_method(accuracy, tmp_path):
    assert list(accuracy("kd")) == ["kd"]
    teacher = (tmp_path / "mlp16.safetensors").stat().st_mtime_ns
    before = (tmp_path / "work/kd/results.json").stat().st_mtime_ns
    kept = accuracy("education", "ce")
    assert list(kept) == ["ce", "kd", "education"]
    assert (tmp_path / "mlp16.safetensors").stat().st_mtime_ns == teacher
    assert (tmp_path / "work/kd/results.json").stat().st_mtime_ns == before
    assert (
        len(list(tmp_path.glob("mlp16-*.safetensors"))) == len(kept["education"]["teachers"]) == 3
    )
    train = np.load(tmp_path / "work/data/train_labels.npy")
    assert np.array_equal(np.bincount(train), [20] * 6)
    assert str(tmp_path) not in json.dumps(kept)
    import accuracy_table

    assert accuracy_table.table(kept).count("\n| `") == 3  # though specialists judge no student


def test_the_table_compares_seed_by_seed(accuracy):
    import accuracy_table

    kept = accuracy("ce", "kd")
    ce, kd = accuracy_table.table(kept).splitlines()[2:]
    gains = [
        100 * (one["test"]["accuracy"] - other["test"]["accuracy"])
        for one, other in zip(kept["kd"]["runs"], kept["ce"]["runs"], strict=True)
    ]
    assert ce.startswith("| `ce` |") and ce.endswith("|  |")
    assert kd.endswith(f"| {np.mean(gains):+.2f} ± {np.std(gains, ddof=1):.2f} |")
