# SPDX-License-Identifier: Apache-2.0
"""Several teachers: against the reference, against kl_div, and against what `compat` names."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kdkernels import functional as kd
from kdkernels.testing import LOSSES, assert_close_to_oracle, gradients, leaves

ENTRIES = [loss for loss in LOSSES.values() if loss.family == "ensemble"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
losses = pytest.mark.parametrize("entry", ENTRIES, ids=lambda loss: loss.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
forms = pytest.mark.parametrize("form", ["sum", "mixture"])


def assert_as_oracle(entry, inputs, backend, plain=None, upstream=None, **options):
    """Value and every gradient by the pass rule; plain torch is the reference unless given."""
    exact, rounded = leaves(inputs, torch.float64), leaves(inputs)
    plain = plain or (lambda x: entry(x, backend="reference", **options))
    value = entry(inputs, backend=backend, **options)
    oracle, yardstick = entry(exact, backend="reference", **options), plain(rounded)
    assert_close_to_oracle(value, yardstick, oracle, str(options))
    ups = [None] * 3
    if upstream is not None:
        ups = [upstream.to(v.dtype).expand(v.shape) for v in (value, yardstick, oracle)]
    actual = gradients(value, inputs, ups[0])
    measure, wanted = gradients(yardstick, rounded, ups[1]), gradients(oracle, exact, ups[2])
    for name, gradient in actual.items():
        assert gradient.dtype == inputs[name].dtype and gradient.shape == inputs[name].shape
        assert_close_to_oracle(gradient, measure[name], wanted[name], f"{name} {options}")


@losses
def test_reference_is_the_published_formula(entry):
    inputs = entry.inputs(7, 50, dtype=torch.float64)
    expected = entry.eager(**inputs, **entry.hyper)
    assert entry(inputs, backend="reference").item() == pytest.approx(expected.item(), rel=1e-12)


@losses
@dtypes
def test_value_and_gradients(entry, dtype, backend, device):
    for classes in (1, 2, 10, 127, 1001, 4096):
        inputs = entry.inputs(5, classes, dtype=dtype, device=device, seed=1, requires_grad=True)
        assert_as_oracle(entry, inputs, backend, lambda x: entry.eager(**x, **entry.hyper))


@losses
@dtypes
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
def test_every_argument(entry, dtype, reduction, backend, device):
    inputs = entry.inputs(3, 5, 50, dtype=dtype, device=device, optional=True, requires_grad=True)
    inputs["mask"] = torch.rand(3, 5, device=device) < 0.7
    inputs["labels"] = torch.randint(50, (3, 5), device=device)
    upstream = torch.rand(3, 5, device=device) if reduction == "none" else torch.tensor(0.5)
    for options in ({"ce_weight": 0.3, "label_smoothing": 0.1}, {"scale": "none"}):
        assert_as_oracle(
            entry, inputs, backend, upstream=upstream.to(device), reduction=reduction, **options
        )


def _as_kl(student, teachers, weights, form, **options):
    """By kl_div: of each teacher, or of the mixture's log-probabilities."""
    if form == "sum":
        return sum(
            w * kd.kl_div(student, t, **options) for w, t in zip(weights, teachers, strict=True)
        )
    tau = options["temperature"]
    target = sum(w * F.softmax(t / tau, -1) for w, t in zip(weights, teachers, strict=True))
    log_q = torch.log(target / weights.sum())
    return kd.kl_div(student, tau * log_q, **options)


@forms
@pytest.mark.parametrize("off", ["nobody", "all", "teacher", "student"])
def test_is_kl_div(form, off, backend, device):
    """With -inf on no, all, one teacher's and the student's side; +inf in that row alone."""
    x = ENTRIES[0].inputs(4, 30, dtype=torch.float64, device=device)
    student, teachers = x["student"], x["teachers"]
    if off in ("student", "all"):
        student[1, 7] = -math.inf
    if off == "all":
        teachers[:, 1, 7] = -math.inf
    if off == "teacher":
        teachers[1, 1, 7] = -math.inf
    if off == "student":
        teachers[0, 1, 7] = -math.inf  # the first is finite all the same
    student.requires_grad_(), teachers.requires_grad_()
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device=device)
    options = {"temperature": 2.0, "reduction": "none"}
    value = kd.multi_teacher_kl_div(
        student, teachers, weights=weights, form=form, backend=backend, **options
    )
    assert value.isinf().tolist() == [False, off == "student", False, False]
    expected = _as_kl(student, teachers, weights, form, backend="reference", **options)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    inputs = {"student": student, "teachers": teachers}
    actual = gradients(value, inputs)
    if form == "mixture" and off != "nobody":
        del inputs["teachers"]  # through log 0
        if off == "student":
            assert not actual["teachers"][:, 1].any()
    for name, gradient in gradients(expected, inputs).items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-10, atol=1e-14)


@forms
def test_one_teacher_is_kl_div(form, backend, device):
    x = LOSSES["kl_div"].inputs(5, 40, device=device)
    value = kd.multi_teacher_kl_div(x["student"], [x["teacher"]], form=form, backend=backend)
    expected = kd.kl_div(**x, backend="reference")
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


RANGES = {
    "standardized": {"standardize": True},
    "range": {"class_range": (7, 29)},
    "both": {"standardize": True, "class_range": (7, 29)},
}


@forms
@pytest.mark.parametrize("options", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("narrow", [False, True])
def test_ranges_and_z_scores_are_rowwise(form, options, narrow, backend, device):
    """As kd_loss has them, with a constant row, a row with less classes, and one that is masked."""
    x = LOSSES["kl_div"].inputs(5, 40, dtype=torch.float64, device=device)
    x["student"][1] = x["teacher"][2] = 3.0
    x["student"][3, 9] = x["teacher"][3, 9] = -math.inf
    x["student"][4, 9] = x["teacher"][4, 9] = math.nan
    if narrow and "class_range" in options:
        x["teacher"] = x["teacher"][:, slice(*options["class_range"])].clone()
    x = {name: value.requires_grad_() for name, value in x.items()}
    labels = torch.tensor([1, 8, 30, 39, -100], device=device)
    smooth = torch.rand(5, 40, dtype=torch.float64, device=device).softmax(-1)
    mask = torch.tensor([True, False, True, True, False], device=device)
    common = options | {"temperature": 3.0, "ce_weight": 0.7, "label_smoothing": 0.1}
    for reduction in ("none", "batchmean", "mean"):
        for y, given in ((labels, {}), (smooth, {"mask": mask}), (labels, {"mask": mask})):
            given = common | given | {"reduction": reduction}
            expected = kd.kd_loss(**x, labels=y, kd_weight=1.0, backend="reference", **given)
            wanted = gradients(expected, x)
            for teachers in ([x["teacher"]], x["teacher"].unsqueeze(0)):
                value = kd.multi_teacher_kl_div(
                    x["student"], teachers, y, form=form, backend=backend, **given
                )
                torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-13)
                for name, gradient in gradients(value, x).items():
                    torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-13)


@dtypes
def test_standardized_teachers(dtype, backend, device):
    """The sum of each one's kl_div; without weight, whatever a teacher holds."""
    x = ENTRIES[0].inputs(4, 30, dtype=dtype, device=device)
    x["teachers"][1] = math.nan
    weights = torch.tensor([0.3, 0.0, 2.0], dtype=x["teachers"].dtype, device=device)
    options = {"temperature": 2.0, "standardize": True, "class_range": (3, 25)}
    x = {name: value.requires_grad_() for name, value in x.items()}
    value = kd.multi_teacher_kl_div(**x, weights=weights, backend=backend, **options)
    exact = leaves(x, torch.float64)
    oracle = sum(
        weights[m].double() * kd.kl_div(exact["student"], exact["teachers"][m], **options)
        for m in (0, 2)
    )
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2}.get(dtype, 2e-3)
    torch.testing.assert_close(value.double(), oracle, rtol=min(tolerance, 1e-5), atol=0)
    wanted = gradients(oracle, exact)
    for name, gradient in gradients(value, x).items():
        assert (gradient.double() - wanted[name]).norm() <= tolerance * wanted[name].norm(), name
    x["teachers"] = x["student"].detach().expand(3, 4, 30)
    assert kd.multi_teacher_kl_div(**x, backend=backend, **options) == 0


def test_cross_entropy_is_torchs(backend, device):
    x = ENTRIES[0].inputs(6, 30, dtype=torch.float64, device=device)
    for labels in (torch.randint(30, (6,)), torch.rand(6, 30, dtype=torch.float64).softmax(-1)):
        labels = labels.to(device)
        value = kd.multi_teacher_kl_div(
            **x, labels=labels, weights=torch.zeros(3, device=device), ce_weight=1.0,
            label_smoothing=0.1, backend=backend,
        )  # fmt: skip
        expected = F.cross_entropy(x["student"], labels, label_smoothing=0.1)
        assert value.item() == pytest.approx(expected.item(), rel=1e-12)


def test_dgkd(backend, device):
    """CE once, and each kept teacher's divergence averaged over classes too."""
    x = ENTRIES[0].inputs(6, 30, dtype=torch.float64, device=device)
    labels = torch.randint(30, (6,), device=device)
    kept = torch.tensor([1.0, 0.0, 1.0], device=device)
    value = kd.multi_teacher_kl_div(
        **x, labels=labels, weights=0.7 * kept, ce_weight=0.3, temperature=5.0, compat="dgkd",
        backend=backend,
    )  # fmt: skip
    expected = 0.3 * F.cross_entropy(x["student"], labels)
    for teacher in x["teachers"][::2]:
        expected += 0.7 * kd.kl_div(
            x["student"], teacher, temperature=5.0, reduction="mean", backend="reference"
        )
    assert value.item() == pytest.approx(expected.item(), rel=1e-7)  # 0.7 is a float32


@forms
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
def test_okddip(form, reduction, backend, device):
    """Its target is the softmax + 1e-7, whatever else is asked for."""
    x = ENTRIES[0].inputs(4, 30, dtype=torch.float64, device=device, optional=True)
    mask = torch.tensor([True, False, True, True], device=device)
    value = kd.multi_teacher_kl_div(
        **x, mask=mask, form=form, reduction=reduction, compat="okddip", backend=backend
    )
    tau, tau_t, w = x["temperature"][:, None], x["teacher_temperature"][:, None], x["weights"]
    log_p = (x["student"] / tau).log_softmax(-1)
    p = (x["teachers"] / tau_t).softmax(-1)
    if form == "mixture":
        w = w / w.sum(0)
        p, w = (w[..., None] * p).sum(0, keepdim=True), torch.ones_like(w[:1])
    rows = (w * F.kl_div(log_p, p + 1e-7, reduction="none").sum(-1)).sum(0)
    rows = torch.where(mask, rows * tau[:, 0] ** 2 * x["row_weight"], 0.0)
    expected = {"none": rows, "sum": rows.sum(), "batchmean": rows.sum() / 3}
    expected["mean"] = expected["batchmean"] / 30
    torch.testing.assert_close(value, expected[reduction], rtol=1e-12, atol=1e-14)
