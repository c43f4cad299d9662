# SPDX-License-Identifier: Apache-2.0
"""Values over the registry against the reference in float64, and the identities between losses."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from counting import Count
from torch import nn

import kdkernels.modules as modules
from kdkernels import functional as kd
from kdkernels.testing import LOSSES, assert_close_to_oracle, gradients, leaves

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# One class; below, at and one past a multiple of any vector width; several blocks of a row.
CLASSES = [1, 2, 10, 100, 127, 1000, 1001, 4096]


def close(value, expected, rel=1e-12):
    assert value.item() == pytest.approx(expected.item(), rel=rel, abs=1e-14)


def assert_as_reference(loss, inputs, backend, **options):
    """The pass rule with the reference in the inputs' own dtype as plain torch."""
    oracle = loss(leaves(inputs, torch.float64), backend="reference", **options)
    plain = loss(inputs, backend="reference", **options)
    assert_close_to_oracle(loss(inputs, backend=backend, **options), plain, oracle, str(options))


def test_reference_is_the_published_formula(loss):
    """The oracle against each loss as users write it, in float64 where both are exact."""
    inputs = loss.inputs(7, 50, dtype=torch.float64, requires_grad=True)
    value, expected = loss(inputs, backend="reference"), loss.eager(**inputs, **loss.hyper)
    close(value, expected, rel=1e-10)
    wanted = gradients(expected, inputs)
    for name, gradient in gradients(value, inputs).items():
        if wanted[name].isfinite().all():  # DKD's own is not, to the teacher
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "forward", "backward", "largest"),
    [
        ("kl_div", 10, 8, 2e6),
        ("kd_loss", 15, 13, 2e6),
        ("kl_div_standardized", 20, 27, 2e6),
        ("nkd_loss", 21, 16, 2e6),
        ("dkd_loss", 44, 21, 2e6),
        ("dist_loss", 35, 45, 2e6),
        ("mlkd_published", 210, 206, 4e6),
    ],
)
def test_baselines_are_no_straw_men(name, forward, backward, largest):
    """Operators and temporaries of the suites' own code, measured at 512 x 1000, within a fifth."""
    inputs = LOSSES[name].inputs(512, 1000)
    student = inputs["student"].requires_grad_()
    with Count() as count:
        value = LOSSES[name].eager(**inputs, **LOSSES[name].hyper)
    assert 0.8 * forward <= count.operators <= 1.2 * forward
    assert 0.8 * largest <= count.largest <= 1.2 * largest
    with Count() as count:
        torch.autograd.grad(value, student)
    assert 0.8 * backward <= count.operators <= 1.2 * backward
    assert count.largest <= 1.2 * largest


@dtypes
def test_value(loss, dtype, backend, device):
    for classes in (n for n in CLASSES if n >= loss.fewest_classes):
        inputs = loss.inputs(5, classes, dtype=dtype, device=device, seed=classes)
        oracle = loss(leaves(inputs, torch.float64), backend="reference")
        eager = loss.eager(**inputs, **loss.hyper)
        value = loss(inputs, backend=backend)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close_to_oracle(value, eager, oracle, f"{classes} classes")


@pytest.mark.parametrize(
    ("student", "teacher"), [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str
)
def test_mixed_dtypes(loss, student, teacher, backend, device):
    inputs = loss.inputs(5, 100, dtype=torch.float64, device=device)
    inputs |= {"student": inputs["student"].to(student), "teacher": inputs["teacher"].to(teacher)}
    assert_as_reference(loss, inputs, backend)


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
@pytest.mark.parametrize("scale", ["t2", "none"])
def test_every_option_at_once(loss, reduction, scale, backend, device):
    inputs = loss.inputs(4, 6, 50, device=device, optional=True)
    inputs["mask"] = torch.rand(4, 6, device=device) < 0.7
    labels = inputs.get("labels", torch.zeros(4, 6, dtype=torch.int64, device=device))
    inputs["labels"] = labels.masked_fill(torch.rand(4, 6, device=device) < 0.2, 7)
    options = {"reduction": reduction, "scale": scale, "ignore_index": 7}
    assert_as_reference(loss, inputs, backend, **options)
    if reduction == "none":
        rows = loss(inputs, backend=backend, **options)
        assert rows.shape == (4, 6)
        assert not rows[~inputs["mask"] | (inputs["labels"] == 7)].any()


def test_reductions_follow_from_rows(loss, backend, device):
    inputs = loss.inputs(3, 5, 40, dtype=torch.float64, device=device)
    inputs["mask"] = torch.rand(3, 5, device=device) < 0.6
    inputs["row_weight"] = torch.rand(3, 5, device=device, dtype=torch.float64)
    value = {
        reduction: loss(inputs, backend=backend, reduction=reduction)
        for reduction in ("none", "sum", "batchmean", "mean")
    }
    count = inputs["mask"].sum()
    close(value["sum"], value["none"].sum())
    close(value["batchmean"], value["none"].sum() / count)
    close(value["mean"], value["none"].sum() / (count * 40))


# How logits lie in memory in practice: (base of shape (6, 9, 40) or so) -> view.
LAYOUTS = {
    "shifted": lambda x: x[:, :-1],  # next-token logits
    "transposed": lambda x: x.transpose(0, 1),  # (sequence, batch, vocabulary) models
    "classes_first": lambda x: x.transpose(1, 2),  # class dimension not contiguous
    "expanded": lambda x: x[:1].expand(6, -1, -1),
    "every_other_row": lambda x: x[:, ::2],
    "every_other_class": lambda x: x[..., ::2],
    "misaligned": lambda x: x[..., 1:],
    "vector": lambda x: x[0, 0],  # no leading dimension: one row
    "deep": lambda x: x.view(2, 3, 9, 2, 20)[:, 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(loss, layout, dtype_pair, backend, device):
    view = LAYOUTS[layout]
    base = loss.inputs(6, 9, 40, dtype=dtype_pair, device=device)
    inputs = {name: view(base[name]) for name in ("student", "teacher")}
    if "labels" in base:
        inputs["labels"] = torch.zeros(
            inputs["student"].shape[:-1], dtype=torch.int64, device=device
        )
    packed = {name: x.contiguous() for name, x in inputs.items()}
    value = loss(inputs, backend=backend, reduction="none")
    expected = loss(packed, backend=backend, reduction="none")
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype_pair(request):
    return request.param


@pytest.fixture
def logits(device):
    return LOSSES["kd_loss"].inputs(6, 30, dtype=torch.float64, device=device)


def test_kinds_with_a_function_of_their_own(logits, backend, device):
    del logits["labels"]
    options = {"temperature": 2.0, "backend": backend}
    for kind, function, parameters in (
        ("forward_kl", kd.kl_div, {}),
        ("reverse_kl", kd.reverse_kl_div, {}),
        ("js", kd.js_div, {"beta": 0.2}),
        ("tv", kd.tv_distance, {}),
    ):
        expected = function(**logits, **options, **parameters)
        actual = kd.divergence(**logits, kind=kind, **options, **parameters)
        assert torch.equal(actual, expected), kind


def test_limits_of_the_parameters(logits, backend, device):
    del logits["labels"]

    def value(kind, **parameters):
        return kd.divergence(**logits, kind=kind, backend=backend, **parameters)

    forward, reverse = value("forward_kl"), value("reverse_kl")
    for kind, parameters, expected in (
        ("js", {"beta": 0.0}, forward),
        ("js", {"beta": 1.0}, reverse),
        ("alpha", {"alpha": 1.0}, forward),
        ("alpha", {"alpha": 0.0}, reverse),
        ("renyi", {"alpha": 1.0}, forward),
        ("skew_forward", {"alpha": 0.0}, forward),
        ("skew_reverse", {"alpha": 0.0}, reverse),
        ("jeffreys", {}, forward + reverse),
        ("alpha", {"alpha": 0.5}, 4 * value("hellinger")),
        ("alpha", {"alpha": 2.0}, value("chi2") / 2),
    ):
        close(value(kind, **parameters), expected, rel=1e-10)
    for kind in ("skew_forward", "skew_reverse"):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\)"):
            value(kind, alpha=1.0)


def test_defaults_of_the_parameters(logits, backend, device):
    del logits["labels"]
    for kind, parameters in (
        ("js", {"beta": 0.5}),
        ("skew_forward", {"alpha": 0.1}),
        ("skew_reverse", {"alpha": 0.1}),
        ("alpha", {"alpha": 0.5}),
        ("renyi", {"alpha": 0.5}),
        ("ab", {"alpha": 0.2, "beta": 0.7}),
    ):
        default = kd.divergence(**logits, kind=kind, backend=backend)
        assert torch.equal(
            default, kd.divergence(**logits, kind=kind, backend=backend, **parameters)
        )


def test_kd_loss_weights(logits, backend, device):
    ce = F.cross_entropy(logits["student"], logits["labels"])
    kl = kd.kl_div(logits["student"], logits["teacher"], temperature=4.0, backend=backend)
    for options, expected in (
        ({}, 0.1 * ce + 0.9 * kl),
        ({"alpha": 0.3}, 0.7 * ce + 0.3 * kl),
        ({"alpha": 0.3, "compat": "torchdistill"}, 0.3 * ce + 0.7 * kl),
        ({"alpha": 0.3, "compat": "takd"}, 0.7 * ce + 0.3 * kl / 30),
        ({"ce_weight": 1.0, "kd_weight": 9.0}, ce + 9 * kl),
        ({"ce_weight": 0.0, "kd_weight": 1.0}, kl),
        ({"ce_weight": 1.0, "kd_weight": 0.0}, ce),
    ):
        close(kd.kd_loss(**logits, backend=backend, **options), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_cross_entropy_is_torchs(logits, smoothing, kind, backend, device):
    if kind == "probabilities":
        logits["labels"] = torch.rand_like(logits["student"]).softmax(-1)
    options = {"label_smoothing": smoothing, "ce_weight": 1.0, "kd_weight": 0.0}
    expected = F.cross_entropy(logits["student"], logits["labels"], label_smoothing=smoothing)
    close(kd.kd_loss(**logits, **options, backend=backend), expected)


def test_teacher_temperature_defaults_to_the_students(loss, backend, device):
    if "teacher_temperature" in loss.hyper:
        pytest.skip("its teacher has a temperature of its own")
    inputs = loss.inputs(5, 30, dtype=torch.float64, device=device)
    per_row = torch.linspace(1, 3, 5, dtype=torch.float64, device=device)
    for temperature in (3.0, per_row):
        both = {"temperature": temperature, "teacher_temperature": temperature}
        alone = loss(inputs, backend=backend, temperature=temperature)
        close(loss(inputs, backend=backend, **both), alone)


def test_tensor_temperature_is_the_number(loss, backend, device):
    inputs = loss.inputs(5, 30, dtype=torch.float64, device=device)
    expected = loss(inputs, backend=backend, temperature=3.0)
    for shape in ((), (1,), (5,)):
        temperature = torch.full(shape, 3.0, device=device)
        close(loss(inputs, backend=backend, temperature=temperature), expected)


def test_rows_do_not_see_each_other(loss, backend, device):
    inputs = loss.inputs(9, 50, device=device, optional=True)
    rows = loss(inputs, backend=backend, reduction="none")
    for i in range(9):
        row = {name: x[i : i + 1] for name, x in inputs.items()}
        assert torch.equal(loss(row, backend=backend, reduction="none"), rows[i : i + 1])


def test_autocast_changes_nothing(loss, backend, device):
    inputs = loss.inputs(5, 30, device=device)
    expected = loss(inputs, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        value = loss(inputs, backend=backend)
    assert value.dtype == torch.float32 and torch.equal(value, expected)


def test_large_logits_are_finite(loss, backend, device):
    inputs = loss.inputs(4, 50, device=device)
    inputs |= {name: 1e4 * inputs[name].sign() for name in ("student", "teacher")}
    for dtype in (torch.float32, torch.float16):
        cast = inputs | {name: inputs[name].to(dtype) for name in ("student", "teacher")}
        if loss.name in ("divergence_chi2",):  # sum t^2/s overflows by its own value
            cast["student"] = cast["teacher"]
        assert loss(cast, backend=backend).isfinite()


MODULES = {
    "kl_div": modules.SoftKLDivLoss,
    "reverse_kl_div": modules.ReverseKLDivLoss,
    "js_div": modules.JSDivLoss,
    "tv_distance": modules.TVDistanceLoss,
    "divergence": modules.DivergenceLoss,
    "kd_loss": modules.KDLoss,
    "dkd_loss": modules.DKDLoss,
    "nkd_loss": modules.NKDLoss,
    "ats_loss": modules.ATSLoss,
    "wsld_loss": modules.WSLDLoss,
}


def test_modules_are_their_functions(loss, backend, device):
    inputs = loss.inputs(5, 30, device=device)
    module = MODULES[loss.function.__name__](**loss.hyper, backend=backend)
    assert torch.equal(module(**inputs), loss(inputs, backend=backend))
    mask = torch.tensor([True, True, False, True, False], device=device)
    per_row = {"mask": mask, "row_weight": torch.rand(5, device=device)}
    assert torch.equal(module(**inputs, **per_row), loss(inputs | per_row, backend=backend))


def test_module_learns_its_temperature(backend, device):
    inputs = LOSSES["kl_div"].inputs(5, 30, device=device)
    learned = modules.SoftKLDivLoss(temperature=nn.Parameter(torch.tensor(3.0)), backend=backend)
    learned.to(device)
    assert [name for name, _ in learned.named_parameters()] == ["temperature"]
    learned(**inputs).backward()
    assert learned.temperature.grad.abs() > 0
    fixed = modules.SoftKLDivLoss(temperature=torch.tensor(3.0), backend=backend)
    assert list(fixed.state_dict()) == ["temperature"] and not list(fixed.parameters())


def test_module_survives_copies():
    inputs = LOSSES["kl_div"].inputs(5, 30)
    module = modules.JSDivLoss(
        beta=0.2, temperature=nn.Parameter(torch.tensor(3.0)), backend="reference"
    )
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(same) == repr(module)
        assert torch.equal(same(**inputs), module(**inputs))
    other = modules.JSDivLoss(beta=0.2, temperature=nn.Parameter(torch.tensor(1.0)))
    other.load_state_dict(module.state_dict())
    assert other.temperature == 3.0


def test_module_repr_is_the_call_that_makes_it():
    assert repr(modules.KDLoss()) == "KDLoss()"
    module = modules.DivergenceLoss(kind="js", beta=0.1, temperature=2.0)
    assert repr(module) == "DivergenceLoss(kind='js', beta=0.1, temperature=2.0)"
    learned = modules.JSDivLoss(temperature=nn.Parameter(torch.ones(3)))
    assert repr(learned) == "JSDivLoss(temperature=<learned, shape (3,)>)"
    module.temperature = 3.0
    assert module.temperature == 3.0 and math.isclose(module.beta, 0.1)
