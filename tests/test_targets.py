# SPDX-License-Identifier: Apache-2.0
"""Losses that treat the target apart, standardised logits, class ranges."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kdkernels import functional as kd
from kdkernels import modules
from kdkernels.testing import LOSSES, assert_close_to_oracle, gradients, leaves, relative_errors

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TARGETED = ["dkd_loss", "nkd_loss", "ats_loss", "wsld_loss"]
targeted = pytest.mark.parametrize("name", TARGETED)
SIDES = ("student", "teacher")


def close(value, expected, rel=1e-12):
    torch.testing.assert_close(value, expected.to(value), rtol=rel, atol=1e-13)


def same_as_reference(loss, inputs, backend, **options):
    """Value and every gradient, in float64, non-finite ones included."""
    actual = loss(inputs, backend=backend, **options)
    expected = loss(inputs, backend="reference", **options)
    assert relative_errors(actual, expected)[0] <= 1e-10
    wanted = gradients(expected, inputs)
    for name, gradient in gradients(actual, inputs).items():
        assert relative_errors(gradient, wanted[name])[0] <= 1e-9, name


def test_kl_is_made_of_the_parts_of_dkd(backend, device):
    inputs = LOSSES["dkd_loss"].inputs(6, 20, dtype=torch.float64, device=device)
    options = {"temperature": 2.0, "reduction": "none", "scale": "none", "backend": backend}
    parts = kd.dkd_loss(**inputs, **options, return_parts=True)
    q = F.softmax(inputs["teacher"] / 2, -1).gather(-1, inputs["labels"][:, None]).squeeze(-1)
    kl = kd.kl_div(inputs["student"], inputs["teacher"], **options)
    close(parts.target + (1 - q) * parts.non_target, kl, rel=1e-9)


@pytest.mark.parametrize("name", ["dkd_loss", "nkd_loss"])
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_parts(name, reduction, backend, device):
    loss = LOSSES[name]
    inputs = loss.inputs(6, 20, dtype=torch.float64, device=device, optional=True)
    inputs["student"].requires_grad_()
    options = {"reduction": reduction, "backend": backend}
    parts = loss(inputs, **options, return_parts=True)
    whole = loss(inputs, **options)
    close(parts.loss, whole)
    assert parts.loss.requires_grad and not parts.target.requires_grad
    weights = (1.0, 8.0) if name == "dkd_loss" else (1.0, 1.5)
    close(weights[0] * parts.target + weights[1] * parts.non_target, whole)
    (gradient,) = torch.autograd.grad(parts.loss.sum(), inputs["student"])
    close(gradient, torch.autograd.grad(whole.sum(), inputs["student"])[0])
    with torch.no_grad():
        close(loss(inputs, **options, return_parts=True).target, parts.target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 300, 2500])
def test_identical_logits_have_no_dkd(dtype, classes, backend, device):
    inputs = LOSSES["dkd_loss"].inputs(5, classes, dtype=dtype, device=device)
    inputs |= {"student": inputs["teacher"].clone().requires_grad_()}
    inputs |= {"teacher": inputs["teacher"].requires_grad_()}
    value = kd.dkd_loss(**inputs, backend=backend)
    assert value.item() == 0
    for name, gradient in gradients(value, inputs).items():
        assert not gradient.any(), name


@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4])
def test_dkd_is_exact_near_zero(size, kernel, device):
    """By probabilities in fp32 it would be rounding below 1e-7, and of either sign."""
    inputs = LOSSES["dkd_loss"].inputs(64, 200, dtype=torch.float32, device=device)
    noise = torch.randn(64, 200, device=device)
    inputs["student"] = (inputs["teacher"] + size * noise).requires_grad_()
    for options in ({"alpha": 1.0, "beta": 0.0}, {"alpha": 0.0, "beta": 1.0}):
        exact = leaves(inputs, torch.float64)
        expected = kd.dkd_loss(**exact, **options, backend="reference")
        value = kd.dkd_loss(**inputs, **options, backend=kernel)
        assert value.item() >= 0 and value.item() == pytest.approx(expected.item(), rel=2e-6)
        (gradient,) = torch.autograd.grad(value, inputs["student"])
        (wanted,) = torch.autograd.grad(expected, exact["student"])
        assert relative_errors(gradient, wanted)[0] < 5e-6


def test_two_classes_have_no_others(backend, device):
    """mdistiller #60: with C = 2 there is one other class, and nothing to tell it from."""
    inputs = LOSSES["dkd_loss"].inputs(6, 2, dtype=torch.float64, device=device)
    parts = kd.dkd_loss(**inputs, temperature=1.0, backend=backend, return_parts=True)
    assert not parts.non_target.any()
    kl = kd.kl_div(inputs["student"], inputs["teacher"], backend=backend)
    close(parts.target, kl, rel=1e-10)


@targeted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("classes", [1, 2, 50])
def test_extremes_are_finite(name, dtype, classes, backend, device):
    """mdistiller's DKD is inf or NaN from |z| = 100 on, in fp16 from 10; CTKD's dT with it."""
    loss = LOSSES[name]
    inputs = loss.inputs(4, classes, device=device)
    for side in SIDES:
        inputs[side] = (1e4 * inputs[side].sign()).to(dtype).requires_grad_()
    inputs["temperature"] = torch.tensor(3.0, device=device, requires_grad=True)
    value = loss(inputs, backend=backend)
    assert value.isfinite()
    for argument, gradient in gradients(value, inputs).items():
        assert gradient.isfinite().all(), argument


OFF = {
    "target of the student": ([0], []),
    "target of the teacher": ([], [0]),
    "target of both": ([0], [0]),
    "others of the student": ([1, 2, 3], []),
    "others of the teacher": ([], [1, 2, 3]),
    "others of both": ([1, 2, 3], [1, 2, 3]),
    "one of the student": ([2], []),
    "one of the teacher": ([], [2]),
    "one of each": ([2], [1]),
    "target of the one, others of the other": ([0], [1, 2, 3]),
}


@pytest.mark.parametrize("off", OFF.values(), ids=OFF)
@pytest.mark.parametrize("name", [*TARGETED, "kl_div_standardized"])
def test_minus_infinity(name, off, backend, device):
    loss = LOSSES[name]
    inputs = loss.inputs(3, 4, dtype=torch.float64, device=device)
    if "labels" in inputs:
        inputs["labels"] = torch.zeros(3, dtype=torch.int64, device=device)
    for side, classes in zip(SIDES, off, strict=True):
        inputs[side][1, classes] = -math.inf
        inputs[side].requires_grad_()
    inputs["temperature"] = torch.full((3,), 2.0, dtype=torch.float64, device=device)
    inputs["temperature"].requires_grad_()
    for options in ({}, {"ce_weight": 0.5}) if name in ("dkd_loss", "nkd_loss") else ({},):
        same_as_reference(loss, inputs, backend, reduction="sum", **options)
        rows = loss(inputs, backend=backend, reduction="none", **options)
        assert rows[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", ["dkd_loss", "nkd_loss"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_bad_target_stays_in_its_row(name, side, bad, backend, device):
    inputs = LOSSES[name].inputs(4, 30, device=device)
    inputs[side][1, inputs["labels"][1]] = bad
    rows = LOSSES[name](inputs, reduction="none", backend=backend)
    assert rows.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_excluded_target_keeps_its_gradient(dtype, backend, device):
    inputs = LOSSES["dkd_loss"].inputs(3, 8, dtype=dtype, device=device)
    inputs["student"][1, inputs["labels"][1]] = -math.inf
    inputs["student"].requires_grad_()
    exact = leaves(inputs, torch.float64)
    value = kd.dkd_loss(**inputs, reduction="sum", backend=backend)
    wanted = kd.dkd_loss(**exact, reduction="sum", backend="reference")
    assert value.isposinf() and wanted.isposinf()
    (gradient,) = torch.autograd.grad(value, inputs["student"])
    (expected,) = torch.autograd.grad(wanted, exact["student"])
    assert relative_errors(gradient, expected)[0] < (1e-6 if dtype == torch.float32 else 1e-3)
    # Without its weight it is not looked at.
    assert kd.dkd_loss(**inputs, alpha=0.0, backend=backend).isfinite()


def test_parts_without_their_weights(backend, device):
    inputs = LOSSES["dkd_loss"].inputs(6, 20, dtype=torch.float64, device=device)
    expected = kd.dkd_loss(**inputs, backend=backend, return_parts=True)
    for weights in ({"beta": 0.0}, {"alpha": 0.0}):
        parts = kd.dkd_loss(**inputs, **weights, backend=backend, return_parts=True)
        close(parts.target, expected.target)
        close(parts.non_target, expected.non_target)


@targeted
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "probabilities"])
def test_cross_entropy_comes_along(name, smoothing, soft, backend, device):
    loss = LOSSES[name]
    inputs = loss.inputs(6, 30, dtype=torch.float64, device=device)
    plain = inputs | {"student": inputs["student"].requires_grad_()}
    labels = plain["labels"]
    if soft:
        labels = torch.rand(6, 30, dtype=torch.float64, device=device).softmax(-1)
        plain = plain | {"labels": labels.argmax(-1)}
    mixed = plain | {"labels": labels}
    ce = F.cross_entropy(plain["student"], labels, label_smoothing=smoothing)
    if name == "ats_loss":
        expected = 0.5 * ce + loss(plain, alpha=1.0, backend=backend) * 0.5
        value = loss(mixed, alpha=0.5, label_smoothing=smoothing, backend=backend)
    else:
        expected = 0.7 * ce + loss(plain, backend=backend)
        value = loss(mixed, ce_weight=0.7, label_smoothing=smoothing, backend=backend)
    close(value, expected)
    (gradient,) = torch.autograd.grad(value, plain["student"])
    close(gradient, torch.autograd.grad(expected, plain["student"])[0], rel=1e-10)


def z_score(x):
    return (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True))


STANDARD = ["kl_div", "reverse_kl_div", "js_div", "tv_distance", "divergence_ab",
            "divergence_renyi", "kd_loss", "dkd_loss", "nkd_loss", "wsld_loss"]  # fmt: skip


@pytest.mark.parametrize("name", STANDARD)
@pytest.mark.parametrize("shape", [(5, 40), (3, 1500)], ids=str)
def test_standardized_logits_are_z_scores(name, shape, backend, device):
    loss = LOSSES[name]
    inputs = loss.inputs(*shape, dtype=torch.float64, device=device, optional=True)
    for argument in loss.differentiable:
        inputs[argument].requires_grad_()
    value = loss(inputs, backend=backend, standardize=True)
    if name in ("kd_loss", "nkd_loss", "wsld_loss"):  # raw logits at temperature 1
        return same_as_reference(loss, inputs, backend, standardize=True)
    scored = inputs | {side: z_score(inputs[side]) for side in SIDES}
    expected = loss(scored, backend="reference")
    close(value, expected, rel=1e-10)
    wanted = gradients(expected, inputs)
    for argument, gradient in gradients(value, inputs).items():
        assert relative_errors(gradient, wanted[argument])[0] < 1e-9, argument


@pytest.mark.parametrize("name", ["kl_div", "kd_loss", "dkd_loss", "wsld_loss"])
@pytest.mark.parametrize("classes", [40, 1000, 1500])
def test_student_alone_of_standardized_rows(name, classes, kernel, device):
    """Far logits in front, by which the mean is guessed; an offset; classes off on both sides,
    among the first and at the end alone."""
    loss = LOSSES[name]
    inputs = loss.inputs(4, classes, device=device)
    for side in SIDES:
        inputs[side][1, :8] += 100.0
        inputs[side][2] += 100.0
        inputs[side][3, 10:20] = -math.inf
        inputs[side][0, -3:] = -math.inf
    if "labels" in inputs:
        inputs["labels"].fill_(30)
    results = []
    wide = torch.float64
    for backend, dtype in ((kernel, None), ("reference", None), ("reference", wide)):
        given = leaves(inputs, dtype)
        given["student"].requires_grad_()
        value = loss(given, standardize=True, backend=backend)
        results.append((value, *torch.autograd.grad(value, given["student"])))
    for what, triple in zip(("value", "gradient"), zip(*results, strict=True), strict=True):
        assert_close_to_oracle(*triple, what)


@pytest.mark.parametrize("dtype", DTYPES)
def test_constant_rows_standardize_to_zero(dtype, backend, device):
    inputs = LOSSES["kl_div"].inputs(4, 30, dtype=dtype, device=device)
    inputs["student"][1] = 3.0
    inputs["teacher"][2] = -7.0
    inputs["student"][3, 1:] = -math.inf  # one finite class does not vary either
    inputs["teacher"][3, 1:] = -math.inf
    for side in SIDES:
        inputs[side].requires_grad_()
    rows = kd.kl_div(**inputs, standardize=True, reduction="none", backend=backend)
    uniform = inputs["teacher"][1].double()
    expected = (math.log(30) + (p := z_score(uniform).softmax(-1)) @ p.log()).item()
    assert rows[1].item() == pytest.approx(expected, rel=1e-3 if dtype.itemsize == 2 else 1e-5)
    assert rows.isfinite().all() and rows[3] == 0
    wanted = gradients(rows.sum(), inputs)
    assert not wanted["student"][1].any() and not wanted["teacher"][2].any()
    assert all(gradient.isfinite().all() for gradient in wanted.values())


def test_standardization_sees_finite_classes(backend, device):
    inputs = LOSSES["kl_div"].inputs(3, 20, dtype=torch.float64, device=device)
    alone = kd.kl_div(**inputs, standardize=True, backend=backend)
    off = torch.full((3, 5), -math.inf, dtype=torch.float64, device=device)
    padded = {name: torch.cat([x, off], -1) for name, x in inputs.items()}
    close(kd.kl_div(**padded, standardize=True, backend=backend), alone)
    moved = {"student": 5 * inputs["student"] + 100, "teacher": 0.1 * inputs["teacher"] - 3}
    close(kd.kl_div(**moved, standardize=True, backend=backend), alone, rel=1e-5)  # but for eps


RANGED = ["kl_div", "js_div", "divergence_renyi", "dkd_loss", "ats_loss"]


@pytest.mark.parametrize("name", RANGED)
@pytest.mark.parametrize("narrow", [False, True], ids=["whole teacher", "narrow teacher"])
@pytest.mark.parametrize("options", [{}, {"standardize": True}], ids=["plain", "standardized"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_class_range_is_a_slice(name, narrow, options, dtype, backend, device):
    if name == "ats_loss" and options:
        pytest.skip("not supported")
    loss = LOSSES[name]
    inputs = loss.inputs(5, 1300, dtype=dtype, device=device, requires_grad=True)
    m, n = 40, 1240
    if "labels" in inputs:
        inputs["labels"] = torch.arange(100, 105, device=device)
        if name == "ats_loss":
            options = {"alpha": 1.0}  # its cross-entropy sees every class
    sliced = inputs | {side: inputs[side][:, m:n] for side in SIDES}
    if "labels" in inputs:
        sliced["labels"] = inputs["labels"] - m
    expected = loss(sliced, backend=backend, reduction="mean", **options)
    given = inputs | {"teacher": sliced["teacher"]} if narrow else inputs
    value = loss(given, class_range=(m, n), backend=backend, reduction="mean", **options)
    close(value, expected, rel=1e-12 if dtype == torch.float64 else 1e-6)
    wanted = gradients(expected, inputs)
    for argument, gradient in gradients(value, inputs).items():
        assert not gradient[:, :m].any() and not gradient[:, n:].any()
        assert relative_errors(gradient, wanted[argument])[0] < (
            1e-10 if dtype == torch.float64 else 1e-2 if dtype == torch.bfloat16 else 1e-6
        )


@pytest.mark.parametrize("name", ["kd_loss", "nkd_loss", "wsld_loss"])
@pytest.mark.parametrize("standardize", [False, True])
def test_labels_see_every_class(name, standardize, backend, device):
    """Education distillation: cross-entropy over all classes, distillation inside a window."""
    loss = LOSSES[name]
    inputs = loss.inputs(5, 60, dtype=torch.float64, device=device, requires_grad=True)
    inputs["labels"] = torch.tensor([10, 20, 11, 34, 12], device=device)
    options = {"class_range": (10, 35), "standardize": standardize}
    if name != "nkd_loss":  # whose others are those of the window
        inputs["labels"][0] = 59
    if name == "kd_loss":
        window = {side: inputs[side][:, 10:35] for side in SIDES}
        kl = kd.kl_div(**window, temperature=4.0, standardize=standardize, backend=backend)
        ce = F.cross_entropy(inputs["student"], inputs["labels"])
        close(loss(inputs, backend=backend, **options), 0.1 * ce + 0.9 * kl)
    same_as_reference(loss, inputs, backend, **options)


def test_modules_hold_a_class_range():
    inputs = LOSSES["dkd_loss"].inputs(5, 60)
    inputs["labels"] = torch.arange(10, 15)
    value = modules.DKDLoss(class_range=(10, 35))(**inputs)
    assert torch.equal(value, kd.dkd_loss(**inputs, class_range=(10, 35)))
    with pytest.raises(ValueError, match="class_range must be"):
        modules.SoftKLDivLoss(class_range=(3, 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: kd.dkd_loss(x, x, None), TypeError, "labels must be a tensor"),
        (lambda x: kd.kl_div(x, x, class_range=(2, 2)), ValueError, "class_range must be"),
        (lambda x: kd.kl_div(x, x, class_range=(0, 11)), ValueError, "class_range must be"),
        (lambda x: kd.kl_div(x, x, class_range=3), TypeError, "class_range must be a pair"),
        (lambda x: kd.kl_div(x, x[:, :4], class_range=(0, 5)), ValueError, "or 5 classes"),
        (lambda x: kd.kl_div(x, x[:, :4]), ValueError, "the student's shape"),
        (lambda x: kd.kl_div(x, x, standardize=1), TypeError, "standardize must be a bool"),
        (
            lambda x: kd.nkd_loss(x, x[:, :5], torch.ones(3).long(), class_range=(0, 5)),
            ValueError,
            "the student's shape",
        ),
        (
            lambda x: kd.dkd_loss(x, x, torch.full((3,), 7), class_range=(0, 5)),
            ValueError,
            r"labels must be in class_range \[0, 5\)",
        ),
        (lambda x: kd.dkd_loss(x, x, torch.full((3,), 10)), ValueError, r"\[0, 10\)"),
        (
            lambda x: kd.ats_loss(x, x, torch.ones(3).long(), standardize=True),
            NotImplementedError,
            "standardize",
        ),
        (
            lambda x: kd.ats_loss(x, x, torch.ones(3).long(), target_temperature=0.0),
            ValueError,
            "target_temperature must be positive",
        ),
        (lambda x: kd.dkd_loss(x, x, torch.ones(3).long(), beta="8"), TypeError, "beta"),
        (
            lambda x: kd.dkd_loss(
                x.clone().requires_grad_() * 1,
                x,
                torch.ones(3).long(),
                inplace=True,
                return_parts=True,
            ),
            NotImplementedError,
            "inplace=True",
        ),
    ],
)
def test_bad_input(call, error, message, backend, device, prefer):
    prefer(backend)
    with pytest.raises(error, match=message):
        call(torch.randn(3, 10, device=device))
