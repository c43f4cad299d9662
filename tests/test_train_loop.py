# SPDX-License-Identifier: Apache-2.0
"""What happens between batch and weights: micro-batches, clipping, schedules, averages, scaling."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from torch import nn

from kdkernels.train import Config, DivergedError, InputError, checkpoint, loop, run
from kdkernels.train.data import load_data
from kdkernels.train.devices import native_precision
from kdkernels.train.methods.ce import CE
from kdkernels.train.models import build_model
from kdkernels.train.optimizer import lr_factor
from kdkernels.train.taps import Tapped

QUICK = {"method": "ce", "student": "mlp8", "accelerator": "cpu"}

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(out, **settings):
    """The weights that a run exports."""
    run(Config(**QUICK | settings, out=str(out)))
    path = out / "seed-0" / "model.safetensors"
    return checkpoint.load_model(path, (8, 8, 1), 10)[1].state_dict()


def initial():
    torch.manual_seed(0)
    return build_model("mlp8", (8, 8, 1), 10).state_dict()


def distance(one, other):
    return torch.cat([(one[name] - other[name]).flatten() for name in one]).norm().item()


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_micro_batches_make_the_same_step(tmp_path, mixup):
    settings = {"precision": "64-true", "max_steps": 5, "mixup": mixup}
    whole = trained(tmp_path / "whole", **settings)
    parts = trained(tmp_path / "parts", **settings, accumulate=4)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)  # exported in float32
    records = [
        checkpoint.read_lines(tmp_path / name / "seed-0" / "log.jsonl")[0]
        for name in ("whole", "parts")
    ]
    assert records[0]["train"]["ce"] == pytest.approx(records[1]["train"]["ce"], rel=1e-6)


def test_batches_that_cannot_be_cut_are_refused(tmp_path):
    with pytest.raises(InputError, match="--batch-size 64: expected a multiple of 3"):
        trained(tmp_path / "x", accumulate=3)


def test_gradients_are_clipped_to_the_norm(tmp_path):
    settings = {"max_steps": 1, "weight_decay": 0.0, "lr": 0.5, "precision": "32-true"}
    moved = {
        norm: distance(trained(tmp_path / str(norm), **settings, clip_norm=norm), initial())
        for norm in (0.0, 0.01, 1e6)
    }
    # The first step of Nesterov's momentum 0.9 goes 1.9 times as far as the gradient.
    assert moved[0.01] == pytest.approx(0.5 * 1.9 * 0.01, rel=1e-3)
    assert moved[1e6] == moved[0.0] > 10 * moved[0.01]


def test_the_average_of_weights_is_exported_and_evaluated(tmp_path):
    settings = {"precision": "32-true", "lr": 0.5}
    # The learning rate of a first step is the same whatever follows.
    first = trained(tmp_path / "first", **settings, max_steps=1)
    second = trained(tmp_path / "second", **settings, max_steps=2)
    average = trained(tmp_path / "average", **settings, max_steps=2, ema=0.999)
    start = initial()
    for name, value in average.items():
        # Early decays are 1/10 and 2/11.
        expected = 2 / 11 * (0.1 * start[name] + 0.9 * first[name]) + 9 / 11 * second[name]
        torch.testing.assert_close(value, expected)
    state = checkpoint.load_state(tmp_path / "average" / "seed-0" / "checkpoint.pt")
    torch.testing.assert_close(state["average"], average)
    torch.testing.assert_close(state["student"], second)


@pytest.fixture
def traced(monkeypatch):
    """Compiled networks run their captured graphs as they are, without waiting for a compiler."""
    monkeypatch.setattr(Tapped, "compile", partialmethod(nn.Module.compile, backend="eager"))
    torch._dynamo.reset()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def test_compiled_networks_train_resume_and_average_alike(tmp_path, traced, monkeypatch):
    teacher = tmp_path / "teacher" / "seed-0" / "model.safetensors"
    trained(tmp_path / "teacher", student="convnet4", max_steps=2)
    settings = {
        "method": "fitnet+kd", "student": "convnet4", "teacher_checkpoint": str(teacher),
        "precision": "32-true", "ema": 0.9, "epochs": 2, "max_steps": 4, "checkpoint_every": 2,
    }  # fmt: skip
    plain = trained(tmp_path / "plain", **settings)
    traced.clear()
    save, saves = loop.save, []

    def stop_after_the_first(*arguments):
        save(*arguments)
        saves.append(1)
        if len(saves) == 1:
            raise KeyboardInterrupt

    settings |= {"compile": True}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save", stop_after_the_first)
        trained(tmp_path / "compiled", **settings)
    assert traced["stats"]["unique_graphs"] >= 1 and not traced["graph_break"]
    compiled = trained(tmp_path / "compiled", **settings, resume=True)
    torch.testing.assert_close(compiled, plain, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{"method": "education"}, {"strategy": "fsdp"}])
def test_what_is_not_compiled_is_refused(settings):
    with pytest.raises(InputError, match="--compile: not with"):
        Config(**QUICK | settings, compile=True)


@pytest.mark.slow
def test_networks_are_compiled(tmp_path):
    settings = {"student": "convnet4", "precision": "64-true", "max_steps": 4}
    compiled = trained(tmp_path / "compiled", **settings, compile=True)
    plain = trained(tmp_path / "plain", **settings)
    torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-7)  # exported in float32


def test_one_cycle_rises_and_falls():
    factors = [lr_factor("onecycle", step / 100) for step in range(101)]
    assert factors[0] == pytest.approx(1 / 25) and factors[30] == 1.0
    assert factors[100] == pytest.approx(1 / 25e4)
    assert factors[:31] == sorted(factors[:31])
    assert factors[30:] == sorted(factors[30:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "multistep"])
def test_other_schedules_start_at_the_learning_rate_and_fall(schedule):
    factors = [lr_factor(schedule, step / 80) for step in range(80)]
    assert factors[0] == 1.0 and factors == sorted(factors, reverse=True)
    if schedule == "multistep":
        assert [factors.index(f) for f in sorted(set(factors), reverse=True)] == [0, 50, 60, 70]


def test_adamw_trains(tmp_path):
    trained(tmp_path / "x", optimizer="adamw", lr=0.01, epochs=8, schedule="onecycle")
    state = checkpoint.load_state(tmp_path / "x" / "seed-0" / "checkpoint.pt")
    assert "exp_avg_sq" in state["optimizer"]["state"][0]
    assert checkpoint.read_json(tmp_path / "x" / "results.json")["runs"][0]["val"]["best"] > 0.5


@pytest.mark.parametrize(("has", "precision"), [("avx512_bf16", "bf16-mixed"), ("avx2", "32-true")])
def test_the_precision_is_that_of_the_hardware_and_said(
    tmp_path, monkeypatch, capsys, has, precision
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True}, raising=False)
    assert native_precision(torch.device("cpu")) == precision
    results = run(Config(**QUICK, max_steps=1, out=str(tmp_path / "x")))
    assert results["config"]["precision"] == precision
    assert f"{precision} on 1 x cpu" in " ".join(capsys.readouterr().out.split())


def test_float16_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(InputError, match="--precision 16-mixed: float16 needs a GPU"):
        run(Config(**QUICK, precision="16-mixed", out=str(tmp_path / "x")))


class Dtypes(CE):
    """Notes in what the losses are computed."""

    needs_teacher = True

    def losses(self, batch, student_out, teacher_out):
        self.seen = {x.dtype for x in (student_out.logits, teacher_out[0].logits, batch.labels)}
        self.teacher = teacher_out[0].logits
        return super().losses(batch, student_out, teacher_out)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.float32), ("64-true", torch.float64)]
)
def test_losses_are_computed_in_float32_or_better(tmp_path, digits, precision, dtype):
    method = Dtypes()
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    fit(method, digits, tmp_path, fabric, teachers=[biased()], max_steps=1, mixup=1.0)
    assert method.seen == {dtype}
    # 1 + 1/4096 is no number of bfloat16.
    assert torch.equal(method.teacher, torch.full_like(method.teacher, 1 + 1 / 4096))


def biased():
    """A teacher that gives every image the same logits, at any precision of its layers."""

    class Constant(torch.nn.Module):
        def forward(self, images):
            return torch.full((len(images), 10), 1 + 1 / 4096)

    return Constant()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return load_data(
        "digits", val_fraction=0.1, split_seed=0, image_size=None,
        cache_dir=tmp_path_factory.mktemp("cache"),
    )  # fmt: skip


def fit(method, data, out, fabric=None, teachers=(), **settings):
    out.mkdir(exist_ok=True)
    torch.manual_seed(0)
    student = build_model("mlp8", (8, 8, 1), 10)
    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    config = Config(**QUICK | settings)
    return loop.fit(fabric, method, student, teachers, data, config, seed=0, out=out)


def test_gradients_of_float16_are_scaled(tmp_path, digits):
    """As far as a CPU can show: the scaler works with micro-batches and clipping, and is kept."""

    def fabric():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        return Fabric(
            accelerator="cpu", devices=1, plugins=[MixedPrecision("16-mixed", "cpu", scaler)]
        )

    settings = {"accumulate": 2, "clip_norm": 1.0, "epochs": 5}
    results = fit(CE(), digits, tmp_path, fabric(), **settings)
    kept = checkpoint.load_state(tmp_path / "checkpoint.pt")["precision"]
    assert kept["scale"] < 2.0**24, "no step overflowed"
    assert results["val"]["best"] > 0.3


class Broken(CE):
    """A term that stops being a number at its ``call``-th call."""

    def __init__(self, call):
        super().__init__()
        self.left = call

    def losses(self, batch, student_out, teacher_out):
        self.left -= 1
        terms = super().losses(batch, student_out, teacher_out)
        return terms | {"extra": terms["ce"].detach() * (float("nan") if self.left == 0 else 0)}


def test_a_broken_term_is_named_with_its_step_soon(tmp_path, digits, monkeypatch):
    monkeypatch.setattr(loop, "READ_EVERY", 10)
    settings = {"batch_size": 4, "checkpoint_every": 25, "epochs": 1}
    method = Broken(33)
    with pytest.raises(DivergedError, match=r"^extra, loss not finite in step 33;"):
        fit(method, digits, tmp_path, **settings)
    assert method.left == 33 - 40, "it went on to the next reading, and no further"
    state = checkpoint.load_state(tmp_path / "checkpoint.pt")
    assert state["state"]["step"] == 25
    assert all(value.isfinite().all() for value in state["student"].values())


class BrokenGradient(CE):
    """A loss of 0 whose gradient is no number from a call on, counted from 1."""

    def __init__(self, since):
        super().__init__()
        self.left = since

    def losses(self, batch, student_out, teacher_out):
        self.left -= 1
        zero = 0 * student_out.logits
        return {"zero": (zero.sqrt() if self.left <= 0 else zero).sum()}


@pytest.mark.parametrize(
    ("step", "message"),
    [(1, "gradient norm of zero not finite in step 1;"), (2, "weights not .* step 2: .*weight")],
)
def test_broken_weights_are_not_checkpointed(tmp_path, digits, step, message):
    with pytest.raises(DivergedError, match=message):
        fit(BrokenGradient(step), digits, tmp_path, max_steps=step)
    assert not list(tmp_path.iterdir())
