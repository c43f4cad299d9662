# SPDX-License-Identifier: Apache-2.0
"""What every loss over features promises, over the registry's entries of those families."""

from __future__ import annotations

import pytest
import torch

from kdkernels.testing import LOSSES, assert_close_to_oracle, gradients, leaves

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
ENTRIES = [x for x in LOSSES.values() if x.features]
entries = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
each = pytest.mark.parametrize(
    ("entry", "backend"),
    [pytest.param(x, b, id=f"{x.name}-{b}") for x in ENTRIES for b in x.backends()],
)
kernels = pytest.mark.parametrize(
    ("entry", "backend"),
    [
        pytest.param(x, b, id=f"{x.name}-{b}")
        for x in ENTRIES
        for b in x.backends()
        if b != "reference"
    ],
)


def sizes(entry):
    """The entry's small shape, and a batch of one."""
    return entry.small, (1, *entry.small[1:])


@entries
def test_reference_is_the_published_formula(entry):
    inputs = entry.inputs(*entry.small, dtype=torch.float64, requires_grad=True)
    value, expected = entry(inputs, backend="reference"), entry.eager(**inputs, **entry.hyper)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-14)
    wanted = gradients(expected, inputs)
    for name, gradient in gradients(value, inputs).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-8, atol=1e-11)


def assert_passes(entry, inputs, backend, upstream=None):
    exact, plain = leaves(inputs, torch.float64), leaves(inputs)
    oracle, value = entry(exact, backend="reference"), entry(inputs, backend=backend)
    eager = entry.eager(**plain, **entry.hyper)
    assert_close_to_oracle(value, eager, oracle, "loss")
    up = [None if upstream is None else torch.as_tensor(upstream, dtype=x.dtype)
          for x in (value, eager, oracle)]  # fmt: skip
    actual, yardstick, wanted = (
        gradients(v, x, u)
        for v, x, u in zip((value, eager, oracle), (inputs, plain, exact), up, strict=True)
    )
    for name, gradient in actual.items():
        assert gradient.dtype == inputs[name].dtype and gradient.shape == inputs[name].shape
        assert_close_to_oracle(gradient, yardstick[name], wanted[name], name)


@dtypes
@each
def test_value_and_gradients(entry, backend, dtype):
    inputs = entry.inputs(*entry.small, dtype=dtype, requires_grad=True)
    value = entry(inputs, backend=backend)
    assert value.shape == ()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_passes(entry, inputs, backend)
    assert_passes(entry, inputs, backend, upstream=0.5)


@each
def test_each_side_alone(entry, backend):
    for name in entry.differentiable:
        inputs = entry.inputs(*entry.small)
        if name not in inputs:
            continue
        inputs[name].requires_grad_()
        assert_passes(entry, inputs, backend)


@each
def test_mixed_dtypes(entry, backend):
    for student, teacher in ((torch.float32, torch.bfloat16), (torch.float16, torch.float32)):
        inputs = entry.inputs(*entry.small, dtype=torch.float64)
        inputs["student"] = inputs["student"].to(student)
        inputs["teacher"] = inputs["teacher"].to(teacher)
        for name, tensor in inputs.items():
            if name not in ("student", "teacher") and tensor.is_floating_point():
                inputs[name] = tensor.float()
        inputs["student"].requires_grad_()
        plain = leaves(inputs)
        oracle = entry(leaves(inputs, torch.float64), backend="reference")
        value = entry(inputs, backend=backend)
        assert value.dtype == torch.float32
        assert_close_to_oracle(value, entry(plain, backend="reference"), oracle)
        assert gradients(value, inputs)["student"].dtype == student


def strided(x):
    return torch.stack([x, x], -1)[..., 0]


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def sliced_batch(x):
    return torch.cat([x, x])[::2] if len(x) == 1 else torch.stack([x, x], 1)[:, 0]


@pytest.mark.parametrize("view", [strided, channels_last, sliced_batch])
@each
def test_layouts(entry, backend, view):
    packed = entry.inputs(*entry.small, requires_grad=True)
    inputs = dict(packed)
    for name in ("student", "teacher"):
        inputs[name] = view(packed[name].detach()).requires_grad_(packed[name].requires_grad)
        assert inputs[name].shape == packed[name].shape
    value, expected = entry(inputs, backend=backend), entry(packed, backend=backend)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    wanted = gradients(expected, packed)
    for name, gradient in gradients(value, inputs).items():
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5 * scale)


@each
def test_gradcheck(entry, backend):
    if entry.stops:
        pytest.skip("its gradient is not the derivative of its value, as published")
    inputs = entry.inputs(*entry.small, dtype=torch.float64)
    names = [name for name in entry.differentiable if name in inputs]
    fixed = {name: x for name, x in inputs.items() if name not in names}

    def function(*tensors):
        return entry(fixed | dict(zip(names, tensors, strict=True)), backend=backend)

    tensors = [inputs[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@each
def test_one_sample_and_no_sample(entry, backend):
    for rows in (1, 0):
        inputs = entry.inputs(rows, *entry.small[1:], requires_grad=True)
        value = entry(inputs, backend=backend)
        assert value.isfinite() and (rows or value == 0)
        for gradient in gradients(value, inputs).values():
            assert gradient.isfinite().all()


@each
def test_zero_and_identical_features_are_finite(entry, backend):
    inputs = entry.inputs(*entry.small)
    for student in (torch.zeros_like(inputs["student"]), inputs["teacher"]):
        if student.shape != inputs["student"].shape:
            continue
        given = inputs | {"student": student.clone().requires_grad_()}
        value = entry(given, backend=backend)
        assert value.isfinite()
        assert gradients(value, given)["student"].isfinite().all()


@each
def test_autocast_changes_nothing(entry, backend):
    inputs = entry.inputs(*entry.small)
    expected = entry(inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = entry(inputs, backend=backend)
    assert value.dtype == torch.float32 and torch.equal(value, expected)


@each
def test_used_twice_and_kept(entry, backend):
    inputs = entry.inputs(*entry.small, requires_grad=True)
    expected = gradients(entry(inputs, backend=backend), inputs)
    value = entry(inputs, backend=backend)
    leaf = inputs["student"]
    (doubled,) = torch.autograd.grad(value, leaf, torch.tensor(2.0), retain_graph=True)
    (again,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(again, expected["student"])
    torch.testing.assert_close(doubled, 2 * again)


@each
def test_fp16_survives_a_grad_scaler(entry, backend):
    """Gradients that vanish in fp16 until they are scaled."""
    inputs = entry.inputs(*entry.small, dtype=torch.float16)
    inputs["student"].requires_grad_()
    exact = leaves(inputs, torch.float64)
    tiny, scale = 2.0**-20, 2.0**20
    (wanted,) = torch.autograd.grad(entry(exact, backend="reference"), exact["student"])
    (entry(inputs, backend=backend) * tiny * scale).backward()
    gradient = inputs["student"].grad.double()
    assert (gradient - wanted).norm() <= 2e-3 * wanted.norm() + 1e-7 * wanted.numel() ** 0.5


@pytest.mark.parametrize("size", [1e-4, 30.0])
@kernels
def test_fp16_of_any_size(entry, backend, size):
    """What fp16 holds of a gradient is right, whatever averaging and normalising make of it."""
    inputs = entry.inputs(*entry.small, dtype=torch.float16)
    inputs |= {side: inputs[side] * size for side in ("student", "teacher")}
    inputs["student"].requires_grad_()
    exact = leaves(inputs, torch.float64)
    (wanted,) = torch.autograd.grad(entry(exact, backend="reference"), exact["student"])
    (gradient,) = torch.autograd.grad(entry(inputs, backend=backend), inputs["student"])
    held = wanted.abs() < torch.finfo(torch.float16).max
    error = (gradient.double() - wanted)[held].norm()
    assert error <= 2e-3 * wanted[held].norm() + 1e-7 * wanted.numel() ** 0.5


@kernels
def test_second_derivatives_are_refused(entry, backend):
    inputs = entry.inputs(*entry.small, requires_grad=True)
    with pytest.raises(RuntimeError, match=r'create_graph.*backend="reference"'):
        torch.autograd.grad(entry(inputs, backend=backend), inputs["student"], create_graph=True)

    def function(student):
        return entry(inputs | {"student": student}, backend=backend)

    with pytest.raises(RuntimeError, match=r'torch\.func.*backend="reference"'):
        torch.func.grad(function)(inputs["student"].detach())


@pytest.mark.parametrize("upstream", [1.0, 0.5])
@each
def test_fullgraph(entry, backend, upstream):
    torch._dynamo.reset()
    inputs = entry.inputs(*entry.small, requires_grad=True)
    compiled = torch.compile(
        lambda i: entry(i, backend=backend), fullgraph=True, backend="aot_eager"
    )
    up = torch.tensor(upstream)
    wanted = gradients(entry(inputs, backend=backend), inputs, up)
    value = compiled(inputs)
    torch.testing.assert_close(value, entry(inputs, backend=backend), rtol=1e-5, atol=1e-7)
    for key, gradient in gradients(value, inputs, up).items():
        scale = wanted[key].abs().max().item()
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-4, atol=1e-5 * scale)


@each
def test_threads_change_nothing(entry, backend):
    inputs = entry.inputs(*entry.small, requires_grad=True)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        value = entry(inputs, backend=backend)
        found.append([value.detach(), *gradients(value, inputs).values()])
    torch.set_num_threads(before)
    if backend == "reference":
        return  # torch's own sums may differ in their last bits
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@entries
def test_bad_tensors(entry):
    inputs = entry.inputs(*entry.small)
    name = entry.function.__name__
    for change, error, message in (
        ({"student": None}, TypeError, "student"),
        ({"teacher": inputs["teacher"].int()}, TypeError, "teacher must be float64"),
        ({"teacher": inputs["teacher"][:-1]}, ValueError, "teacher must have the student's"),
        ({"teacher": inputs["teacher"].to("meta")}, ValueError, "teacher must be on the student's"),
        ({"student": inputs["student"].sum()}, ValueError, "student must have shape"),
    ):
        with pytest.raises(error, match=rf"^{name}: {message}"):
            entry(inputs | change)
