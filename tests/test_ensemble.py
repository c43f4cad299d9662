# SPDX-License-Identifier: Apache-2.0
"""Several teachers: against the reference, against kl_div, and where they usually break."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kdkernels import functional as kd
from kdkernels import modules
from kdkernels.testing import LOSSES, assert_close_to_oracle, gradients, leaves

ENSEMBLE = [loss for loss in LOSSES.values() if loss.family == "ensemble"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
losses = pytest.mark.parametrize("entry", ENSEMBLE, ids=lambda loss: loss.name)
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
    x = ENSEMBLE[0].inputs(4, 30, dtype=torch.float64, device=device)
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
    x = ENSEMBLE[0].inputs(4, 30, dtype=dtype, device=device)
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


@forms
@dtypes
def test_identical_logits_are_exactly_zero(form, dtype, backend, device):
    for classes in (1, 33, 3000):
        x = LOSSES["kl_div"].inputs(4, classes, dtype=dtype, device=device)["teacher"]
        student, teachers = x.clone().requires_grad_(), [x.clone().requires_grad_()] * 3
        weights = torch.tensor([0.1, 0.7, 0.3], device=device)
        value = kd.multi_teacher_kl_div(
            student, teachers, weights=weights, form=form, temperature=3.0, backend=backend
        )
        assert value.item() == 0
        for gradient in torch.autograd.grad(value, [student, teachers[0]]):
            assert not gradient.any()


@forms
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3, 1e-4, 3e-5])
def test_exact_and_not_negative_near_zero(form, size, backend, device):
    generator = torch.Generator().manual_seed(0)
    student = 3 * torch.randn(16, 2000, generator=generator)
    teachers = student + size * torch.randn(3, 16, 2000, generator=generator)
    student, teachers = student.to(device), teachers.to(device)
    options = {"form": form, "reduction": "none"}
    rows = kd.multi_teacher_kl_div(student, teachers, backend=backend, **options)
    oracle = kd.multi_teacher_kl_div(
        student.double(), teachers.double(), backend="reference", **options
    )
    assert (rows >= 0).all()
    assert ((rows.double() - oracle) / oracle).abs().max() <= 2e-6


@forms
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("by_row", [False, True])
def test_a_teacher_without_weight_is_not_looked_at(form, bad, by_row, backend, device):
    x = ENSEMBLE[0].inputs(4, 30, device=device)
    student, teachers = x["student"].requires_grad_(), x["teachers"]
    weights = torch.tensor([1.0, 0.0, 3.0], device=device)
    options = {"form": form, "backend": backend}
    expected = kd.multi_teacher_kl_div(student, teachers[::2], weights=weights[::2], **options)
    teachers[1] = bad
    if by_row:
        weights = weights.unsqueeze(-1).expand(-1, 4)
    for learned in (False, True):  # it is then looked at, and found to hold nothing
        held = weights.clone().requires_grad_(learned)
        given = teachers.clone().requires_grad_(learned)
        value = kd.multi_teacher_kl_div(student, given, weights=held, **options)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        inputs = {"student": student, "teachers": given, "weights": held}
        for name, gradient in gradients(value, inputs).items():
            assert gradient.isfinite().all(), name
            if name == "teachers":
                assert not gradient[1].any()


@forms
def test_a_weight_of_zero_has_a_gradient(form, backend, device):
    x = ENSEMBLE[0].inputs(4, 30, dtype=torch.float64, device=device)
    weights = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64, device=device, requires_grad=True)

    def loss(w):
        return kd.multi_teacher_kl_div(**x, weights=w, form=form, backend=backend)

    (gradient,) = torch.autograd.grad(loss(weights), weights)
    step = torch.tensor([0.0, 1e-7, 0.0], dtype=torch.float64, device=device)
    slope = (loss(weights.detach() + step) - loss(weights.detach())) / 1e-7
    assert gradient[1].item() == pytest.approx(slope.item(), rel=1e-5)


@forms
def test_masked_rows_are_not_read(form, backend, device):
    x = ENSEMBLE[0].inputs(3, 30, device=device, optional=True, requires_grad=True)
    mask = torch.tensor([True, False, True], device=device)
    options = {"mask": mask, "form": form, "backend": backend}
    expected = kd.multi_teacher_kl_div(**x, **options)
    with torch.no_grad():
        x["student"][1] = math.nan
        x["teachers"][:, 1] = math.inf
    value = kd.multi_teacher_kl_div(**x, **options)
    assert torch.equal(value, expected)
    for name, gradient in gradients(value, x).items():
        assert gradient.isfinite().all(), name


@forms
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("side", ["student", "teachers"])
def test_bad_logits_stay_in_their_row(form, side, bad, backend, device):
    x = ENSEMBLE[0].inputs(4, 30, device=device, requires_grad=True)
    with torch.no_grad():
        x[side].select(-2, 1)[..., 7] = bad
    rows = kd.multi_teacher_kl_div(**x, form=form, reduction="none", backend=backend)
    assert rows.isnan().tolist() == [False, True, False, False]
    for name, gradient in gradients(rows, x).items():
        others = gradient.index_select(-2, torch.tensor([0, 2, 3], device=device))
        assert others.isfinite().all(), name


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_saturated_rows(form, dtype, backend, device):
    """|logits| of 1e4, one-hot: the same winner, another, and teachers that disagree."""
    student = torch.full((3, 20), -1e4, device=device)
    teachers = torch.full((2, 3, 20), -1e4, device=device)
    for i, (s, t, u) in enumerate(((3, 3, 3), (3, 8, 8), (5, 5, 0))):
        student[i, s] = teachers[0, i, t] = teachers[1, i, u] = 1e4
    student, teachers = student.to(dtype).requires_grad_(), teachers.to(dtype).requires_grad_()
    inputs = {"student": student, "teachers": teachers}
    rows = kd.multi_teacher_kl_div(**inputs, form=form, reduction="none", backend=backend)
    exact = leaves(inputs, torch.float64)
    oracle = kd.multi_teacher_kl_div(**exact, form=form, reduction="none", backend="reference")
    torch.testing.assert_close(rows.double(), oracle, rtol=1e-5, atol=1e-6)
    for name, gradient in gradients(rows, inputs).items():
        assert gradient.isfinite().all(), name


# From a base of shape (6, 9, 40) or (3, 6, 9, 40).
LAYOUTS = {
    "shifted": lambda x: x[..., :-1, :],
    "transposed": lambda x: x.transpose(-2, -3),
    "classes_first": lambda x: x.transpose(-1, -2),
    "expanded": lambda x: x[..., :1, :].expand(*x.shape),
    "every_other_class": lambda x: x[..., ::2],
    "misaligned": lambda x: x[..., 1:],
    "deep": lambda x: x.view(*x.shape[:-3], 2, 3, 9, 2, 20)[..., 1:, :],
}


@forms
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(form, layout, dtype, backend, device):
    base = ENSEMBLE[0].inputs(6, 9, 40, dtype=dtype, device=device)
    x = {name: LAYOUTS[layout](t) for name, t in base.items()}
    options = {"form": form, "reduction": "none", "backend": backend}
    expected = kd.multi_teacher_kl_div(**{n: t.contiguous() for n, t in x.items()}, **options)
    value = kd.multi_teacher_kl_div(**x, **options)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    listed = kd.multi_teacher_kl_div(x["student"], [t.clone() for t in x["teachers"]], **options)
    torch.testing.assert_close(listed, expected, rtol=1e-6, atol=1e-7)


def test_a_sequence_gets_its_gradients_apart(backend, device):
    x = ENSEMBLE[0].inputs(6, 40, device=device, requires_grad=True)
    stacked = gradients(kd.multi_teacher_kl_div(**x, backend=backend), x)["teachers"]
    teachers = [t.detach().clone().requires_grad_(i != 1) for i, t in enumerate(x["teachers"])]
    value = kd.multi_teacher_kl_div(x["student"], teachers, backend=backend)
    apart = torch.autograd.grad(value, [teachers[0], teachers[2]])
    torch.testing.assert_close(torch.stack(apart), stacked[::2])


def test_cross_entropy_is_torchs(backend, device):
    x = ENSEMBLE[0].inputs(6, 30, dtype=torch.float64, device=device)
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
    x = ENSEMBLE[0].inputs(6, 30, dtype=torch.float64, device=device)
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
    x = ENSEMBLE[0].inputs(4, 30, dtype=torch.float64, device=device, optional=True)
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


def test_fp16_gradients_survive_scaling(backend, device):
    x = ENSEMBLE[0].inputs(512, 1000, dtype=torch.float16, device=device, requires_grad=True)
    scale = 2.0**14
    value = kd.multi_teacher_kl_div(**x, temperature=2.0, backend=backend) * scale
    exact = leaves(x, torch.float64)
    oracle = kd.multi_teacher_kl_div(**exact, temperature=2.0, backend="reference") * scale
    wanted = gradients(oracle, exact)
    for name, gradient in gradients(value, x).items():
        error = (gradient.double() - wanted[name]).norm() / wanted[name].norm()
        assert error <= 1e-3, name


def test_backward_of_a_kept_graph_repeats(backend, device):
    x = ENSEMBLE[0].inputs(4, 33, device=device, requires_grad=True)
    value = kd.multi_teacher_kl_div(**x, backend=backend)
    two = torch.tensor(2.0, device=device)
    first = torch.autograd.grad(value, list(x.values()), two, retain_graph=True)
    second = torch.autograd.grad(value, list(x.values()), two)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_order_needs_the_reference(kernel, device):
    x = ENSEMBLE[0].inputs(4, 33, device=device, requires_grad=True)
    value = kd.multi_teacher_kl_div(**x, backend=kernel)
    with pytest.raises(RuntimeError, match=r'^multi_teacher_kl_div: .*backend="reference"'):
        torch.autograd.grad(value, x["student"], create_graph=True)


@pytest.mark.parametrize("shape", [(300, 100), (13, 3000)])
@losses
def test_same_bits_for_any_number_of_threads(entry, shape, kernel, device):
    x = entry.inputs(*shape, device=device, optional=True, requires_grad=True)
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            value = entry(x, backend=kernel)
            results.append([value.detach(), *gradients(value, x).values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@losses
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("stacked", [True, False])
def test_fullgraph(entry, dtype, stacked, kernel, device):
    x = entry.inputs(6, 10, dtype=dtype, device=device, optional=True, requires_grad=True)
    if not stacked:
        x["teachers"] = list(x["teachers"].detach().unbind(0))
    expected = entry(x, backend=kernel)
    value = torch.compile(lambda i: entry(i, backend=kernel), fullgraph=True)(x)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    wanted = gradients(expected, x)
    for name, gradient in gradients(value, x).items():
        rtol = 2e-3 if dtype == torch.float16 else 1e-5
        torch.testing.assert_close(gradient, wanted[name], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("grads", [0, 1, 7, 15])
def test_opcheck(mixture, grads, kernel, device):
    if kernel != "cpu":
        pytest.skip("the other operators have the same schema and fake")
    student, *teachers = torch.randn(4, 3, 7).unbind(0)
    numbers, choices = (2.0, 0.0, 1.0, 0.3), (0, 1, 2)
    row = torch.rand(3)
    optional = torch.tensor([1, 2, 0]), row > 0.5, row, 1 + row, 1 + row, torch.rand(3, 3)
    operator = torch.ops.kdkernels.ensemble.default
    torch.library.opcheck(
        operator, (student, teachers, mixture, numbers, choices, grads, *optional)
    )
    torch.library.opcheck(operator, (student, teachers, mixture, (2.0,), (0,), grads))


S = torch.zeros(4, 10)
T = torch.zeros(3, 4, 10)
BAD_CALLS = {
    "shape": ({"teachers": S}, ValueError, r"teachers must have shape \(M, \*\(4, 10\)\) .*got"),
    "no teachers": ({"teachers": T[:0]}, ValueError, "teachers must have shape .* with M >= 1"),
    "empty sequence": ({"teachers": []}, TypeError, "teachers must be a tensor .* at least one"),
    "no sequence": ({"teachers": 3}, TypeError, "teachers must be a tensor .* got 3"),
    "one of another shape": ({"teachers": [S, S[:, 1:]]}, ValueError, "teacher must have the stud"),
    "two dtypes": ({"teachers": [S, S.half()]}, TypeError, "teachers must have one dtype, got"),
    "dtype": ({"teachers": T.int()}, TypeError, "teacher must be float64"),
    "form": ({"form": "mean"}, ValueError, "form must be one of sum, mixture, got 'mean'"),
    "weights": ({"weights": [1.0]}, TypeError, "weights must be a tensor, got list"),
    "weights' shape": (
        {"weights": torch.ones(2)}, ValueError, r"weights must have shape \(3,\) or \(3, 4\), got",
    ),
    "weights' dtype": (
        {"weights": torch.ones(3).long()}, TypeError, "weights must be floating-point, got",
    ),
    "nan weight": ({"weights": torch.tensor([1, 1, math.nan])}, ValueError, "weights must be fin"),
    "negative weight": (
        {"weights": torch.tensor([1.0, 1.0, -0.1]), "form": "mixture"}, ValueError,
        "weights of a mixture must not be negative",
    ),
    "no weight": (
        {"weights": torch.zeros(3), "form": "mixture"}, ValueError, "weights of a mixture .* all",
    ),
    "labels": ({"ce_weight": 1.0}, TypeError, "labels must be a tensor where ce_weight is not 0"),
    "a label": (
        {"labels": torch.full((4,), 10)}, ValueError, r"labels must be in \[0, 10\) .* got 10",
    ),
    "label beside a range": (
        {"labels": torch.full((4,), 10), "class_range": (0, 3)}, ValueError,
        r"labels must be in \[0, 10\) .* got 10",
    ),
    "range": ({"class_range": (3, 11)}, ValueError, r"class_range must be \(m, n\)"),
    "narrow": (
        {"class_range": (0, 3), "teachers": T[..., :4]}, ValueError,
        "teachers must .* or 3 classes",
    ),
    "standardize": ({"standardize": 1}, TypeError, "standardize must be a bool"),
    "smoothing": ({"label_smoothing": 2.0}, ValueError, r"label_smoothing must be in \[0.0, 1.0"),
    "compat": ({"compat": "timm"}, ValueError, "compat must be one of paper, dgkd, okddip, got"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case, backend, device):
    change, error, message = BAD_CALLS[case]
    if device != "cpu":
        pytest.skip("values on a GPU are not read")
    with pytest.raises(error, match=f"^multi_teacher_kl_div: {message}"):
        kd.multi_teacher_kl_div(**{"student": S, "teachers": T, "backend": backend} | change)


def test_no_rows(backend, device):
    for reduction in ("none", "mean"):
        x = ENSEMBLE[0].inputs(0, 10, device=device, optional=True, requires_grad=True)
        value = kd.multi_teacher_kl_div(**x, reduction=reduction, backend=backend)
        assert value.shape == ((0,) if reduction == "none" else ()) and not value.any()
        for name, gradient in gradients(value, x).items():
            assert gradient.shape == x[name].shape


def test_module(backend, device):
    x = ENSEMBLE[0].inputs(5, 30, device=device)
    weights = torch.nn.Parameter(torch.tensor([0.2, 0.3, 0.5], device=device))
    module = modules.MultiTeacherKLDivLoss(weights=weights, temperature=3.0, backend=backend)
    value = module(**x)
    expected = kd.multi_teacher_kl_div(**x, weights=weights, temperature=3.0, backend=backend)
    assert torch.equal(value, expected)
    value.backward()
    ranged = modules.MultiTeacherKLDivLoss(class_range=(7, 29), standardize=True, backend=backend)
    assert ranged(**x).isfinite()
    assert weights.grad.abs().min() > 0 and list(module.state_dict()) == ["weights"]
    with pytest.raises(ValueError, match=r"^multi_teacher_kl_div: form must be"):
        modules.MultiTeacherKLDivLoss(form="max")
