# SPDX-License-Identifier: Apache-2.0
"""The teacher cache: same training from disk, its keys, damage, kills, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch.nn import functional as F

from kdkernels.train import Config, InputError, checkpoint, methods, run
from kdkernels.train.cli import main
from kdkernels.train.data import Batch, Batches, load_data, mix_up, quarter_turns
from kdkernels.train.encoding import Form
from kdkernels.train.experiment import make_method
from kdkernels.train.methods import Output, TopK
from kdkernels.train.methods.kd import KD
from kdkernels.train.models import build_model
from kdkernels.train.models.layers import Network
from kdkernels.train.teacher_cache import CachedTeachers
from kdkernels.train.teachers import Teachers

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
def data(tmp_path_factory):
    """Scikit-learn's digits."""
    cache_dir = tmp_path_factory.mktemp("data")
    return load_data("digits", val_fraction=0.1, split_seed=0, image_size=None, cache_dir=cache_dir)


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


def make(data, folder, *, network=None, form=None, taps=(), **changes):
    """A cache of one teacher with the weights of seed 0."""
    torch.manual_seed(0)
    network = network or build_model("convnet4", data.shape, 10)
    teachers = Teachers(Fabric(accelerator="cpu", devices=1), [network], [taps])
    settings = {"batch_size": BATCH_SIZE, "augment": "crop", "seed": 1, "device": "cpu"} | changes
    return CachedTeachers(teachers, Batches(data, **settings), folder, form or Form())


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


def test_answers_are_the_teachers_own_wherever_an_image_stands(data, tmp_path):
    cached = make(data, tmp_path, taps=TAPS, views=2, distinct_views=3)
    for number in (0, cached.batches.per_epoch + 3, 3 * cached.batches.per_epoch - 1):
        batch = cached.batches(number)
        (found,) = cached(batch, [0])
        expected = cached.teachers[0](batch.images)
        assert torch.equal(found.logits, expected.logits)
        for tap in TAPS:
            assert torch.equal(found.features[tap], expected.features[tap])
            assert found.features[tap].stride() == expected.features[tap].stride()
    assert cached.cost["teacher_cache"]["views_made"] == 3


def test_images_that_are_no_views_go_to_the_teacher(data, tmp_path):
    cached = make(data, tmp_path)
    for change in (quarter_turns, lambda batch: mix_up(batch, 1.0, 10, np.random.default_rng(0))):
        batch = change(cached.batches(0))
        (found,) = cached(batch, [0])
        assert torch.equal(found.logits, cached.teachers[0](batch.images).logits)
    assert not list(tmp_path.iterdir())


def test_whatever_decides_an_output_is_in_the_key(data, tmp_path, monkeypatch):
    torch.manual_seed(1)
    other = build_model("convnet4", data.shape, 10)
    alike = build_model("convnet4", data.shape, 10)
    alike.load_state_dict(build_first(data).state_dict())
    alike.stages[0][0][2] = torch.nn.SiLU()
    smaller = replace(data, train=replace(data.train, rows=data.train.rows[1:]))
    caches = [
        make(data, tmp_path),
        make(replace(data, digest="other"), tmp_path),
        make(smaller, tmp_path),
        make(data, tmp_path, network=other),
        make(data, tmp_path, network=alike),
        make(data, tmp_path, taps=TAPS[:1]),
        make(data, tmp_path, augment="none"),
        make(data, tmp_path, seed=2),
        make(data, tmp_path, batch_size=50),
        make(data, tmp_path, shares=4),
        make(data, tmp_path, form=Form("fp16")),
        make(data, tmp_path, form=Form("fp32", 3, 4.0)),
        make(data, tmp_path, form=Form("fp32", 3, 2.0)),
        make(replace(data, mean=data.mean + 1), tmp_path),
    ]
    assert len({cache.folders[0] for cache in caches}) == len(caches)
    same = [
        make(data, tmp_path),
        make(data, tmp_path, seed=2, augment_seed=1),
        make(data, tmp_path, distinct_views=4, mixup=0.2),
    ]
    assert {cache.folders[0] for cache in same} == {caches[0].folders[0]}
    half = make(data, tmp_path, form=Form("fp16")).folders
    monkeypatch.setattr(torch, "__version__", "another")
    assert make(data, tmp_path).folders != caches[0].folders
    assert make(data, tmp_path, form=Form("fp16")).folders == half


def build_first(data):
    torch.manual_seed(0)
    return build_model("convnet4", data.shape, 10)


def test_later_runs_find_what_was_made(config, tmp_path):
    config = replace(config, epochs=2, augment_seed=0, cache_views=1)
    assert cached_run(config, tmp_path)["teacher_cache"]["views_made"] == 1
    for number, changes in enumerate(({"seed": (5,)}, {"student": "mlp8"}, {"cache_views": None})):
        out = str(tmp_path / str(number))
        again = replace(config, teacher_cache=str(tmp_path / "cache"), out=out, **changes)
        (result,) = run(again)["runs"]
        assert result["teacher_cache"]["views_made"] == (changes == {"cache_views": None})


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing", "index", "foreign"])
def test_a_damaged_cache_is_named(data, tmp_path, damage):
    cached = make(data, tmp_path, form=Form("fp32", 3, 4.0))
    cached.fill(0, [0])
    folder = cached.folders[0] / "view-0"
    path = folder / ("index.json" if damage in ("index", "foreign") else "top-classes.npy")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-1]
    elif damage == "index":
        del content[len(content) // 2 :]
    elif damage == "changed":
        content[-1] ^= 1
    path.write_bytes(content)
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        other = make(data, tmp_path, seed=2, form=Form("fp32", 3, 4.0))
        other.fill(0, [0])
        shutil.rmtree(folder)
        (other.folders[0] / "view-0").rename(folder)
    with pytest.raises(InputError, match=rf"{path}: damaged teacher cache .*; delete {folder}"):
        make(data, tmp_path, form=Form("fp32", 3, 4.0)).fill(0, [0])


class Louder(Network):
    """Prints and weighs what a ``Network`` does, and gives out something else."""

    def forward(self, images):
        return 1.2 * super().forward(images)

    def _get_name(self):
        return "Network"


def test_a_teacher_that_only_its_code_tells_apart_is_noticed(data, tmp_path):
    make(data, tmp_path).fill(0, [0])
    network = build_first(data)
    network.__class__ = Louder
    changed = make(data, tmp_path, network=network)
    with pytest.raises(InputError, match=r"logits.npy: stale teacher cache: not what the teacher"):
        changed.fill(0, [0])


def test_classes_that_a_teacher_rules_out_are_found_again(data, tmp_path):
    def network():
        first = build_first(data)
        first.classifier.bias.data[3] = -torch.inf
        return first

    make(data, tmp_path, network=network()).fill(0, [0])
    cached = make(data, tmp_path, network=network())
    cached.fill(0, [0])
    assert cached.cost["teacher_cache"]["views_made"] == 0


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


def test_of_two_that_start_together_one_makes_a_view(data, tmp_path):
    caches = [make(data, tmp_path) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda cached: cached.fill(0, [0, 1]), caches))
    assert sum(cached.cost["teacher_cache"]["views_made"] for cached in caches) == 2


def test_what_fp16_cannot_hold_is_refused(data, tmp_path):
    network = build_first(data)
    with torch.no_grad():
        network.classifier.weight.mul_(1e6)
    cached = make(data, tmp_path, network=network, form=Form("fp16"))
    with pytest.raises(InputError, match=r"--cache-dtype fp16: the teacher's outputs reach \d"):
        cached.fill(0, [0])
    assert not list(cached.folders[0].glob("view-0*/"))


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
