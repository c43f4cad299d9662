# SPDX-License-Identifier: Apache-2.0
"""One test per mistake found in published fused or eager distillation losses: not made here."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from kdkernels.testing import LOSSES, gradients, leaves, relative_errors

# A divergence of identical logits is 0; a cross-entropy is not.
DIVERGENCES = [loss for loss in LOSSES.values() if loss.by_row and loss.divergence]
divergences = pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda loss: loss.name)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_gradient_is_that_of_the_returned_number(loss, backend, device, temperature):
    """axolotl multiplied the loss by T^2 and not its gradient, which was then T^2 too small."""
    if loss.stops:
        pytest.skip("its gradient is not the derivative of its value, as published")
    inputs = loss.inputs(3, 17, dtype=torch.float64, device=device, requires_grad=True)
    value = loss(inputs, backend=backend, temperature=temperature)
    step = 1e-6
    for name, gradient in gradients(value, inputs).items():
        direction = torch.randn_like(gradient)

        def moved(sign, name=name, direction=direction):
            shifted = inputs | {name: inputs[name].detach() + sign * step * direction}
            return loss(shifted, backend=backend, temperature=temperature).item()

        slope = (moved(1) - moved(-1)) / (2 * step)
        assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-6, abs=1e-8), name


@divergences
def test_missing_classes_are_minus_infinity(divergence, backend, device):
    """Liger padded a smaller student vocabulary with zeros: 5.354 for a KL of 5.735."""
    inputs = divergence.inputs(4, 50, dtype=torch.float64, device=device, requires_grad=True)
    padding = torch.full((4, 14), -math.inf, dtype=torch.float64, device=device)
    padded = {name: torch.cat([x, padding], -1) for name, x in inputs.items()}
    value = divergence(inputs, backend=backend)
    wide = divergence(padded, backend=backend)
    assert wide.item() == pytest.approx(value.item(), rel=1e-12)
    expected, actual = gradients(value, inputs), gradients(wide, inputs)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-10, atol=1e-14)


def test_backward_repeats(loss, backend, device):
    """Liger's and FLA's second backward through a kept graph returned a scaled gradient."""
    inputs = loss.inputs(4, 33, device=device, requires_grad=True)
    value = loss(inputs, backend=backend)
    leaf = list(inputs[name] for name in ("student", "teacher"))
    first = torch.autograd.grad(value, leaf, torch.tensor(2.0, device=device), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    again = torch.autograd.grad(value, leaf, torch.tensor(2.0, device=device), retain_graph=True)
    last = torch.autograd.grad(value, leaf)
    for a, b, c, d in zip(first, kept, again, last, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
        torch.testing.assert_close(a, 2 * d)


@divergences
def test_temperature_divides_both_sides(divergence, backend, device):
    """Fast-LLM's temperature reached the teacher alone: 0.5819 for a KL of 0.2129."""
    inputs = divergence.inputs(4, 33, dtype=torch.float64, device=device)
    cold = {"student": inputs["student"] / 2, "teacher": inputs["teacher"] / 3}
    expected = divergence(cold, backend=backend, temperature=1.0).item()
    options = {"backend": backend, "temperature": 2.0, "teacher_temperature": 3.0}
    assert divergence(inputs, **options, scale="none").item() == pytest.approx(expected, rel=1e-12)
    assert divergence(inputs, **options).item() == pytest.approx(4 * expected, rel=1e-12)


@divergences
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_identical_logits_give_zero(divergence, dtype, backend, device):
    """torchtune's "forward KL" of identical logits is their entropy, 3.11."""
    teacher = divergence.inputs(5, 300, dtype=dtype, device=device)["teacher"]
    inputs = {"student": teacher.clone().requires_grad_(), "teacher": teacher.requires_grad_()}
    value = divergence(inputs, backend=backend)
    assert value.item() == 0
    for name, gradient in gradients(value, inputs).items():
        assert not gradient.any(), name


@pytest.mark.parametrize("off", ["student", "teacher", "both", "mixed"])
@divergences
def test_minus_infinity(divergence, off, backend, device):
    """NaN losses (FLA, TRL, unsloth, Fast-LLM, Liger), or finite ones with NaN gradients."""
    inputs = divergence.inputs(1, 9, dtype=torch.float64, device=device)
    if off in ("student", "mixed"):
        inputs["student"][:, 2] = -math.inf
    if off in ("teacher", "mixed"):
        inputs["teacher"][:, 5] = -math.inf
    if off in ("both", "mixed"):
        inputs["student"][:, 6] = inputs["teacher"][:, 6] = -math.inf
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    value = divergence(inputs, backend=backend)
    actual = gradients(value, inputs)

    # Plain torch in the limit: a class that is off on both sides is left out, and one that is off
    # on one side gets a probability near the smallest there is.
    on = ~(inputs["student"].isneginf() & inputs["teacher"].isneginf())[0]

    def at(depth):
        floor = -depth * divergence.hyper["temperature"]
        limit = {name: x.detach()[:, on].clamp(min=floor) for name, x in inputs.items()}
        limit = {name: x.requires_grad_() for name, x in limit.items()}
        return limit, divergence.eager(**limit, **divergence.hyper)

    limit, expected = at(600)
    infinite = expected.item() > 1.1 * at(300)[1].item()
    wanted = gradients(expected, limit)
    for name, gradient in actual.items():
        assert not gradient[:, ~on].any(), name
        if infinite and not (divergence.name == "kl_div" and name == "student"):
            assert not gradient.any(), name
        else:
            torch.testing.assert_close(gradient[:, on], wanted[name], rtol=1e-9, atol=1e-12)
    assert value.item() == (math.inf if infinite else pytest.approx(expected.item(), rel=1e-10))


@functools.cache
def _close_rows(divergence, size):
    """Rows at a true KL of about ``size``, with the oracle's values and gradients."""
    generator = torch.Generator().manual_seed(1)
    teacher, noise = torch.randn(2, 64, 4096, generator=generator)
    inputs = {"student": teacher + math.sqrt(2 * size) * noise, "teacher": teacher}
    exact = {name: x.double().requires_grad_() for name, x in inputs.items()}
    rows = divergence(exact, backend="reference", reduction="none", temperature=1.0)
    return inputs, rows.detach(), gradients(rows, exact)


@pytest.mark.parametrize("size", [6e-3, 6e-5, 6e-7, 6e-9])
@divergences
def test_no_cancellation(divergence, size, backend, device):
    """At a true KL of 6.3e-7 torch's error is 88 %, TRL's 113 %; at 6.3e-9 both go negative."""
    inputs, oracle, wanted = _close_rows(divergence, size)
    inputs = {name: x.to(device).requires_grad_() for name, x in inputs.items()}
    rows = divergence(inputs, backend=backend, reduction="none", temperature=1.0)
    assert (rows >= 0).all()
    assert ((rows.cpu().double() - oracle).abs() / oracle.abs()).max() <= 2e-6
    if divergence.name == "tv_distance":
        return  # the sign of p_t - p_s, which no fp32 arithmetic has where they are this equal
    for name, gradient in gradients(rows, inputs).items():
        assert relative_errors(gradient.cpu(), wanted[name])[0] <= 4e-6, name


@pytest.mark.parametrize("temperature", [20.0, 100.0, 1000.0])
@divergences
def test_high_temperature(divergence, temperature, backend, device):
    """At T = 1000 the usual form keeps two digits in fp32."""
    inputs = divergence.inputs(16, 1000, device=device, requires_grad=True)
    exact = leaves(inputs, torch.float64)
    value = divergence(inputs, backend=backend, temperature=temperature)
    oracle = divergence(exact, backend="reference", temperature=temperature)
    assert relative_errors(value, oracle)[0] <= 2e-6
    wanted = gradients(oracle, exact)
    for name, gradient in gradients(value, inputs).items():
        assert relative_errors(gradient, wanted[name])[0] <= 4e-6, name


@divergences
def test_collapsed_softmax(divergence, backend, device):
    """Rows with one class at 1 - 1e-10: ``p_s - p_t`` is all rounding there, in most peers."""
    generator = torch.Generator().manual_seed(1)
    teacher, noise = torch.randn(2, 8, 1000, generator=generator)
    teacher[:, 3] += 30
    inputs = {"student": (teacher + noise).to(device), "teacher": teacher.to(device)}
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    exact = leaves(inputs, torch.float64)
    value = divergence(inputs, backend=backend, temperature=1.0)
    oracle = divergence(exact, backend="reference", temperature=1.0)
    assert relative_errors(value, oracle)[0] <= 5e-6
    if divergence.name == "tv_distance":
        return  # its gradient is 0 up to the mass outside that class
    wanted = gradients(oracle, exact)
    for name, gradient in gradients(value, inputs).items():
        assert relative_errors(gradient, wanted[name])[0] <= 4e-6, name


def test_inputs_are_left_alone(loss, backend, device):
    """SpecForge's backward wrote the gradient into the caller's logits."""
    inputs = loss.inputs(4, 33, device=device, requires_grad=True)
    before = leaves(inputs)
    before = {name: x.clone() for name, x in before.items()}
    gradients(loss(inputs, backend=backend), inputs, torch.tensor(0.5, device=device))
    for name, x in inputs.items():
        assert torch.equal(x, before[name]) and x._version == 0, name


def test_mean_is_over_rows_that_count(loss, backend, device):
    """SpecForge divided by all rows, Liger's chunked losses ignored ignore_index."""
    inputs = loss.inputs(6, 33, dtype=torch.float64, device=device)
    counts = torch.tensor([True, False, True, True, False, False], device=device)
    expected = loss({name: x[counts] for name, x in inputs.items()}, backend=backend).item()
    assert loss(inputs | {"mask": counts}, backend=backend).item() == pytest.approx(expected)
    labels = inputs.get("labels", torch.zeros(6, dtype=torch.int64, device=device))
    labels = labels.masked_fill(~counts, -100)
    assert loss(inputs | {"labels": labels}, backend=backend).item() == pytest.approx(expected)


@divergences
def test_scale_is_explicit(divergence, backend, device):
    """Half of the peers multiply by T^2 and half do not, some by the path taken."""
    inputs = divergence.inputs(6, 33, dtype=torch.float64, device=device)
    scaled = divergence(inputs, backend=backend, temperature=3.0, scale="t2")
    plain = divergence(inputs, backend=backend, temperature=3.0, scale="none")
    assert scaled.item() == pytest.approx(9 * plain.item(), rel=1e-12)
