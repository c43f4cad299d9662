# SPDX-License-Identifier: Apache-2.0
"""The trainer: methods, metrics, and what a run leaves behind."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch.nn import functional as F

from kdkernels.train import Config, DivergedError, InputError, checkpoint, report, run
from kdkernels.train.cli import main
from kdkernels.train.clock import StepClock
from kdkernels.train.data import Batch
from kdkernels.train.methods import Output
from kdkernels.train.metrics import calibration_error, measure, summarise
from kdkernels.train.models import build_model
from kdkernels.train.options import make_method

QUICK = {"student": "mlp8", "epochs": 2, "accelerator": "cpu"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def step():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, generator=generator, dtype=torch.double)
    batch = Batch(torch.empty(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 1]))
    return batch, Output(student.requires_grad_()), [Output(teacher)]


def test_kd_without_teacher_weight_is_ce(step):
    kd = make_method("kd", "reference", {"alpha": 0.0}).losses(*step)["kd"]
    ce = make_method("ce", "reference", {}).losses(*step)["ce"]
    torch.testing.assert_close(kd, ce, check_dtype=False)


def test_kd_is_hintons_formula(step):
    batch, student, (teacher,) = step
    method = make_method("kd", "reference", {"temperature": 2.0, "alpha": 0.3})
    p, q = (F.softmax(out.logits / 2.0, -1) for out in (teacher, student))
    kl = (p * (p / q).log()).sum(-1).mean()
    expected = 0.7 * F.cross_entropy(student.logits, batch.labels) + 0.3 * 4.0 * kl
    torch.testing.assert_close(
        method.losses(batch, student, [teacher])["kd"], expected, check_dtype=False
    )


@pytest.mark.parametrize(
    ("method", "weight"),
    [
        ("at", "at_weight"), ("crd", "crd_weight"), ("dkd", "alpha"), ("dkd", "beta"),
        ("education", "alpha"), ("fitnet", "hint_weight"), ("kd", "alpha"), ("skd", "kd_weight"),
    ],
)  # fmt: skip
def test_negative_weights_are_refused(method, weight):
    with pytest.raises(InputError, match=f"--{weight.replace('_', '-')}: expected .*, got -0.1"):
        make_method(method, "reference", {weight: -0.1})


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"alpha": 1.5}, {"beta": 1.0}])
def test_bad_method_options_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        make_method("kd", "reference", options)


def test_calibration_error_by_hand():
    # Two at confidence .8, one of them right; one at .6 and right: (2 x |.5 - .8| + |1 - .6|) / 3.
    probabilities = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6]])
    error = calibration_error(probabilities.log(), torch.tensor([0, 1, 1]))
    assert error == pytest.approx((2 * 0.3 + 0.4) / 3)


def test_calibration_error_is_zero_when_confidence_is_accuracy():
    probabilities = torch.tensor([[0.75, 0.25]] * 4)
    assert calibration_error(probabilities.log(), torch.tensor([0, 0, 0, 1])) == pytest.approx(
        0, abs=1e-6
    )


def test_metrics_by_hand():
    student = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1]])
    teacher = torch.tensor([[0.6, 0.4], [0.8, 0.2], [0.5, 0.5]])
    metrics = measure(student.log(), torch.tensor([0, 1, 1]), teacher.log())
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["agreement"] == pytest.approx(2 / 3)
    kl = (teacher * (teacher / student).log()).sum() / 3
    assert metrics["kl_to_teacher"] == pytest.approx(kl.item(), rel=1e-5)


def test_summary_is_mean_and_sample_deviation():
    summary = summarise([{"a": {"b": 1.0}, "name": "x"}, {"a": {"b": 3.0}, "name": "y"}])
    assert summary == {"a.b": {"mean": 2.0, "std": pytest.approx(2**0.5)}}


class Sleepy(torch.autograd.Function):
    """Takes its time forward and backward."""

    @staticmethod
    def forward(ctx, value, forward_seconds, backward_seconds):
        time.sleep(forward_seconds)
        ctx.backward_seconds = backward_seconds
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.backward_seconds)
        return gradient, None, None


def test_the_clock_counts_the_losss_forward_and_backward_only():
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        clock.step_starts()
        logits = Sleepy.apply(torch.ones(3, requires_grad=True), 0.04, 0.05)
        clock.loss_starts(logits)
        value = Sleepy.apply(logits, 0.01, 0.02).sum()
        with clock.loss_paused():
            time.sleep(0.03)
        value.backward()
        clock.step_ends()
    step, loss = clock.read()
    assert loss == pytest.approx(2 * 0.03, abs=0.03)
    assert step == pytest.approx(2 * 0.15, abs=0.06)
    assert clock.read() == (0, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A kd run over two seeds with the teacher trained on the way."""
    out = tmp_path_factory.mktemp("runs") / "kd"
    arguments = "--teacher convnet4 --teacher-epochs 3 --student mlp8 --epochs 2 --seed 3 4"
    assert main([*arguments.split(), "--accelerator", "cpu", "--out", str(out)]) == 0
    return out


def test_a_run_leaves_results_logs_models_and_curves(finished):
    results = json.loads((finished / "results.json").read_text())
    assert [run["seed"] for run in results["runs"]] == [3, 4]
    assert results["config"].items() >= {"temperature": 4.0, "alpha": 0.9}.items()
    assert results["environment"]
    assert {"accuracy", "agreement", "kl_to_teacher", "ece"} <= results["runs"][0]["test"].keys()
    assert 0 < results["summary"]["loss_share"]["mean"] < 1
    log = [json.loads(line) for line in (finished / "seed-4" / "log.jsonl").open()]
    assert [record["epoch"] for record in log] == [1, 2]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(finished.glob("**/model.safetensors"))) == 3


def test_checkpoints_hold_the_student_only(finished):
    state = checkpoint.load_state(finished / "seed-3" / "checkpoint.pt")
    weights = build_model("mlp8", (8, 8, 1), 10).state_dict()
    assert state["student"].keys() == weights.keys()
    assert not state["method"]


def test_the_exported_model_is_the_best_epoch(finished):
    state = checkpoint.load_state(finished / "seed-3" / "checkpoint.pt")["state"]
    name, model = checkpoint.load_model(finished / "seed-3" / "model.safetensors", (8, 8, 1), 10)
    assert name == "mlp8"
    for key, value in model.state_dict().items():
        assert torch.equal(value, state["best"]["weights"][key])


def test_seeds_differ_and_repeat(finished, tmp_path):
    teacher = str(finished / "teacher" / "model.safetensors")
    again = run(Config(**QUICK, seed=(3,), teacher_checkpoint=teacher, out=str(tmp_path / "again")))
    one, other = (
        checkpoint.load_model(folder / "model.safetensors", (8, 8, 1), 10)[1].state_dict()
        for folder in (finished / "seed-3", finished / "seed-4")
    )
    repeated = checkpoint.load_model(
        tmp_path / "again" / "seed-3" / "model.safetensors", (8, 8, 1), 10
    )[1].state_dict()
    assert all(torch.equal(one[key], repeated[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in one)
    assert again["runs"][0]["seed"] == 3


def test_fused_and_reference_losses_train_alike(finished, tmp_path):
    teacher = str(finished / "teacher" / "model.safetensors")
    losses = []
    for backend in ("auto", "reference"):
        out = tmp_path / backend
        config = Config(
            **QUICK, teacher_checkpoint=teacher, backend=backend, precision="32-true", out=str(out)
        )
        run(config)
        log = (out / "seed-0" / "log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["train"]["kd"] for line in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_other_precisions_train(finished, tmp_path, precision):
    teacher = str(finished / "teacher" / "model.safetensors")
    out = str(tmp_path / "x")
    config = Config(**QUICK, teacher_checkpoint=teacher, precision=precision, seed=(3,), out=out)
    test = run(config)["runs"][0]["test"]
    full = json.loads((finished / "results.json").read_text())["runs"][0]["test"]
    assert test["kl_to_teacher"] == pytest.approx(full["kl_to_teacher"], rel=0.2)


def test_training_learns(tmp_path):
    out = str(tmp_path / "ce")
    results = run(Config(method="ce", student="mlp64", epochs=15, augment="none", out=out))
    assert results["summary"]["test.accuracy"]["mean"] > 0.9


def test_a_diverging_run_stops_and_names_the_term(tmp_path):
    config = Config(
        **QUICK | {"student": "convnet4"}, method="ce", lr=1e30, out=str(tmp_path / "x")
    )
    with pytest.raises(DivergedError, match=r"ce, loss not finite in step \d+;"):
        run(config)
    assert not (tmp_path / "x").exists()  # the same folder will do for the next try


def test_a_run_that_diverges_later_keeps_what_it_has(tmp_path):
    config = Config(
        **QUICK, method="ce", lr=1e4, clip_norm=1e30, checkpoint_every=1, out=str(tmp_path / "x")
    )
    with pytest.raises(DivergedError, match="what was checkpointed before is kept"):
        run(config)
    assert (tmp_path / "x" / "seed-0" / "checkpoint.pt").exists()
    with pytest.raises(InputError, match="not empty; give another folder, or --resume"):
        run(config)


@pytest.mark.parametrize("terminal", [False, True])
def test_without_a_terminal_every_epoch_is_a_line(tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setattr(report, "drawing", lambda: terminal)
    run(Config(**QUICK, method="ce", out=str(tmp_path / "x")))
    shown = capsys.readouterr().out
    assert "digits: 1,797 images of 8x8 pixels in 10 classes (" in shown
    lines = [line for line in shown.splitlines() if ": epoch" in line]
    if terminal:
        assert not lines
        return
    assert not set("\r\x1b") & set(shown)
    assert [line.partition(", loss ")[0] for line in lines] == [
        "ce mlp8 seed 0: epoch 1/2",
        "ce mlp8 seed 0: epoch 2/2",
    ]


def test_a_finished_run_is_not_overwritten(finished, capsys):
    before = (finished / "results.json").stat().st_mtime_ns
    assert main(["--method", "ce", "--out", str(finished)]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main(["--method", "ce", "--out", str(finished), "--resume"]) == 1
    assert "method was kd, is ce" in capsys.readouterr().err
    assert (finished / "results.json").stat().st_mtime_ns == before


def test_a_teacher_that_does_not_fit_is_named(finished, tmp_path):
    path = finished / "teacher" / "model.safetensors"
    with pytest.raises(InputError, match=r"trained on .*\(8, 8, 1\) of 10 classes.*of 100"):
        checkpoint.load_model(path, (8, 8, 1), 100)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"damaged\.safetensors: not a readable safetensors file"):
        checkpoint.load_model(damaged, (8, 8, 1), 10)


def test_a_backend_that_cannot_run_is_refused_before_training(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InputError, match="--backend cuda: cannot run here"):
        run(Config(data="digits", method="ce", backend="cuda", accelerator="cpu", out=str(out)))
    assert not out.exists()
