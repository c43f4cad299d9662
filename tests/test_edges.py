# SPDX-License-Identifier: Apache-2.0
"""Where losses usually break: no rows, one class, NaN, infinities, extremes, odd memory layouts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdkernels import functional as kd
from kdkernels.testing import LOSSES, gradients, leaves, relative_errors

# Those that are 0 for identical logits.
DIVERGENCES = [loss for loss in LOSSES.values() if loss.by_row and loss.divergence]
REDUCTIONS = ["none", "sum", "batchmean", "mean"]
SIDES = ("student", "teacher")


@pytest.mark.parametrize("shape", [(0, 10), (2, 0, 10), (0, 3, 10)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows(loss, shape, reduction, backend, device):
    inputs = loss.inputs(*shape, device=device, optional=True, requires_grad=True)
    value = loss(inputs, backend=backend, reduction=reduction)
    assert value.shape == (shape[:-1] if reduction == "none" else ())
    assert not value.any()
    for name, gradient in gradients(value, inputs).items():
        assert gradient.shape == inputs[name].shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_all_rows_masked(loss, reduction, backend, device):
    inputs = loss.inputs(4, 10, device=device, optional=True, requires_grad=True)
    value = loss(
        inputs | {"mask": torch.zeros(4, dtype=torch.bool, device=device)},
        backend=backend, reduction=reduction,
    )  # fmt: skip
    assert not value.any()
    for name, gradient in gradients(value, inputs).items():
        assert not gradient.any(), name


def test_one_class(loss, backend, device):
    inputs = loss.inputs(4, 1, device=device, requires_grad=True)
    value = loss(inputs, backend=backend)
    assert value.item() == 0
    for name, gradient in gradients(value, inputs).items():
        assert not gradient.any(), name


def test_constant_rows(loss, backend, device):
    """Both uniform, at different heights: a softmax does not see the height."""
    inputs = loss.inputs(3, 20, device=device)
    inputs |= {"student": torch.full((3, 20), 5.0, device=device).requires_grad_()}
    inputs |= {"teacher": torch.full((3, 20), -2.0, device=device).requires_grad_()}
    value = loss(inputs, backend=backend)
    if loss in DIVERGENCES:
        assert value.item() == 0
        for name, gradient in gradients(value, inputs).items():
            assert not gradient.any(), name
    else:
        inputs = leaves(inputs, torch.float64)
        assert value.item() == pytest.approx(loss.eager(**inputs, **loss.hyper).item(), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_bad_logits_stay_in_their_row(loss, side, bad, backend, device):
    inputs = loss.inputs(4, 30, device=device)
    expected = loss(inputs, backend=backend, reduction="none")
    inputs[side][1, 7] = bad
    inputs |= {name: inputs[name].requires_grad_() for name in SIDES}
    value = loss(inputs, backend=backend, reduction="none")
    others = torch.tensor([0, 2, 3], device=device)
    assert value[1].isnan()
    assert torch.equal(value[others], expected[others])
    for name, gradient in gradients(value, inputs).items():
        assert gradient[others].isfinite().all(), name
    assert loss(inputs, backend=backend).isnan()


@pytest.mark.parametrize("side", SIDES)
def test_row_without_a_finite_class_is_nan(loss, side, backend, device):
    inputs = loss.inputs(3, 30, device=device)
    inputs[side][1] = -math.inf
    value = loss(inputs, backend=backend, reduction="none")
    assert value.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_masked_rows_are_not_read(loss, bad, backend, device):
    inputs = loss.inputs(3, 30, device=device, optional=True)
    mask = torch.tensor([True, False, True], device=device)
    expected = loss(inputs | {"mask": mask}, backend=backend)
    for name in SIDES:
        inputs[name][1] = bad
    inputs |= {name: inputs[name].requires_grad_() for name in loss.differentiable}
    value = loss(inputs | {"mask": mask}, backend=backend)
    assert torch.equal(value, expected)
    for name, gradient in gradients(value, inputs).items():
        assert gradient.isfinite().all() and not gradient[1].any(), name


def test_ignored_rows_teach_nothing(loss, backend, device):
    """Logits, temperatures and weights learned at once; labels that are no class, NaN weights."""
    inputs = loss.inputs(3, 30, device=device, optional=True)
    ignored = torch.tensor([False, True, False], device=device)
    if "labels" in inputs:
        inputs["labels"][ignored] = -100
    else:
        inputs["mask"] = ~ignored
    inputs["row_weight"][ignored] = math.nan
    inputs |= {name: inputs[name].requires_grad_() for name in loss.differentiable}
    for name, gradient in gradients(loss(inputs, backend=backend), inputs).items():
        assert gradient.isfinite().all() and not gradient[1].any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_saturated_rows(loss, dtype, backend, device):
    """|logits| of 1e4: softmaxes that are one-hot, and the same or different ones."""
    inputs = loss.inputs(4, 50, device=device)
    for i, (s, t) in enumerate(((3, 3), (3, 8), (49, 0), (0, 49))):
        for name, winner in (("student", s), ("teacher", t)):
            inputs[name][i] = -1e4
            inputs[name][i, winner] = 1e4
    inputs |= {name: inputs[name].to(dtype).requires_grad_() for name in SIDES}
    exact = leaves(inputs, torch.float64)
    rows = loss(inputs, backend=backend, reduction="none")
    assert not rows.isnan().any()
    assert rows.isfinite().all() or loss.name == "divergence_chi2"  # itself beyond any dtype
    oracle = loss(exact, backend="reference", reduction="none")
    finite = rows.isfinite()
    torch.testing.assert_close(rows[finite].double(), oracle[finite], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(rows, inputs).items():
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize(
    ("function", "infinite"),
    [
        (kd.kl_div, {"student"}),
        (kd.reverse_kl_div, {"teacher"}),
        (kd.js_div, set()),
        (kd.tv_distance, set()),
    ],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_one_sided_minus_infinity(function, infinite, backend, device):
    """Mass where the other side has none: +inf for KL, in that row only."""
    inputs = LOSSES["kl_div"].inputs(3, 10, device=device)
    for side in SIDES:
        student, teacher = (inputs[name].clone() for name in SIDES)
        (student if side == "student" else teacher)[1, 4] = -math.inf
        student.requires_grad_()
        rows = function(student, teacher, temperature=2.0, reduction="none", backend=backend)
        assert rows.isinf().tolist() == [False, side in infinite, False]
        (gradient,) = torch.autograd.grad(rows.sum(), student)
        assert gradient.isfinite().all()
        if side in infinite and function is kd.kl_div:
            expected = 2 * ((student[1] / 2).softmax(-1) - (teacher[1] / 2).softmax(-1))
            torch.testing.assert_close(gradient[1], expected)
        elif side in infinite:
            assert not gradient[1].any()


def test_label_at_minus_infinity(backend, device):
    """The cross-entropy of a class the student excludes is +inf; its gradient stays p - y."""
    inputs = LOSSES["kd_loss"].inputs(2, 10, device=device)
    inputs["labels"][0] = 4
    inputs["student"][0, 4] = inputs["teacher"][0, 4] = -math.inf
    student = inputs["student"].requires_grad_()
    rows = kd.kd_loss(**inputs, ce_weight=1.0, kd_weight=0.0, reduction="none", backend=backend)
    assert rows.isinf().tolist() == [True, False]
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    expected = student[0].softmax(-1)
    expected[4] -= 1
    torch.testing.assert_close(gradient[0], expected)


def test_zero_weight_silences_an_infinite_row(backend, device):
    inputs = LOSSES["kl_div"].inputs(3, 10, device=device)
    inputs["student"][1, 4] = -math.inf
    weight = torch.tensor([1.0, 0.0, 1.0], device=device)
    assert kd.kl_div(**inputs, row_weight=weight, backend=backend).isfinite()


# What of the cross-entropy stands beside the divergence, by the teacher's probability of the label.
@pytest.mark.parametrize(
    "name, share",
    [
        ("kl_div", lambda q: 0.0),
        ("kd_loss", lambda q: 0.1),
        ("dkd_loss", lambda q: 0.0),
        ("nkd_loss", lambda q: q),
        ("ats_loss", lambda q: 0.5),
        ("wsld_loss", lambda q: 0.0),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_weight_of_an_infinite_row_sees_what_is_finite(name, share, dtype, backend, device):
    loss, label = LOSSES[name], torch.tensor([3], device=device)
    inputs = loss.inputs(3, 10, dtype=dtype, device=device)
    if "labels" in inputs:
        inputs["labels"][1] = label
    inputs["student"][1, 4] = -math.inf
    student, q = inputs["student"][1:2], inputs["teacher"][1].softmax(-1)[label]
    expected = loss(inputs, reduction="none", backend="reference")
    expected[1] = share(q) * torch.nn.functional.cross_entropy(student, label)
    weight = torch.tensor([0.5, 2.0, 0.0], dtype=dtype, device=device, requires_grad=True)
    value = loss(inputs, row_weight=weight, reduction="none", backend=backend)
    assert value.isinf().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(value.sum(), weight)
    torch.testing.assert_close(gradient, expected)


def test_never_negative(backend, device):
    """Rounding must not make a divergence of nearly identical rows negative."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(200, 300, generator=generator) * 5
    for loss in DIVERGENCES:
        for size in (1e-2, 1e-4, 1e-6):
            student = teacher + size * torch.randn(200, 300, generator=generator)
            inputs = {"student": student.to(device), "teacher": teacher.to(device)}
            rows = loss(inputs, backend=backend, reduction="none")
            assert (rows >= 0).all(), (loss.name, size)


def test_large_offsets_between_the_sides(backend, device):
    """A row's height is no part of a softmax; it must not cost its precision either."""
    for loss in DIVERGENCES:
        inputs = loss.inputs(8, 300, device=device)
        inputs = {name: (8 * x).round() / 8 for name, x in inputs.items()}  # + 1024 is exact
        expected = loss(inputs, backend=backend, reduction="none")
        moved = inputs | {"student": inputs["student"] + 1024}
        value = loss(moved, backend=backend, reduction="none")
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)


@st.composite
def problems(draw):
    """A loss with any small shape, layout, dtype and mixture of extremes."""
    loss = draw(st.sampled_from([loss.name for loss in DIVERGENCES]))
    shape = [*draw(st.lists(st.integers(1, 4), max_size=3)), draw(st.integers(1, 70))]
    layout = draw(st.permutations(range(len(shape))))
    pad = draw(st.integers(0, 3))
    dtypes = draw(st.tuples(*[st.sampled_from([torch.float32, torch.bfloat16, torch.float16])] * 2))
    spread = draw(st.sampled_from([1e-3, 1.0, 10.0, 100.0]))
    off = draw(st.sampled_from([0.0, 0.05, 0.5]))
    return loss, shape, layout, pad, dtypes, spread, off, draw(st.integers(0, 2**16))


def _laid_out(x, layout, pad):
    """The same values in memory of any order of dimensions, with gaps in the innermost."""
    stored = x.permute(layout)
    wide = stored.new_empty(*stored.shape[:-1], stored.shape[-1] + pad)
    wide[..., pad:] = stored
    return wide[..., pad:].permute(torch.tensor(layout).argsort().tolist())


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(problem=problems())
def test_any_problem(problem, backend, device):
    name, shape, layout, pad, dtypes, spread, off, seed = problem
    loss = LOSSES[name]
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    gone = torch.rand(shape, generator=generator) < off  # excluded on both sides: stays finite
    for side, dtype in zip(SIDES, dtypes, strict=True):
        x = spread * torch.randn(shape, generator=generator)
        x = x.masked_fill(gone, -math.inf)
        x[..., 0] = 0
        inputs[side] = _laid_out(x.to(device, dtype), layout, pad).requires_grad_()
    options = {"reduction": "none", "temperature": 2.0}
    exact = leaves(inputs, torch.float64)
    plain = leaves(inputs)
    value = loss(inputs, backend=backend, **options)
    oracle = loss(exact, backend="reference", **options)
    yardstick = loss(plain, backend="reference", **options)

    def check(actual, plain, exact, what):
        # One small row at random, saturated or flat: plain torch may be lucky, and is no measure.
        ours, theirs = (relative_errors(x, exact)[0] for x in (actual, plain))
        assert ours <= max(8 * theirs, 2 * torch.finfo(actual.dtype).eps, 3e-5), what

    small = oracle < 1e30  # chi2 leaves fp32's range before fp64's
    check(value[small], yardstick[small], oracle[small], "value")
    if small.all():
        wanted, rounded = gradients(oracle, exact), gradients(yardstick, plain)
        for side, gradient in gradients(value, inputs).items():
            if wanted[side].to(gradient.dtype).isfinite().all():
                check(gradient, rounded[side], wanted[side], side)
