# SPDX-License-Identifier: Apache-2.0
"""What each training method computes, how methods compose, and what is tapped of networks."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from kdkernels import functional as KF
from kdkernels.train import Config, InputError, checkpoint, loop, run
from kdkernels.train.data import Batch
from kdkernels.train.methods import Output, Run
from kdkernels.train.options import make_method
from kdkernels.train.taps import Tapped

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def step():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 5, 4, generator=generator, dtype=torch.double)
    batch = Batch(torch.empty(5, 1, 8, 8), torch.tensor([0, 1, 2, 3, 1]))
    return batch, Output(student.requires_grad_()), [Output(teacher)]


def ready(name, step, **options):
    """A method that has seen the shapes of ``step``, in fp64."""
    torch.manual_seed(0)
    method = make_method(name, "reference", options)
    method.begin(Run(data=None, steps=100, steps_per_epoch=10))
    method.setup(step[1], step[2])
    return method.double()


def total(method, step, number=0):
    batch, student, teachers = step
    terms = method.losses(batch, student, method.teach(batch, teachers))
    weights = method.weights(number)
    return sum(weights.get(name, 1.0) * term for name, term in terms.items())


def test_dkd_is_its_formula_and_warms_up(step):
    batch, student, (teacher,) = step
    method = ready("dkd", step, warmup=4)
    ce = F.cross_entropy(student.logits, batch.labels)
    dkd = KF.dkd_loss(
        student.logits, teacher.logits, batch.labels, temperature=4.0, backend="reference"
    )
    for number, share in ((0, 0.25), (9, 0.25), (10, 0.5), (30, 1.0), (99, 1.0)):
        torch.testing.assert_close(total(method, step, number), ce + share * dkd)


@pytest.mark.parametrize("tokens", ["class", "batch"])
def test_skd_starts_as_kd_and_teaches_its_simplifier(step, tokens):
    batch, student, (teacher,) = step
    method = ready("skd", step, tokens=tokens)
    loss = total(method, step)
    kd = KF.kd_loss(
        student.logits, teacher.logits, batch.labels, temperature=4.0, ce_weight=1.0,
        kd_weight=1.0, backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(loss, kd)
    loss.backward()
    assert student.logits.grad.any() and method.simplifier.output_weight.grad.any()
    (group,) = method.parameter_groups()
    assert group["weight_decay"] == 0
    assert {id(p) for p in group["params"]} == {id(p) for p in method.parameters()}


@pytest.mark.parametrize("tokens", ["class", "batch"])
def test_skds_target_stays_the_teachers_at_any_rate(tokens):
    """Against a student that answers at random, which has a simplifier of its own lose it."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 64, 20, dtype=torch.double) * torch.tensor([[[1]], [[4]]])
    batch = Batch(torch.empty(64, 1, 8, 8), torch.arange(64) % 20)
    step = batch, Output(student), [Output(teacher)]
    agreement = {}
    for keep, lr in ((0.0, 0.03), (4.0, 0.003), (4.0, 0.03)):
        method = ready("skd", step, tokens=tokens, keep=keep)
        optimizer = torch.optim.SGD(method.parameters(), lr, momentum=0.9)
        for _ in range(400):
            optimizer.zero_grad()
            total(method, step).backward()
            optimizer.step()
        target = method.simplifier(teacher)
        agreement[keep, lr] = (target.argmax(1) == teacher.argmax(1)).double().mean().item()
    print(agreement)
    assert agreement[0.0, 0.03] < 0.7
    assert agreement[4.0, 0.003] >= 0.9 and agreement[4.0, 0.03] >= 0.9


def test_composed_methods_count_the_cross_entropy_once(step):
    batch, student, (teacher,) = step
    ce = F.cross_entropy(student.logits, batch.labels)
    kd = KF.kl_div(student.logits, teacher.logits, temperature=4.0, backend="reference")
    dkd = KF.dkd_loss(
        student.logits, teacher.logits, batch.labels, temperature=4.0, backend="reference"
    )
    for name, ce_weight in (("kd+dkd", 0.1), ("dkd+kd", 1.0)):
        method = ready(name, step, warmup=1)
        torch.testing.assert_close(total(method, step), ce_weight * ce + 0.9 * kd + dkd)


def test_skd_simplifies_for_every_method_it_is_composed_with(step):
    batch, student, teachers = step
    method = ready("skd+dkd", step, warmup=1)
    with torch.no_grad():
        method.methods["skd"].simplifier.output_weight.normal_()
    (taught,) = method.teach(batch, teachers)
    assert not torch.allclose(taught.logits, teachers[0].logits)
    terms = method.losses(batch, student, [taught])
    expected = KF.dkd_loss(
        student.logits, taught.logits, batch.labels, temperature=4.0, backend="reference"
    )
    torch.testing.assert_close(terms["dkd.dkd"], expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "kd+none",
            {},
            "--method: expected one of at, .*, or several joined by .*, got 'none'",
        ),
        ("kd+kd", {}, "expected each method once"),
        ("ce+dkd", {"tokens": "class"}, "--tokens: not an option of --method ce.dkd"),
        ("dkd", {"warmup": 0}, "--warmup: expected a number above 0, got 0"),
        ("skd", {"dim": -1}, "--dim: expected a number above 0, got -1"),
    ],
)
def test_bad_methods_are_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        make_method(name, "reference", options)


class Stop(Exception):
    pass


class Network(nn.Module):
    """A convolution whose output the next module overwrites, and one that a function does."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(3, 3, 3)

    def forward(self, images):
        x = self.act(self.first(images))
        return F.relu_(self.second(x)).mean((2, 3))


def test_tapped_features_are_what_the_module_gave_out():
    torch.manual_seed(0)
    network, images = Network(), torch.randn(2, 1, 8, 8)
    expected, logits = network.first(images), network(images)
    out = Tapped(network, ["first", "act"])(images)
    assert torch.equal(out.features["first"], expected)
    assert torch.equal(out.features["act"], expected.relu())
    assert torch.equal(out.logits, logits)
    out.features["first"].sum().backward()
    assert network.first.weight.grad.any()


def test_overwritten_taps_are_refused():
    with pytest.raises(InputError, match="'second': its output is overwritten in place"):
        Tapped(Network(), ["second"])(torch.randn(2, 1, 8, 8))


def test_missing_taps_name_the_nearest_modules():
    with pytest.raises(InputError, match=r"student: no module 'frist'; the nearest are first"):
        Tapped(Network(), ["frist"], what="student")


def test_taps_go_with_the_object_that_set_them():
    network = Network()
    tapped = Tapped(network, ["first", "second:input"])
    assert any(module._forward_pre_hooks for module in network.modules())
    del tapped
    for module in network.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks


@pytest.mark.parametrize("tokens", ["class", "batch"])
def test_skd_run_reports_its_target_and_exports_the_student_alone(tmp_path, tokens):
    """The mechanism: a softer target than the teacher, still the teacher's, nearer the student."""
    config = Config(
        method="skd", student="mlp8", teacher="mlp64", epochs=12, accelerator="cpu",
        out=str(tmp_path / "run"),
    )  # fmt: skip
    run(config, {"tokens": tokens})
    lines = (tmp_path / "run/seed-0/log.jsonl").read_text().splitlines()
    val = json.loads(lines[-1])["val"]
    assert val["target_entropy"] > val["teacher_entropy"]
    assert val["target_agreement"] >= 0.9
    assert val["kl_to_target"] < val["kl_to_softened_teacher"]
    with safe_open(tmp_path / "run/seed-0/model.safetensors", framework="pt") as file:
        assert not [key for key in file.keys() if "simplifier" in key or "network" in key]


@pytest.mark.parametrize(("method", "options"), [("skd+dkd", {}), ("crd", {"negatives": 64})])
def test_runs_with_a_state_of_their_own_resume_bit_equal(tmp_path, method, options):
    config = {
        "method": method, "student": "mlp8", "teacher": "mlp16", "teacher_epochs": 2,
        "epochs": 4, "accelerator": "cpu",
    }  # fmt: skip
    whole = run(Config(**config, out=str(tmp_path / "whole")), options)
    # Stopped inside an epoch, then taken up by a run that goes on to the end.
    save, saves = loop.save, []

    def save_and_stop(*arguments):
        save(*arguments)
        saves.append(1)
        if len(saves) == 5:
            raise Stop

    stopped = Config(**config, checkpoint_every=10, out=str(tmp_path / "again"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save", save_and_stop)
        with pytest.raises(Stop):
            run(stopped, options)
    resumed = Config(**config, checkpoint_every=10, out=str(tmp_path / "again"), resume=True)
    again = run(resumed, options)
    assert again["runs"][0]["val"] == whole["runs"][0]["val"]
    assert again["runs"][0]["test"] == whole["runs"][0]["test"]
    states = [
        checkpoint.load_state(tmp_path / out / "seed-0/checkpoint.pt") for out in ("whole", "again")
    ]
    for part in ("student", "method", "optimizer", "rng"):
        torch.testing.assert_close(*(state[part] for state in states), rtol=0, atol=0)
