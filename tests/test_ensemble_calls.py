# SPDX-License-Identifier: Apache-2.0
"""Several teachers as they are handed over: layouts, autograd, threads, compile, errors."""

from __future__ import annotations

import math

import pytest
import torch
from test_ensemble import ENTRIES, forms, losses

from kdkernels import functional as kd
from kdkernels import modules
from kdkernels.testing import gradients, leaves

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
    base = ENTRIES[0].inputs(6, 9, 40, dtype=dtype, device=device)
    x = {name: LAYOUTS[layout](t) for name, t in base.items()}
    options = {"form": form, "reduction": "none", "backend": backend}
    expected = kd.multi_teacher_kl_div(**{n: t.contiguous() for n, t in x.items()}, **options)
    value = kd.multi_teacher_kl_div(**x, **options)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    listed = kd.multi_teacher_kl_div(x["student"], [t.clone() for t in x["teachers"]], **options)
    torch.testing.assert_close(listed, expected, rtol=1e-6, atol=1e-7)


def test_a_sequence_gets_its_gradients_apart(backend, device):
    x = ENTRIES[0].inputs(6, 40, device=device, requires_grad=True)
    stacked = gradients(kd.multi_teacher_kl_div(**x, backend=backend), x)["teachers"]
    teachers = [t.detach().clone().requires_grad_(i != 1) for i, t in enumerate(x["teachers"])]
    value = kd.multi_teacher_kl_div(x["student"], teachers, backend=backend)
    apart = torch.autograd.grad(value, [teachers[0], teachers[2]])
    torch.testing.assert_close(torch.stack(apart), stacked[::2])


def test_fp16_gradients_survive_scaling(backend, device):
    x = ENTRIES[0].inputs(512, 1000, dtype=torch.float16, device=device, requires_grad=True)
    scale = 2.0**14
    value = kd.multi_teacher_kl_div(**x, temperature=2.0, backend=backend) * scale
    exact = leaves(x, torch.float64)
    oracle = kd.multi_teacher_kl_div(**exact, temperature=2.0, backend="reference") * scale
    wanted = gradients(oracle, exact)
    for name, gradient in gradients(value, x).items():
        error = (gradient.double() - wanted[name]).norm() / wanted[name].norm()
        assert error <= 1e-3, name


def test_backward_of_a_kept_graph_repeats(backend, device):
    x = ENTRIES[0].inputs(4, 33, device=device, requires_grad=True)
    value = kd.multi_teacher_kl_div(**x, backend=backend)
    two = torch.tensor(2.0, device=device)
    first = torch.autograd.grad(value, list(x.values()), two, retain_graph=True)
    second = torch.autograd.grad(value, list(x.values()), two)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_second_order_needs_the_reference(kernel, device):
    x = ENTRIES[0].inputs(4, 33, device=device, requires_grad=True)
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
    "shape": ({"teachers": S}, ValueError, r"teachers must have shape \(M, 4, 10\) .*got"),
    "no teachers": ({"teachers": T[:0]}, ValueError, r"teachers .* shape \(M, 4, 10\) with M >= 1"),
    "empty sequence": ({"teachers": []}, TypeError, "teachers must be a tensor .* at least one"),
    "no sequence": ({"teachers": 3}, TypeError, "teachers must be a tensor .* got 3"),
    "one of another shape": ({"teachers": [S, S[:, 1:]]}, ValueError, "teacher must have the stud"),
    "two dtypes": ({"teachers": [S, S.half()]}, TypeError, "teachers must have one dtype, got"),
    "dtype": ({"teachers": T.int()}, TypeError, "teacher must be float64"),
    "form": ({"form": "mean"}, ValueError, "form must be one of sum, mixture, got 'mean'"),
    "weights": ({"weights": 1.0}, TypeError, "weights must be a tensor, got float"),
    "too few numbers": ({"weights": [1.0]}, ValueError, "weights must be 3 numbers, got 1"),
    "no numbers": ({"weights": [1.0, "2", None]}, TypeError, "weights must be a number, got str"),
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


def test_weights_as_numbers(backend, device):
    x = ENTRIES[0].inputs(5, 30, device=device)
    weights = torch.tensor([0.2, 0.3, 0.5], device=device)
    for form in ("sum", "mixture"):
        options = {"form": form, "backend": backend}
        value = kd.multi_teacher_kl_div(**x, weights=(0.2, 0.3, 0.5), **options)
        expected = kd.multi_teacher_kl_div(**x, weights=weights, **options)
        torch.testing.assert_close(value, expected)
        module = modules.MultiTeacherKLDivLoss(weights=[0.2, 0.3, 0.5], **options)
        assert torch.equal(module(**x), value)


def test_module(backend, device):
    x = ENTRIES[0].inputs(5, 30, device=device)
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
