# SPDX-License-Identifier: Apache-2.0
"""Gradients over the registry against the reference in float64, and the rules of the backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kdkernels import functional as kd
from kdkernels.testing import LOSSES, assert_close_to_oracle, gradients, leaves

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
TEMPERATURES = ["temperature", "teacher_temperature"]
REDUCTIONS = ["none", "sum", "batchmean", "mean"]


def assert_gradients(loss, inputs, backend, plain=None, upstream=None, **options):
    """Every gradient by the pass rule; ``plain`` makes the yardstick's value from the inputs."""
    exact = leaves(inputs, torch.float64)
    oracle = loss(exact, backend="reference", **options)
    plain_inputs = leaves(inputs)
    plain = plain or (lambda x: loss(x, backend="reference", **options))
    value = loss(inputs, backend=backend, **options)
    if upstream is not None:
        upstream = torch.as_tensor(upstream, device=value.device, dtype=torch.float64)
        upstream = upstream.expand(value.shape)
    actual, yardstick, wanted = (
        gradients(v, x, None if upstream is None else upstream.to(v.dtype))
        for v, x in ((value, inputs), (plain(plain_inputs), plain_inputs), (oracle, exact))
    )
    assert actual.keys() == wanted.keys()
    for name, gradient in actual.items():
        assert gradient.dtype == inputs[name].dtype and gradient.shape == inputs[name].shape
        assert_close_to_oracle(gradient, yardstick[name], wanted[name], f"{name} {options}")


@dtypes
def test_gradient(loss, dtype, backend, device):
    for classes in (n for n in (1, 2, 10, 100, 127, 1001, 4096) if n >= loss.fewest_classes):
        inputs = loss.inputs(5, classes, dtype=dtype, device=device, seed=1, requires_grad=True)
        assert_gradients(loss, inputs, backend, lambda x: loss.eager(**x, **loss.hyper))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@dtypes
def test_all_arguments(loss, dtype, reduction, backend, device):
    """Student, teacher, both temperatures per row and row weights, masked, under any upstream."""
    inputs = loss.inputs(3, 5, 50, dtype=dtype, device=device, optional=True, requires_grad=True)
    inputs["mask"] = torch.rand(3, 5, device=device) < 0.7
    for scale in ("t2", "none"):
        for upstream in (None, 0.5) if reduction != "none" else (None, torch.rand(3, 5)):
            options = {"reduction": reduction, "scale": scale}
            assert_gradients(loss, inputs, backend, upstream=upstream, **options)


@pytest.mark.parametrize(
    ("student", "teacher"), [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str
)
def test_mixed_dtypes(loss, student, teacher, backend, device):
    inputs = loss.inputs(5, 100, dtype=torch.float64, device=device)
    inputs |= {"student": inputs["student"].to(student), "teacher": inputs["teacher"].to(teacher)}
    for name in ("student", "teacher"):
        inputs[name].requires_grad_()
    assert_gradients(loss, inputs, backend)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_scalar_temperatures(loss, shape, backend, device):
    """A scalar's gradient is the sum over rows: terms of both signs, so exact to their size."""
    inputs = loss.inputs(5, 50, device=device)
    rows = {name: torch.full((5,), 2.0, dtype=torch.float64) for name in TEMPERATURES}
    rows = {name: x.to(device).requires_grad_() for name, x in rows.items()}
    exact = leaves(inputs, torch.float64)
    wanted = gradients(loss(exact | rows, backend="reference"), rows)
    both = wanted["temperature"] + wanted["teacher_temperature"]

    def check(given, expected):
        given = {n: torch.full(shape, 2.0, device=device, requires_grad=True) for n in given}
        options = {"temperature": 2.0, "teacher_temperature": None}
        value = loss(options | inputs | given, backend=backend)
        for name, gradient in gradients(value, given).items():
            assert gradient.shape == shape
            error = (gradient.double().sum() - expected[name].sum()).abs()
            assert error <= 5e-6 * expected[name].abs().sum(), name

    check(["temperature"], {"temperature": both})
    check(["temperature", "teacher_temperature"], wanted)
    check(["teacher_temperature"], wanted)


@pytest.mark.parametrize("name", ["student", "teacher", *TEMPERATURES, "row_weight"])
def test_each_argument_alone(loss, name, backend, device):
    inputs = loss.inputs(5, 50, device=device, optional=True)
    inputs[name].requires_grad_()
    assert_gradients(loss, inputs, backend)


@pytest.mark.parametrize("view", ["shifted", "transposed", "classes_first", "expanded", "strided"])
def test_layouts(loss, view, backend, device):
    base = loss.inputs(4, 6, 40, device=device)
    labels = base.pop("labels", None)
    views = {
        "shifted": lambda x: x[:, :-1],
        "transposed": lambda x: x.transpose(0, 1),
        "classes_first": lambda x: x.transpose(1, 2),
        "expanded": lambda x: x[:1].expand(4, -1, -1),
        "strided": lambda x: x[..., 1::2],
    }
    inputs = {name: views[view](x).requires_grad_() for name, x in base.items()}
    if labels is not None:
        inputs["labels"] = torch.zeros(
            inputs["student"].shape[:-1], dtype=torch.int64, device=device
        )
    packed = {name: x.detach().contiguous() for name, x in inputs.items()}
    packed |= {name: packed[name].requires_grad_() for name in ("student", "teacher")}
    expected = gradients(loss(packed, backend="reference"), packed)
    for name, gradient in gradients(loss(inputs, backend=backend), inputs).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=2e-6)


def test_labels_as_probabilities(backend, device):
    loss = LOSSES["kd_loss"]
    inputs = loss.inputs(5, 50, device=device, requires_grad=True)
    inputs["labels"] = torch.rand(5, 50, device=device).softmax(-1)
    assert_gradients(loss, inputs, backend, label_smoothing=0.1)
    inputs["labels"] = torch.rand(5, 50, device=device)  # not normalised: as torch does it
    expected = F.cross_entropy(inputs["student"], inputs["labels"])
    value = loss(inputs, backend=backend, alpha=0.0)
    wanted, actual = (torch.autograd.grad(v, inputs["student"])[0] for v in (expected, value))
    torch.testing.assert_close(actual, wanted)


def test_gradcheck(loss, backend, device):
    if loss.stops:
        pytest.skip("its gradient is not the derivative of its value, as published")
    inputs = loss.inputs(3, 4, dtype=torch.float64, device=device, optional=True)
    names = [name for name in loss.differentiable if name in inputs]
    fixed = {name: x for name, x in inputs.items() if name not in names}

    def function(*tensors):
        return loss(fixed | dict(zip(names, tensors, strict=True)), backend=backend)

    tensors = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, tensors)
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, tensors)


def test_gradient_is_zero_where_rows_do_not_count(loss, backend, device):
    inputs = loss.inputs(4, 30, device=device, optional=True, requires_grad=True)
    mask = torch.tensor([True, False, True, False], device=device)
    value = loss(inputs | {"mask": mask}, backend=backend)
    for name, gradient in gradients(value, inputs).items():
        assert not gradient[~mask].any() and gradient[mask].any(), name


def test_second_backward_needs_a_kept_graph(loss, backend, device):
    inputs = loss.inputs(4, 30, device=device, requires_grad=True)
    value = loss(inputs, backend=backend)
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()


def test_gradients_accumulate(loss, backend, device):
    inputs = loss.inputs(4, 30, device=device, requires_grad=True)
    expected = gradients(loss(inputs, backend=backend), inputs)
    for factor in (1.0, 0.5, 2.0):
        (factor * loss(inputs, backend=backend)).backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(inputs[name].grad, 3.5 * gradient)


def test_one_value_used_twice(loss, backend, device):
    inputs = loss.inputs(4, 30, device=device, requires_grad=True)
    value = loss(inputs, backend=backend)
    expected = gradients(loss(inputs, backend=backend), inputs)
    for name, gradient in gradients(value + value * value.detach(), inputs).items():
        torch.testing.assert_close(gradient, (1 + value.detach()) * expected[name])


def test_one_tensor_on_both_sides(backend, device):
    x = LOSSES["kl_div"].inputs(4, 30, device=device)["student"].requires_grad_()
    value = kd.kl_div(x, x * 1.5, backend=backend)
    y = x.detach().double().requires_grad_()
    expected = torch.autograd.grad(kd.kl_div(y, y * 1.5, backend="reference"), y)[0]
    actual = torch.autograd.grad(value, x)[0]
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-6)


def test_double_backward_is_refused(loss, kernel, device):
    inputs = loss.inputs(4, 30, device=device, requires_grad=True)
    value = loss(inputs, backend=kernel)
    with pytest.raises(RuntimeError, match=r'create_graph.*backend="reference"'):
        torch.autograd.grad(value, inputs["student"], create_graph=True)


def test_gradient_penalty_is_refused(kernel, device):
    """The penalty's own second-order term must not go missing in silence."""
    inputs = LOSSES["kl_div"].inputs(4, 30, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        value = kd.kl_div(**inputs, backend=kernel)
        (gradient,) = torch.autograd.grad(value, inputs["student"], create_graph=True)
        gradient.square().sum().backward()
    value = kd.kl_div(**inputs, backend="reference")
    (gradient,) = torch.autograd.grad(value, inputs["student"], create_graph=True)
    gradient.square().sum().backward()
    assert inputs["student"].grad.any()


def test_transforms_are_refused(kernel, device):
    inputs = LOSSES["kl_div"].inputs(4, 30, device=device)

    def function(student, backend=kernel):
        return kd.kl_div(student, inputs["teacher"], backend=backend)

    message = r'torch\.func.*backend="reference"'
    with pytest.raises(RuntimeError, match=message):
        torch.func.grad(function)(inputs["student"])
    with pytest.raises(RuntimeError, match=message):
        torch.func.vjp(function, inputs["student"])
    with pytest.raises(RuntimeError, match=message):
        torch.func.vmap(lambda s, t: kd.kl_div(s, t, backend=kernel))(*inputs.values())


def test_transforms_through_the_reference(loss):
    inputs = loss.inputs(4, 30, dtype=torch.float64, requires_grad=True)
    expected = gradients(loss(inputs, backend="reference"), inputs)["student"]
    fixed = {name: x.detach() for name, x in inputs.items()}

    def function(student):
        return loss(fixed | {"student": student}, backend="reference")

    torch.testing.assert_close(torch.func.grad(function)(fixed["student"]), expected)
    if "labels" not in fixed:

        def row(student, teacher):
            return loss({"student": student, "teacher": teacher}, backend="reference")

        rows = torch.func.vmap(row)(fixed["student"], fixed["teacher"])
        torch.testing.assert_close(rows.mean(), loss(fixed, backend="reference"))


def test_no_gradient_is_recorded_where_none_is_needed(loss, backend, device):
    inputs = loss.inputs(4, 30, device=device)
    assert not loss(inputs, backend=backend).requires_grad
    inputs["student"].requires_grad_()
    with torch.no_grad():
        assert not loss(inputs, backend=backend).requires_grad
    assert loss(inputs, backend=backend).requires_grad


def _assert_survives_scaling(rows, classes, backend, device):
    """fp16 under a GradScaler: gradients that underflow in fp16 until they are scaled."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(rows, classes, generator=generator).to(device, torch.float16) for _ in range(2)
    )
    student.requires_grad_()
    scale = 2.0**16
    (kd.kl_div(student, teacher, backend=backend) * scale).backward()
    square_error = square = zeros = 0.0
    for s, t, gradient in zip(
        student.detach().split(256), teacher.split(256), student.grad.split(256), strict=True
    ):
        wanted = (s.double().softmax(-1) - t.double().softmax(-1)) * (scale / rows)
        square_error += (gradient.double() - wanted).square().sum().item()
        square += wanted.square().sum().item()
        zeros += (gradient == 0).sum().item()
    assert (square_error / square) ** 0.5 <= 5e-4
    assert zeros <= 1e-3 * rows * classes


def test_fp16_gradients_survive_scaling(backend, device):
    _assert_survives_scaling(512, 2000, backend, device)


@pytest.mark.slow
def test_fp16_gradients_survive_scaling_at_full_size(kernel, device):
    _assert_survives_scaling(8192, 32000, kernel, device)


def _inplace_inputs(device):
    inputs = LOSSES["kl_div"].inputs(4, 30, device=device)
    leaf = inputs["student"].requires_grad_()
    return leaf, leaf * 1.0, inputs["teacher"]


@pytest.fixture
def inplace_kernel(kernel):
    if kernel != "cpu":
        pytest.skip(f"{kernel} has no in-place kernel")
    return kernel


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_inplace(inplace_kernel, device, upstream):
    leaf, student, teacher = _inplace_inputs(device)
    expected = torch.autograd.grad(kd.kl_div(leaf * 1.0, teacher, backend=inplace_kernel), leaf)[0]
    storage = student.data_ptr()
    value = kd.kl_div(student, teacher, inplace=True, backend=inplace_kernel)
    (upstream * value).backward()
    torch.testing.assert_close(leaf.grad, upstream * expected)
    assert student.data_ptr() == storage
    torch.testing.assert_close(student.detach(), upstream * expected)


def test_inplace_without_a_gradient_still_overwrites_nothing_else(inplace_kernel, device):
    _, student, teacher = _inplace_inputs(device)
    before = teacher.clone()
    kd.kl_div(student, teacher, inplace=True, backend=inplace_kernel).backward()
    assert torch.equal(teacher, before)


def test_inplace_allows_one_backward(inplace_kernel, device):
    _, student, teacher = _inplace_inputs(device)
    value = kd.kl_div(student, teacher, inplace=True, backend=inplace_kernel)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward"):
        value.backward()


def test_inplace_notices_later_writes(inplace_kernel, device):
    _, student, teacher = _inplace_inputs(device)
    value = kd.kl_div(student, teacher, inplace=True, backend=inplace_kernel)
    student.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified after"):
        value.backward()


def test_inplace_invalidates_what_saved_the_logits(inplace_kernel, device):
    """exp saves its output; autograd must notice that it now holds a gradient."""
    leaf, _, teacher = _inplace_inputs(device)
    student = leaf.exp()
    value = kd.kl_div(student, teacher, inplace=True, backend=inplace_kernel)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_inplace_refusals(inplace_kernel, device):
    leaf, student, teacher = _inplace_inputs(device)
    options = {"inplace": True, "backend": inplace_kernel}
    with pytest.raises(ValueError, match="kl_div: inplace=True needs non-leaf"):
        kd.kl_div(leaf, teacher, **options)
    with pytest.raises(ValueError, match="overlap"):
        kd.kl_div(student[:1].expand(4, -1), teacher, **options)
    with pytest.raises(NotImplementedError, match="student alone"):
        kd.kl_div(student, teacher.requires_grad_(), **options)
    with pytest.raises(NotImplementedError, match="reference"):
        kd.kl_div(student, teacher.detach(), inplace=True, backend="reference")
