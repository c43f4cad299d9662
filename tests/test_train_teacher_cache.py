# SPDX-License-Identifier: Apache-2.0
"""Training from a teacher cache: the same, kills, later runs, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from kdkernels.train import Config, InputError, checkpoint, methods, run
from kdkernels.train.cli import main
from kdkernels.train.data import Batch
from kdkernels.train.methods import Output, TopK
from kdkernels.train.methods.kd import KD
from kdkernels.train.options import make_method
from kdkernels.train.teacher_cache import CachedTeachers

BATCH_SIZE = 100  # so that the last batch of a view has to be filled up
TAPS = ("stages.0", "classifier:input")

pytestmark = pytest.mark.usefixtures("one_thread")


class FeatureKD(KD):
    """KD, and the features of a convnet4 teacher where the student has its own."""

    def taps(self, student, teachers):
        return [TAPS] * (1 + len(teachers))

    def losses(self, batch, student_out, teacher_out):
        terms = super().losses(batch, student_out, teacher_out)
        for tap in TAPS:
            features = student_out.features[tap], teacher_out[0].features[tap]
            terms[tap] = F.mse_loss(*features)
        return terms


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """A small teacher that has learned something."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    run(Config(method="ce", student="convnet4", epochs=4, accelerator="cpu", out=str(out)))
    return out / "seed-0" / "model.safetensors"


@pytest.fixture
def config(teacher_file, tmp_path):
    """Three epochs in two views."""
    return Config(
        teacher_checkpoint=str(teacher_file),
        student="convnet4",
        epochs=3,
        batch_size=BATCH_SIZE,
        cache_views=2,
        accelerator="cpu",
        precision="32-true",
        out=str(tmp_path / "run"),
    )


def cached_run(config, tmp_path, **changes):
    """Results of the one seed with a cache in ``tmp_path``."""
    changes |= {"teacher_cache": str(tmp_path / "cache"), "out": str(tmp_path / "cached")}
    (result,) = run(replace(config, **changes))["runs"]
    return result


@pytest.mark.parametrize(
    "changes",
    [{"method": "fkd"}, {"precision": "bf16-mixed"}, {"accumulate": 2}],
    ids=lambda changes: next(iter(changes.values())),
)
def test_training_from_an_fp32_cache_is_bit_equal(config, tmp_path, monkeypatch, changes):
    monkeypatch.setitem(methods.METHODS, "fkd", FeatureKD)
    config = replace(config, **changes)
    run(config)
    result = cached_run(config, tmp_path)
    assert result["teacher_cache"]["views_made"] == 2
    ends = [
        checkpoint.load_state(tmp_path / name / "seed-0/checkpoint.pt")
        for name in ("run", "cached")
    ]
    torch.testing.assert_close(ends[0]["student"], ends[1]["student"], rtol=0, atol=0)
    trained = [end["state"]["history"][-1]["train"] for end in ends]
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [({"cache_dtype": "fp16"}, 1e-3), ({"cache_topk": 10}, 1e-4)],
)
def test_a_smaller_cache_trains_nearly_the_same(config, tmp_path, changes, tolerance):
    (exact,) = run(config)["runs"]
    near = cached_run(config, tmp_path, **changes)
    assert near["test"]["kl_to_teacher"] == pytest.approx(
        exact["test"]["kl_to_teacher"], rel=tolerance
    )


@pytest.mark.parametrize("k", [100, 50, 10, 1])
def test_top_k_logits_lack_the_divergence_within_the_tail_and_no_more(k):
    """The chain rule of KL: what is lost is the tail's mass times the KL of its conditionals."""
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 64, 100, dtype=torch.double)
    labels = torch.randint(100, (64,))
    method = make_method("kd", "auto", {"temperature": 2.0, "alpha": 0.5})
    values, classes = teacher.topk(k)
    kept = TopK(values, classes, (teacher / 2.0).logsumexp(-1))
    batch = Batch(torch.empty(0), labels)
    whole, least = (
        method.losses(batch, Output(student), [Output(logits)])["kd"] for logits in (teacher, kept)
    )
    tail = torch.ones_like(teacher, dtype=torch.bool).scatter(-1, classes, False)
    p, q = ((logits / 2.0).softmax(-1)[tail].view(64, -1) for logits in (teacher, student))
    mass = p.sum(-1)
    p, q = p / p.sum(-1, True), q / q.sum(-1, True)
    lost = 0.5 * 2.0**2 * (mass * (p * (p / q).log()).sum(-1)).mean()
    torch.testing.assert_close(whole - least, lost, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_later_runs_find_what_was_made(config, tmp_path):
    config = replace(config, epochs=2, augment_seed=0, cache_views=1)
    assert cached_run(config, tmp_path)["teacher_cache"]["views_made"] == 1
    for number, changes in enumerate(({"seed": (5,)}, {"student": "mlp8"}, {"cache_views": None})):
        out = str(tmp_path / str(number))
        again = replace(config, teacher_cache=str(tmp_path / "cache"), out=out, **changes)
        (result,) = run(again)["runs"]
        assert result["teacher_cache"]["views_made"] == (changes == {"cache_views": None})


def test_a_cache_of_another_machine_serves_and_the_difference_is_told(
    config, tmp_path, monkeypatch, capsys
):
    config = replace(config, epochs=1, augment_seed=0)
    here = cached_run(config, tmp_path)["teacher_cache"]
    assert here["views_made"] == 1 and here["difference"] == 0
    assert "elsewhere" not in capsys.readouterr().out
    compute = CachedTeachers._compute

    def rounded_otherwise(*arguments):
        return {name: array * (1 + 2**-20) for name, array in compute(*arguments).items()}

    monkeypatch.setattr(CachedTeachers, "_compute", rounded_otherwise)
    again = replace(config, teacher_cache=str(tmp_path / "cache"), out=str(tmp_path / "there"))
    there = run(again)["runs"][0]["teacher_cache"]
    assert there["views_made"] == 0
    assert there["difference"] == pytest.approx(2**-20, rel=0.2)
    said = " ".join(capsys.readouterr().out.split())
    told = f"differ from what the teacher gives here by {there['difference']:.1e} of its largest"
    assert told in said


KILL = """
import os, signal, sys
from kdkernels.train.cli import main
from kdkernels.train.teacher_cache import CachedTeachers
compute, calls = CachedTeachers._compute, []
def killed(self, index, view, start):
    if view == 1 and start:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(self, index, view, start)
CachedTeachers._compute = killed
main(sys.argv[1:])
"""


def test_a_killed_build_goes_on_with_the_views_that_are_whole(config, teacher_file, tmp_path):
    arguments = (
        f"--teacher-checkpoint {teacher_file} --student convnet4 --epochs 3 --cache-views 2 "
        f"--batch-size {BATCH_SIZE} --accelerator cpu --precision 32-true "
        f"--teacher-cache {tmp_path / 'cache'} --out {tmp_path / 'killed'}"
    ).split()
    killed = subprocess.run(
        [sys.executable, "-c", KILL, *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -signal.SIGKILL
    (folder,) = (tmp_path / "cache").iterdir()
    assert (folder / "view-0").is_dir() and (folder / "view-1.partial").is_dir()
    assert not (folder / "view-1").exists()
    assert main([*arguments, "--resume"]) == 0
    results = json.loads((tmp_path / "killed/seed-0/results.json").read_text())
    assert results["teacher_cache"]["views_made"] == 1
    assert not (folder / "view-1.partial").exists()
    (alone,) = run(config)["runs"]
    assert results["val"] == alone["val"] and results["test"] == alone["test"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method dkd --cache-topk 3", "--cache-topk: --method dkd needs all of the logits"),
        ("--method kd+dkd --cache-topk 3", "--cache-topk: --method kd+dkd needs all"),
        ("--cache-topk 11", "--cache-topk: expected at most 10, the number of classes, got 11"),
        ("--mixup 0.2", "--teacher-cache: keeps nothing of mixed images"),
        ("--precision 64-true", "--teacher-cache: keeps float32 at most"),
        ("--cache-views 0", "--cache-views: expected a number above 0, got 0"),
    ],
)
def test_what_a_cache_cannot_do_is_refused(teacher_file, tmp_path, capsys, arguments, message):
    common = (
        f"--teacher-checkpoint {teacher_file} --epochs 1 --accelerator cpu --out {tmp_path / 'x'} "
        f"--teacher-cache {tmp_path / 'cache'}"
    )
    assert main([*common.split(), *arguments.split()]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists() and not (tmp_path / "x").exists()


def test_options_of_a_cache_need_one():
    with pytest.raises(InputError, match="--cache-dtype, --cache-topk: expected --teacher-cache"):
        Config(cache_topk=3)
