# SPDX-License-Identifier: Apache-2.0
"""The rowwise family's losses beside the plain divergences, by the CUDA kernels in the simulator.

Each goes through its public function, whose operator is the simulator's, and is compared with the
reference in fp64: the value, and every gradient that may be asked for.
"""

from __future__ import annotations

import functools

import pytest
import torch
from simulated_rowwise_calls import DTYPES, operators
from test_cuda_rowwise import INF, logits, module  # noqa: F401  (a fixture)

from kdkernels import backends, functional, ops
from kdkernels.divergences import DIVERGENCES, KINDS, Choices, Numbers

TARGETS = {
    "dkd": functools.partial(functional.dkd_loss, ce_weight=1.0),
    "nkd": functools.partial(functional.nkd_loss, temperature=2.0, ce_weight=0.5),
    "ats": functools.partial(functional.ats_loss, temperature=1.5),
    "wsld": functools.partial(functional.wsld_loss, temperature=2.0, ce_weight=1.0),
}
MEMBERS = TARGETS | {
    "smoothed": functools.partial(functional.dkd_loss, ce_weight=0.5, label_smoothing=0.1),
    "kd": functional.kd_loss,
    "standardized": functools.partial(functional.dkd_loss, standardize=True, ce_weight=1.0),
    "window": functools.partial(
        functional.kd_loss, class_range=(7, 45), kd_weight=1.0, ce_weight=0.5
    ),
    "standardized_window": functools.partial(
        functional.kd_loss, class_range=(7, 45), standardize=True, kd_weight=1.0, ce_weight=0.5
    ),
    "nkd_window": functools.partial(functional.nkd_loss, class_range=(2, 49), ce_weight=1.0),
}
PLACES = {"warp": 50, "block": 75, "cluster": 150}
LABELS = torch.tensor([7, 44, 8, 30, 17])
IGNORED = torch.tensor([7, 44, -100, 30, 17])


@pytest.fixture
def plans(module, monkeypatch):  # noqa: F811
    """How the calls of backend "cpu" were laid out by the simulated GPU that has them."""
    if not backends.verdict("rowwise", "cpu", "cpu").ok:
        pytest.skip("the operators of the backward are not compiled")
    module.set_device(90, 2, 8192)
    done = []
    monkeypatch.setattr(ops.rowwise, "_compiled", operators(module, done))
    return done


def per_row(rows=5):
    """Temperatures and weights, which may have a gradient."""
    return {
        "row_weight": torch.linspace(0.5, 2, rows),
        "temperature": torch.linspace(1, 3, rows),
        "teacher_temperature": torch.linspace(2, 1, rows),
    }


def leaves(inputs, wanted, dtype=None):
    return {
        name: x if not x.is_floating_point() else x.to(dtype or x.dtype, copy=True).requires_grad_(
            name in wanted
        )
        for name, x in inputs.items()
    }  # fmt: skip


def check(loss, inputs, wanted=("student",), tolerance=4e-6, **options):
    """Value and gradients against the reference."""
    ours, exact = leaves(inputs, wanted), leaves(inputs, wanted, torch.float64)
    value = loss(**ours, **options, backend="cpu")
    oracle = loss(**exact, **options, backend="reference")
    torch.testing.assert_close(value.double(), oracle, rtol=4e-6, atol=1e-9)
    upstream = torch.full_like(value, 0.5)
    got = torch.autograd.grad(value, [ours[name] for name in wanted], upstream)
    expected = torch.autograd.grad(oracle, [exact[name] for name in wanted], upstream.double())
    for name, x, y in zip(wanted, got, expected, strict=True):
        finite = torch.isfinite(y)
        assert (torch.isfinite(x) == finite).all(), name
        limit = torch.finfo(x.dtype).eps + tolerance
        assert (x.double() - y)[finite].norm() <= limit * y[finite].norm() + 1e-9, name
    return value, got


def inputs_of(classes, dtype="fp32", labels=LABELS, **options):
    student, teacher = logits(5, classes, DTYPES[dtype], **options)
    return {"student": student, "teacher": teacher, "labels": labels}


ALL = ("student", "teacher", "row_weight", "temperature", "teacher_temperature")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "fp64"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", TARGETS)
def test_student_gradient(plans, name, place, dtype):
    check(TARGETS[name], inputs_of(PLACES[place], dtype, IGNORED, skip=3))
    assert plans[0]["one_warp"] == (place == "warp")
    assert (plans[0]["slots"] > 0) == (place == "cluster" and dtype != "fp64")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MEMBERS)
def test_every_gradient(plans, name, place):
    for dtype in ("fp32", "fp16") if place == "cluster" else ("fp32", "fp64"):
        inputs = inputs_of(PLACES[place], dtype)
        check(MEMBERS[name], inputs | per_row(), ALL)
        check(MEMBERS[name], inputs | {"labels": IGNORED}, ("student", "teacher"))
        check(MEMBERS[name], inputs, ("teacher",), reduction="none")


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_every_divergence(plans, kind, standardize):
    loss = functools.partial(functional.divergence, kind=kind, standardize=standardize)
    inputs = inputs_of(150) | per_row()
    del inputs["labels"]
    check(loss, inputs, ALL)
    check(loss, {"student": inputs["student"] / 2, "teacher": inputs["teacher"].bfloat16() / 2})


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", MEMBERS)
def test_rows_that_fp32_does_not_hold(plans, name, place):
    inputs = inputs_of(PLACES[place])
    student, teacher = inputs["student"], inputs["teacher"]
    student[0, 10:13] = teacher[0, 10:13] = -INF
    teacher[1, 20] = -INF
    student[2] *= 50
    teacher[4, 17] = -INF  # a target
    check(MEMBERS[name], inputs, reduction="none")
    check(MEMBERS[name], inputs, ("student", "teacher"))
    if name != "standardized_window":  # whose deviation brings the row of large logits back
        assert any(plan["inexact"] for plan in plans)


@pytest.mark.parametrize("classes", [50, 150])
@pytest.mark.parametrize("name", ["dkd", "nkd"])
def test_parts(plans, name, classes):
    inputs = inputs_of(classes)
    exact = leaves(inputs, ("student",), torch.float64)
    oracle = TARGETS[name](**exact, return_parts=True, backend="reference")
    (expected,) = torch.autograd.grad(oracle.loss, exact["student"])
    ours = leaves(inputs, ("student",))
    for wanted in (ours, inputs):  # with its gradient and without
        parts = TARGETS[name](**wanted, return_parts=True, backend="cpu")
        for part, other in zip(parts, oracle, strict=True):
            torch.testing.assert_close(part.double(), other, rtol=4e-6, atol=1e-9)
        if wanted is ours:
            (grad,) = torch.autograd.grad(parts.loss, ours["student"])
            torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("classes", [50, 150])
@pytest.mark.parametrize("name", TARGETS)
def test_what_else_a_call_may_be(plans, name, classes):
    inputs = inputs_of(classes)
    check(TARGETS[name], inputs | {"labels": torch.softmax(torch.randn(5, classes), -1)})
    mask = {"mask": torch.tensor([True, False, True, False, True])}
    *_, (grad, _) = check(TARGETS[name], inputs | mask, ("student", "teacher"), reduction="sum")
    assert (grad[~mask["mask"]] == 0).all()
    strided = {x: inputs[x].T.contiguous().T for x in ("student", "teacher")}
    check(TARGETS[name], inputs | strided, ("student", "teacher"))
    bad = inputs | {"labels": torch.tensor([7, classes, -7, 30, 17])}
    value = TARGETS[name](**leaves(bad, ("student",)), reduction="none", backend="cpu")
    assert torch.isnan(value).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", MEMBERS)
def test_inplace(plans, name, dtype):
    """The student's logits become the gradient that another call writes beside them."""
    inputs = inputs_of(150, dtype)
    grads = []
    for inplace in (False, True):
        leaf = inputs["student"].clone().requires_grad_()
        student = leaf * 1
        value = MEMBERS[name](student, inputs["teacher"], LABELS, inplace=inplace, backend="cpu")
        grads += torch.autograd.grad(value, leaf)
    assert torch.equal(*grads)


def test_narrow_teacher(plans):
    inputs = inputs_of(150)
    inputs["teacher"] = inputs["teacher"][:, :90].contiguous()
    loss = functools.partial(functional.kd_loss, class_range=(7, 97), kd_weight=1.0, ce_weight=0.5)
    check(loss, inputs | per_row(), ALL)


def test_same_bits_in_any_order(module, plans, monkeypatch):  # noqa: F811
    results = []
    for seed in range(3):
        monkeypatch.setattr(ops.rowwise, "_compiled", operators(module, plans, seed))
        results.append(check(MEMBERS["standardized"], inputs_of(150, "bf16") | per_row(), ALL))
    for value, grads in results[1:]:
        assert torch.equal(value, results[0][0])
        assert all(map(torch.equal, grads, results[0][1]))


def test_no_loss_has_this(module):  # noqa: F811
    rowwise, _ = operators(module, [])
    student, teacher = logits(5, 50)
    choices = Choices(kind=KINDS.index("js"), target=1)
    with pytest.raises(RuntimeError, match="no loss has this target"):
        rowwise(student, teacher, Numbers(), choices, 0, LABELS)
