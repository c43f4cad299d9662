# SPDX-License-Identifier: Apache-2.0
"""The drop-ins against what they replace: the package itself where it is installed (torch always
is), and otherwise, and besides, its formula written out. Golden vectors of mdistiller, RepDistiller
and TRL go through the drop-ins in ``test_golden.py``.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdkernels import dropin
from kdkernels.testing import LOSSES

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch's own
SHAPES = [(7, 30), (3, 4, 30)]


@pytest.fixture(autouse=True)
def use(backend, device, prefer):
    prefer(backend)


def logits(*shape, device="cpu"):
    return (
        LOSSES["kl_div"]
        .inputs(*shape, dtype=torch.float64, device=device, requires_grad=True)
        .values()
    )


def assert_same(ours, theirs, *inputs):
    """Values, and gradients to the inputs, to rounding in float64."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    actual, expected = (torch.autograd.grad(x, inputs, retain_graph=True) for x in (ours, theirs))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def parameters(function) -> list[tuple]:
    signature = inspect.signature(function).parameters.values()
    return [(p.name, p.default, p.kind) for p in signature]


def installed_source(package: str, path: str) -> str:
    """A file of an installed package, read without importing what that would import."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed; its formula is tested beside this")
    return (Path(spec.submodule_search_locations[0]) / path).read_text()


def function_in(source: str, name: str, **names):
    """One function of a module's source, whatever class it is in."""
    node = next(
        n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef) and n.name == name
    )
    node.decorator_list, node.returns = [], None
    for argument in node.args.args:
        argument.annotation = None
    names |= {"torch": torch, "F": F}
    exec(compile(ast.Module([node], []), name, "exec"), names)
    return names[name]


class TestTorch:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
    @pytest.mark.parametrize("log_target", [False, True])
    def test_equals(self, shape, reduction, log_target, backend, device):
        student, teacher = logits(*shape, device=device)
        target = F.log_softmax(teacher, -1) if log_target else F.softmax(teacher, -1)
        options = {"reduction": reduction, "log_target": log_target}
        theirs = F.kl_div(F.log_softmax(student, -1), target, **options)
        assert_same(
            dropin.kl_div_from_logits(student, teacher, **options), theirs, student, teacher
        )
        module = dropin.KLDivFromLogits(**options)
        assert isinstance(module, nn.KLDivLoss)
        assert_same(module(student, teacher), theirs, student, teacher)

    def test_default_is_the_mean_over_classes_too(self, backend, device):
        student, teacher = logits(7, 30, device=device)
        theirs = F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1))
        assert_same(dropin.kl_div_from_logits(student, teacher), theirs, student, teacher)
        assert_same(dropin.KLDivFromLogits()(student, teacher), theirs, student, teacher)

    @pytest.mark.filterwarnings("ignore:size_average and reduce")
    def test_deprecated_arguments(self, backend, device):
        student, teacher = logits(7, 30, device=device)
        theirs = F.kl_div(F.log_softmax(student, -1), F.softmax(teacher, -1), size_average=False)
        assert_same(dropin.kl_div_from_logits(student, teacher, False), theirs, student, teacher)

    def test_signatures(self, backend, device):
        assert parameters(dropin.kl_div_from_logits) == parameters(F.kl_div)
        assert parameters(dropin.KLDivFromLogits) == parameters(nn.KLDivLoss)

    def test_refuses_one_value_per_class(self, backend, device):
        student, teacher = logits(7, 30, device=device)
        with pytest.raises(NotImplementedError, match=r"^KLDivFromLogits: reduction must be"):
            dropin.kl_div_from_logits(student, teacher, reduction="none")
        with pytest.raises(ValueError, match="must be one of none, mean, batchmean, sum"):
            dropin.kl_div_from_logits(student, teacher, reduction="average")


class TestSuites:
    """RepDistiller and mdistiller."""

    @pytest.mark.parametrize("temperature", [1.0, 4.0])
    def test_equals(self, temperature, backend, device):
        student, teacher = logits(7, 30, device=device)
        log_s, t = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
        theirs = F.kl_div(log_s, t, reduction="sum") * temperature**2 / student.shape[0]
        ours = dropin.DistillKL(temperature)(student, teacher)
        assert_same(ours, theirs, student, teacher)
        assert_same(dropin.kd_loss(student, teacher, temperature), ours, student, teacher)

    @pytest.mark.parametrize("name", ["dkd_loss", "nkd_loss", "dist_loss"])
    def test_equals_its_formula(self, name, backend, device):
        loss = LOSSES[name]
        if backend not in loss.backends(device):
            pytest.skip(f"no {backend} kernel")
        inputs = loss.inputs(7, 30, dtype=torch.float64, device=device)
        student, teacher = inputs["student"].requires_grad_(), inputs["teacher"]
        theirs = loss.eager(**inputs, **loss.hyper)
        if name == "dkd_loss":
            ours = dropin.dkd_loss(student, teacher, inputs["labels"], 1.0, 8.0, 4.0)
        elif name == "nkd_loss":
            ours = dropin.NKDLoss()(student, teacher, inputs["labels"])
            soft = F.one_hot(inputs["labels"], 30)
            assert torch.equal(dropin.NKDLoss()(student, teacher, soft), ours)
        else:
            hyper = loss.hyper
            ours = dropin.DIST(hyper.get("beta", 1.0), hyper.get("gamma", 1.0),
                               hyper["temperature"])(student, teacher)  # fmt: skip
        assert_same(ours, theirs, student)

    def test_standardized(self, backend, device):
        student, teacher = logits(7, 30, device=device)
        scored = [(x - x.mean(1, keepdim=True)) / (1e-7 + x.std(1, keepdim=True))
                  for x in (student, teacher)]  # fmt: skip
        labels = torch.arange(7, device=device)
        assert_same(
            dropin.kd_loss(student, teacher, 2.0, True), dropin.kd_loss(*scored, 2.0), student
        )
        ours = dropin.dkd_loss(student, teacher, labels, 9.0, 18.0, 2.0, logit_stand=True)
        assert_same(ours, dropin.dkd_loss(*scored, labels, 9.0, 18.0, 2.0), student)


def trl_formula(student, teacher, labels, beta, temperature, reduction, num_items):
    s, t = ((x / temperature).softmax(-1) for x in (student, teacher))
    m = (1 - beta) * s + beta * t
    if beta == 0:
        terms = t * (t.log() - s.log())
    elif beta == 1:
        terms = s * (s.log() - t.log())
    else:
        terms = beta * t * (t.log() - m.log()) + (1 - beta) * s * (s.log() - m.log())
    counts = terms.shape[0]
    if labels is not None:
        terms = terms[labels != -100]
        counts = terms.shape[0]
    if num_items is not None:
        return terms.sum() / num_items
    return {"batchmean": terms.sum() / counts, "sum": terms.sum(), "mean": terms.mean()}[reduction]


class TestTRL:
    @pytest.fixture(params=["formula", "package"])
    def theirs(self, request):
        if request.param == "formula":
            return trl_formula
        source = installed_source("trl", "experimental/gkd/gkd_trainer.py")
        return function_in(source, "generalized_jsd_loss")

    @pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
    @pytest.mark.parametrize("labelled", [False, True])
    @pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
    def test_equals(self, theirs, beta, labelled, reduction, backend, device):
        student, teacher = logits(3, 4, 30, device=device)
        labels = None
        if labelled:  # of a vocabulary larger than the logits': they only mask
            labels = torch.randint(100, (3, 4), device=device)
            labels[0, 1] = labels[2, :2] = -100
        for number in (None, 37, torch.tensor(37)):
            arguments = (student, teacher, labels, beta, 0.9, reduction, number)
            expected = theirs(*arguments)
            assert_same(dropin.generalized_jsd_loss(*arguments), expected, student, teacher)

    def test_signature(self, backend, device):
        source = installed_source("trl", "experimental/gkd/gkd_trainer.py")
        theirs = function_in(source, "generalized_jsd_loss")
        assert parameters(dropin.generalized_jsd_loss) == parameters(theirs)

    def test_all_masked_is_zero(self, backend, device):
        student, teacher = logits(3, 4, 30, device=device)
        labels = torch.full((3, 4), -100, device=device)
        assert dropin.generalized_jsd_loss(student, teacher, labels).item() == 0


# Liger's modules on CPU: its kernels in Triton's interpreter, in a process of their own. The
# interpreter passes `eps` as the float it is, which has no `.to`.
LIGER = """
import sys, torch
from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss
class Eps(float):
    def to(self, dtype): return self
cases, results = torch.load(sys.argv[1]), []
for kind, options, student, teacher, labels in cases:
    student.requires_grad_()
    if kind == "jsd":
        loss = LigerJSD(**options)(student.log_softmax(-1), teacher.log_softmax(-1), labels)
    else:
        to_target = torch.log_softmax if options.get("log_target") else torch.softmax
        loss = LigerKLDIVLoss(eps=Eps(1e-10), **options)(
            student.log_softmax(-1), to_target(teacher, -1))
    loss.backward()
    results.append((loss.detach(), student.grad))
torch.save(results, sys.argv[1])
"""
LIGER_CASES = [
    ("kl", {"reduction": "batchmean"}),
    ("kl", {"reduction": "mean", "log_target": True}),
    ("kl", {"reduction": "sum"}),
    ("kl", {}),
    ("jsd", {"beta": 0.0}),
    ("jsd", {"beta": 0.3, "ignore_index": 5}),
    ("jsd", {}),
    ("jsd", {"beta": 1.0}),
]


def liger_inputs():
    inputs = LOSSES["kl_div"].inputs(6, 40)
    labels = torch.tensor([1, 5, -100, 3, 5, 0])
    return inputs["student"], inputs["teacher"], labels


@pytest.fixture(scope="module")
def liger(tmp_path_factory):
    for package in ("liger_kernel", "triton"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed; the formula is tested beside this")
    file = tmp_path_factory.mktemp("liger") / "cases.pt"
    torch.save([(kind, options, *liger_inputs()) for kind, options in LIGER_CASES], file)
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", LIGER, file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Liger does not run here: {done.stderr.strip().splitlines()[-1]}")
    return torch.load(file)


class TestLiger:
    """Behind a log_softmax, where log-probabilities come from: values and gradients to the logits.

    Liger's gradient to the log-probabilities themselves, ``-p_t`` for the KL, lacks the softmax's
    projection, which the log_softmax's backward then applies; ours has it already.
    """

    def ours(self, kind, options, device):
        student, teacher, labels = (x.to(device) for x in liger_inputs())
        student.requires_grad_()
        log_s = student.log_softmax(-1)
        if kind == "jsd":
            loss = dropin.LigerJSD(**options)(log_s, teacher.log_softmax(-1), labels)
        else:
            target = teacher.log_softmax(-1)
            target = target if options.get("log_target") else target.exp()
            loss = dropin.LigerKLDIVLoss(**options)(log_s, target)
        return loss, student, teacher, labels

    @pytest.mark.parametrize(("kind", "options"), LIGER_CASES, ids=str)
    def test_equals_formula(self, kind, options, backend, device):
        loss, student, teacher, labels = self.ours(kind, options, device)
        again = student.detach().double().requires_grad_()
        log_s, log_t = again.log_softmax(-1), teacher.double().log_softmax(-1)
        if kind == "kl":
            reduction = options.get("reduction", "mean")
            theirs = F.kl_div(log_s, log_t, reduction=reduction, log_target=True)
        else:
            beta, counts = options.get("beta", 0.5), labels != options.get("ignore_index", -100)
            number = counts.sum()
            theirs = trl_formula(log_s[counts], log_t[counts], None, beta, 1.0, "sum", number)
        torch.testing.assert_close(loss, theirs.float(), rtol=1e-5, atol=1e-7)
        (a,) = torch.autograd.grad(loss, student)
        (b,) = torch.autograd.grad(theirs, again)
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-7)

    def test_equals_package(self, liger, backend, device):
        for (kind, options), (value, gradient) in zip(LIGER_CASES, liger, strict=True):
            loss, student, *_ = self.ours(kind, options, device)
            torch.testing.assert_close(loss.cpu(), value, rtol=1e-5, atol=1e-7)
            (ours,) = torch.autograd.grad(loss, student)
            torch.testing.assert_close(ours.cpu(), gradient, rtol=1e-4, atol=1e-6)

    def test_log_softmax_can_be_dropped(self, backend, device):
        student, teacher = logits(6, 30, device=device)
        for loss in (dropin.LigerJSD(0.3), dropin.LigerKLDIVLoss(log_target=True)):
            with_it = loss(student.log_softmax(-1), teacher.log_softmax(-1))
            assert_same(loss(student, teacher), with_it, student)

    def test_zero_probability_in_the_target(self, backend, device):
        student, teacher = logits(6, 30, device=device)
        probabilities = F.softmax(teacher.detach().masked_fill(teacher > 3, -torch.inf), -1)
        theirs = F.kl_div(F.log_softmax(student, -1), probabilities, reduction="batchmean")
        ours = dropin.LigerKLDIVLoss(reduction="batchmean")(
            F.log_softmax(student, -1), probabilities
        )
        assert_same(ours, theirs, student)


class Teacher:
    """timm's teacher wrapper, as far as the forward uses it."""

    def __init__(self, model):
        self.model = model

    def normalize_input(self, x, mean, std):
        return x

    def __call__(self, x, return_features=False):
        return self.model(x)


class TestTimm:
    @pytest.fixture
    def task(self, device):
        """What timm's task holds when its forward is called."""
        torch.manual_seed(0)
        teacher = nn.Linear(8, 10, device=device)
        return SimpleNamespace(
            trainable_module=nn.Linear(8, 10, device=device),
            teacher=Teacher(teacher),
            criterion=nn.CrossEntropyLoss(),
            student_mean=None,
            student_std=None,
            temperature=3.0,
            task_loss_weight=0.3,
            distill_loss_weight=0.7,
        )

    def check(self, task, expected, device):
        x, y = torch.randn(5, 8, device=device), torch.randint(10, (5,), device=device)
        ours, theirs = dropin._distillation_forward(task, x, y), expected(task, x, y)
        assert ours.keys() == theirs.keys()
        weight = task.trainable_module.weight
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6)
            if key != "output":
                a, b = (torch.autograd.grad(v[key], weight, retain_graph=True)[0]
                        for v in (ours, theirs))  # fmt: skip
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    def test_equals_formula(self, task, backend, device):
        def formula(task, x, y):
            output, temperature = task.trainable_module(x), task.temperature
            with torch.no_grad():
                teacher = task.teacher(x)
            task_loss = F.cross_entropy(output, y)
            log_s = F.log_softmax(output / temperature, -1)
            target = F.softmax(teacher / temperature, -1)
            kd_loss = F.kl_div(log_s, target, reduction="batchmean") * temperature**2
            loss = task.task_loss_weight * task_loss + task.distill_loss_weight * kd_loss
            return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": kd_loss}

        self.check(task, formula, device)

    def test_equals_package(self, task, backend, device):
        source = installed_source("timm", "task/distillation.py")
        tree = ast.parse(source)
        (body,) = (
            n for n in tree.body
            if isinstance(n, ast.ClassDef) and n.name == "LogitDistillationTask"
        )  # fmt: skip
        self.check(task, function_in(ast.unparse(body), "forward"), device)

    def test_subclasses_the_task(self, backend, device):
        try:
            from timm.task import LogitDistillationTask
        except (ImportError, RuntimeError) as error:
            with pytest.raises(type(error)):
                _ = dropin.LogitDistillationTask
            pytest.skip(f"timm does not import here: {error}")
        assert issubclass(dropin.LogitDistillationTask, LogitDistillationTask)
        assert parameters(dropin.LogitDistillationTask) == parameters(LogitDistillationTask)
