# SPDX-License-Identifier: Apache-2.0
"""DIST and MLKD: values, gradients and edges of losses where rows depend on each other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from interpreter import INTERPRETED, assert_passes_interpreted

from kdkernels import functional as kd
from kdkernels.testing import LOSSES, assert_close_to_oracle, gradients, leaves, relative_errors

ENTRIES = [loss for loss in LOSSES.values() if loss.family.startswith("batchwise.")]
BACKENDS = ENTRIES[0].backends("cpu")
KERNELS = [backend for backend in BACKENDS if backend != "reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIDES = ("student", "teacher")

# Of the tests below, what runs in half a minute by Triton's interpreter: every property, each dtype
# once. `mlkd_published` differs by its weights alone, `mlkd_loss` has every term of it.
IN_THE_INTERPRETER = (
    "dist_loss-float64-shape4", "dist_loss-float32-shape2", "dist_loss-bfloat16-shape1",
    "dist_loss-float16-shape0", "mlkd_loss-float64-shape1", "mlkd_loss-float32-shape2",
    "mlkd_loss-bfloat16-shape1", "mlkd_loss-float16-shape0", "mlkd_published-float32-shape3",
    "(mixed_dtypes and not published)", "(masked and not published)", "no_rows",
    "(degenerate and (dist_loss-float16 or mlkd_loss-float32))", "constant_vectors",
    "(cancel and 0.001)", "(identical_logits and not published)",
    "(minus_infinity and not published)", "(bad_logits and (dist_loss or mlkd_loss-student-inf))",
    "temperature", "(kept_graph and 0.5 and not published)", "(higher_order and dist_loss)",
    "maps_are_rows", "affine_maps", "standardized",
)  # fmt: skip

if not INTERPRETED:

    def test_triton_in_a_process_with_the_interpreter():
        pytest.importorskip("triton", reason="triton is not installed: nothing to interpret")
        chosen = f"triton and ({' or '.join(IN_THE_INTERPRETER)})"
        assert_passes_interpreted(__file__, chosen=chosen)


losses = pytest.mark.parametrize("entry", ENTRIES, ids=lambda loss: loss.name)
on_every = pytest.mark.parametrize("where", BACKENDS)
on_kernels = pytest.mark.parametrize("where", KERNELS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
compiled = pytest.mark.skipif("cpu" not in KERNELS, reason="_C_cpu is not built")


@losses
def test_reference_is_the_published_formula(entry):
    inputs = entry.inputs(7, 50, dtype=torch.float64)
    expected = entry.eager(**inputs, **entry.hyper).item()
    assert entry(inputs, backend="reference").item() == pytest.approx(expected, rel=1e-10)


# One row, few classes, more samples than classes, several blocks of rows and of a row.
@pytest.mark.parametrize("shape", [(1, 10), (5, 2), (40, 7), (16, 100), (100, 33), (9, 1037)])
@dtypes
@losses
@on_kernels
def test_value_and_gradients(entry, dtype, shape, where):
    inputs = entry.inputs(*shape, dtype=dtype, requires_grad=True)
    exact = leaves(inputs, torch.float64)
    oracle = entry(exact, backend="reference")
    plain = entry(inputs, backend="reference")
    value = entry(inputs, backend=where)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close_to_oracle(value, plain, oracle, "value")
    wanted, same = gradients(oracle, exact), gradients(plain, inputs)
    for name, gradient in gradients(value, inputs).items():
        assert_close_to_oracle(gradient, same[name], wanted[name], name)


@pytest.mark.parametrize(("student", "teacher"), [(DTYPES[1], DTYPES[2]), (DTYPES[3], DTYPES[0])])
@losses
@on_kernels
def test_mixed_dtypes_masks_and_strides(entry, student, teacher, where):
    rows = 9 if INTERPRETED else 70
    inputs = entry.inputs(2, rows, 6, dtype=torch.float64, optional=True)
    inputs["student"] = inputs["student"].transpose(0, 1).contiguous().transpose(0, 1).to(student)
    inputs["teacher"] = inputs["teacher"].mT.contiguous().mT.to(teacher)
    inputs |= {name: inputs[name].requires_grad_() for name in SIDES}
    exact = leaves(inputs, torch.float64)
    oracle, plain = entry(exact, backend="reference"), entry(inputs, backend="reference")
    value = entry(inputs, backend=where)
    assert_close_to_oracle(value, plain, oracle, "value")
    wanted, same = gradients(oracle, exact), gradients(plain, inputs)
    for name, gradient in gradients(value, inputs).items():
        assert gradient.dtype == inputs[name].dtype
        assert_close_to_oracle(gradient, same[name], wanted[name], name)


@losses
@on_every
def test_masked_rows_are_as_if_not_there(entry, where):
    inputs = entry.inputs(9, 12, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([True, False, True, True, False, True, True, True, False])
    alone = {name: x.detach()[counts].requires_grad_() for name, x in inputs.items()}
    expected = entry(alone, backend=where)
    bad = {name: x.detach().masked_fill(~counts[:, None], math.nan) for name, x in inputs.items()}
    bad = {name: x.requires_grad_() for name, x in bad.items()}
    labels = torch.where(counts, 3, -100)
    wanted = gradients(expected, alone)
    for options in ({"mask": counts}, {"labels": labels}):
        value = entry(bad | options, backend=where)
        assert value.item() == pytest.approx(expected.item(), rel=1e-12)
        for name, gradient in gradients(value, bad).items():
            assert not gradient[~counts].any()
            torch.testing.assert_close(gradient[counts], wanted[name], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 10), (2, 0, 10)], ids=str)
@losses
@on_every
def test_no_rows(entry, shape, where):
    inputs = entry.inputs(*shape, requires_grad=True)
    value = entry(inputs, backend=where)
    assert value.shape == () and value == 0
    assert all(g.shape == inputs[n].shape for n, g in gradients(value, inputs).items())


@losses
@on_every
def test_all_rows_masked(entry, where):
    inputs = entry.inputs(5, 10, requires_grad=True)
    value = entry(inputs | {"mask": torch.zeros(5, dtype=torch.bool)}, backend=where)
    assert value == 0
    assert not any(gradient.any() for gradient in gradients(value, inputs).values())


@dtypes
@losses
@on_every
def test_degenerate_inputs_are_finite(entry, dtype, where):
    """All-equal logits, one-hot softmaxes, one class, a batch of one."""
    generator = torch.Generator().manual_seed(0)
    one_hot = torch.full((6, 10), -1e4)
    one_hot[torch.arange(6), torch.arange(6)] = 1e4
    random = torch.randn(6, 10, generator=generator)
    flat = torch.full((6, 10), 5.0)
    for student, teacher in (
        (flat, flat - 7), (one_hot, one_hot.flip(1)), (one_hot, random), (random, one_hot),
        (random[:, :1], random[:, 1:2]), (random[:1], one_hot[:1]),
        (random[:1].expand(6, 10), random[1:2].expand(6, 10)),
    ):  # fmt: skip
        inputs = {"student": student.to(dtype), "teacher": teacher.to(dtype)}
        inputs = {name: x.requires_grad_() for name, x in inputs.items()}
        value = entry(inputs, backend=where)
        assert value.isfinite()
        for name, gradient in gradients(value, inputs).items():
            assert gradient.isfinite().all(), name


@on_every
def test_constant_vectors_have_no_gradient_in_dist(where):
    """Plain torch divides the rounding of the means by 1e-8 there."""
    for rows in (1, 6, 70):
        same = torch.randn(1, 11).expand(rows, 11)
        other = torch.randn(1, 11).expand(rows, 11)
        inputs = {
            "student": same.clone().requires_grad_(),
            "teacher": other.clone().requires_grad_(),
        }
        value = kd.dist_loss(**inputs, beta=0.0, backend=where)
        # Exactly 1, but for the fp32 sum of 1 / C over the classes that Triton's is.
        assert abs(value - 1) <= (2**-23 if where == "triton" else 0)
        assert not any(gradient.any() for gradient in gradients(value, inputs).values())
    flat = {name: torch.full((4, 11), 3.0, requires_grad=True) for name in SIDES}
    value = kd.dist_loss(**flat, gamma=0.0, backend=where)
    assert value == 1
    assert not any(gradient.any() for gradient in gradients(value, flat).values())


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
@on_kernels
def test_close_distributions_do_not_cancel(distance, where):
    teacher, noise = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(1))
    for x, y in ((teacher, noise), (teacher[:, :8], noise[:, :8])):
        inputs = {"student": (x + distance * y).requires_grad_(), "teacher": x.clone()}
        inputs["teacher"].requires_grad_()
        exact = leaves(inputs, torch.float64)
        for weights in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)):
            weights = dict(
                zip(("instance_weight", "batch_weight", "class_weight"), weights, strict=True)
            )
            oracle = kd.mlkd_loss(**exact, **weights, backend="reference")
            value = kd.mlkd_loss(**inputs, **weights, backend=where)
            assert value >= 0
            assert relative_errors(value, oracle)[0] <= 2e-5, weights
            wanted = gradients(oracle, exact)
            for name, gradient in gradients(value, inputs).items():
                assert relative_errors(gradient, wanted[name])[0] <= 2e-5, (weights, name)


@losses
@on_every
def test_identical_logits(entry, where):
    teacher = entry.inputs(8, 30)["teacher"]
    inputs = {"student": teacher.clone().requires_grad_(), "teacher": teacher}
    value = entry(inputs, backend=where)
    if entry.name != "dist_loss":
        assert value == 0
        assert not gradients(value, inputs)["student"].any()
        return
    # A correlation is n / (n + eps) there, where 1 less it keeps an ulp of 1 as its error.
    p = (teacher.double() / 4).softmax(1)
    inter, intra = (
        (1e-8 / ((p - p.mean(dim, True)).square().sum(dim) + 1e-8)).mean() for dim in (1, 0)
    )
    exact, ulp = 4**2 * (inter + 2 * intra).item(), 4**2 * (1 + 2) * 2**-23
    assert value.item() == pytest.approx(exact, rel=0, abs=ulp)


@pytest.mark.parametrize("side", SIDES)
@losses
@on_every
def test_classes_at_minus_infinity(entry, side, where):
    """As probabilities of 0; a divergence of mass where the student has none is infinite."""
    inputs = entry.inputs(6, 9, dtype=torch.float64)
    inputs[side][:, 4] = -math.inf
    inputs["student"].requires_grad_()
    value = entry(inputs, backend=where)
    (gradient,) = gradients(value, inputs).values()
    assert gradient.isfinite().all() and not (
        side == "student" and gradient[:, 4].any() and entry.name == "dist_loss"
    )
    infinite = side == "student" and entry.name != "dist_loss"
    assert value.isinf() if infinite else value.isfinite()
    limit = inputs | {side: inputs[side].detach().clamp(min=-1e4)}
    if not infinite:
        assert value.item() == pytest.approx(entry(limit, backend=where).item(), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("side", SIDES)
@losses
@on_every
def test_bad_logits_give_nan(entry, side, bad, where):
    inputs = entry.inputs(6, 9)
    inputs[side][2, 3] = bad
    assert entry(inputs, backend=where).isnan()
    inputs[side][2] = -math.inf
    assert entry(inputs, backend=where).isnan()


@on_every
def test_temperature_as_a_tensor(where):
    inputs = LOSSES["dist_loss"].inputs(7, 12, dtype=torch.float64)
    expected = kd.dist_loss(**inputs, temperature=2.5, backend=where)
    for scale in ("t2", "none"):
        tau = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
        value = kd.dist_loss(**inputs, temperature=tau, scale=scale, backend=where)
        factor = 1 if scale == "t2" else 2.5**2
        assert factor * value.item() == pytest.approx(expected.item(), rel=1e-12)
        (gradient,) = torch.autograd.grad(value, tau)
        ends = [
            kd.dist_loss(**inputs, temperature=2.5 + step, scale=scale, backend=where).item()
            for step in (1e-5, -1e-5)
        ]
        assert gradient.item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)
    with pytest.raises(NotImplementedError, match="one element"):
        kd.dist_loss(**inputs, temperature=torch.ones(7), backend=where)


@on_kernels
def test_fp16_gradients_of_a_large_batch(where):
    """Below fp16's smallest number before a GradScaler's factor, exact after it."""
    inputs = LOSSES["dist_loss"].inputs(512, 1000, dtype=torch.float16)
    for loss in (LOSSES["dist_loss"], LOSSES["mlkd_published"]):
        student = inputs["student"].clone().requires_grad_()
        exact = leaves({"student": student, "teacher": inputs["teacher"]}, torch.float64)
        scale = torch.tensor(2.0**14)
        value = loss({"student": student, "teacher": inputs["teacher"]}, backend=where)
        (gradient,) = torch.autograd.grad(value, student, scale)
        (wanted,) = torch.autograd.grad(loss(exact, backend="reference"), exact["student"], scale)
        assert relative_errors(gradient, wanted)[1] <= 1e-3, loss.name


@pytest.mark.parametrize("upstream", [1.0, 0.5])
@losses
@on_every
def test_kept_graph(entry, upstream, where):
    inputs = entry.inputs(6, 20, requires_grad=True)
    value, up = entry(inputs, backend=where), torch.tensor(upstream)
    first = torch.autograd.grad(value, inputs["student"], up, retain_graph=True)[0]
    kept = first.clone()
    again = torch.autograd.grad(value, inputs["student"], up)[0]
    assert torch.equal(first, kept) and torch.equal(first, again)


# The last: probabilities that DIST does not keep.


# Batches whose temperatures are a task each, and larger ones; few and many samples.


@losses
@on_kernels
def test_higher_order_is_the_references(entry, where):
    inputs = entry.inputs(4, 6, dtype=torch.float64, requires_grad=True)
    value = entry(inputs, backend=where)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.autograd.grad(value, inputs["student"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda s: entry(inputs | {"student": s}, backend=where))(inputs["student"])
    teacher = inputs["teacher"].detach()

    def reference(student):
        return entry({"student": student, "teacher": teacher}, backend="reference")

    assert torch.autograd.gradcheck(reference, inputs["student"])
    assert torch.autograd.gradgradcheck(reference, inputs["student"])


@on_every
def test_maps_are_rows_once_classes_are_last(where):
    student, teacher = torch.randn(2, 3, 6, 4, 5, dtype=torch.float64)
    flat = [x.permute(0, 2, 3, 1).reshape(-1, 6) for x in (student, teacher)]
    expected = kd.dist_loss(*flat, backend=where)
    value = kd.dist_loss(student.movedim(1, -1), teacher.movedim(1, -1), backend=where)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)


@on_every
def test_affine_maps_of_probabilities_do_not_matter_to_inter(where):
    """What DIST is for: rows that agree up to scale and offset."""
    p = (3 * torch.randn(5, 8, dtype=torch.float64)).softmax(1)
    q = 0.3 * p + 0.7 / 8
    assert kd.dist_loss(p.log(), q.log(), gamma=0.0, backend=where).abs() < 1e-6


@on_every
def test_mlkd_is_the_sum_of_its_temperatures_and_terms(where):
    inputs = LOSSES["mlkd_loss"].inputs(7, 12, dtype=torch.float64)
    names = ("instance_weight", "batch_weight", "class_weight")
    whole = kd.mlkd_loss(
        **inputs, temperatures=(2.0, 5.0), instance_weight=0.5, batch_weight=2.0, class_weight=3.0,
        backend=where,
    )  # fmt: skip
    parts = 0
    for temperature in (2.0, 5.0):
        for weights in ((0.5, 0, 0), (0, 2.0, 0), (0, 0, 3.0)):
            parts = parts + kd.mlkd_loss(
                **inputs, temperatures=[temperature], backend=where,
                **dict(zip(names, weights, strict=True)),
            )  # fmt: skip
    assert whole.item() == pytest.approx(parts.item(), rel=1e-12)


@on_every
def test_standardized_instance_term(where):
    inputs = LOSSES["mlkd_loss"].inputs(7, 12, dtype=torch.float64, requires_grad=True)
    weights = {"batch_weight": 0.0, "class_weight": 0.0, "temperatures": [2.0], "selection": "none"}
    value = kd.mlkd_loss(**inputs, **weights, standardize=True, backend=where)
    s, t = ((x - x.mean(1, True)) / (x.std(1, keepdim=True) + 1e-7) / 2 for x in inputs.values())
    expected = 4 * F.kl_div(s.log_softmax(1), t.softmax(1), reduction="batchmean")
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    wanted = gradients(expected, inputs)
    for name, gradient in gradients(value, inputs).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-13)
    flat = {name: torch.full((3, 5), 2.0, requires_grad=True) for name in SIDES}
    value = kd.mlkd_loss(**flat, standardize=True, backend=where)
    assert value == 0
    assert not any(gradient.any() for gradient in gradients(value, flat).values())


def test_mlkd_of_confident_logits(backend, device):
    """Where the student's probabilities underflow in fp32, the teacher still has its gradient."""
    student = torch.tensor([[0.0, 0, 0], [300, 0, 0]], device=device)
    teacher = torch.tensor([[0.0, 0, 0], [0, 1, 0]], device=device, requires_grad=True)
    options = {"temperatures": (1.0,), "batch_weight": 0.0, "class_weight": 0.0}
    value = kd.mlkd_loss(student, teacher, selection="none", backend=backend, **options)
    (gradient,) = torch.autograd.grad(value, teacher)
    wide = teacher.detach().double().requires_grad_()
    exact = kd.kl_div(student.double(), wide, backend="reference")
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(exact, wide)[0], rtol=1e-5, atol=1e-6
    )
    # The selection does not depend on the precision of a probability that rounds to 1.
    teacher = torch.tensor([[20.0, 0, 0], [25, 0, 0], [30, 0, 0], [35, 0, 0]], device=device)
    student = torch.randn(4, 3, device=device)
    value = kd.mlkd_loss(student, teacher, backend=backend, **options)
    exact = kd.mlkd_loss(student.double(), teacher.double(), backend=backend, **options)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)


def test_mlkd_reads_masked_rows_no_more_than_others_hide(backend, device):
    student, teacher = torch.randn(2, 5, 7, device=device).unbind()
    for options in ({}, {"standardize": True}):
        rows = student.clone()
        rows[1] = math.nan
        rows.requires_grad_()
        mask = torch.arange(5, device=device) != 1
        value = kd.mlkd_loss(rows, teacher, mask=mask, backend=backend, **options)
        assert value.isfinite()
        assert torch.autograd.grad(value, rows)[0].isfinite().all()
        assert kd.mlkd_loss(rows, teacher, backend=backend, **options).isnan()
    teacher[0, 0] = math.nan
    alone = {"batch_weight": 0.0, "class_weight": 0.0}
    assert kd.mlkd_loss(student, teacher, backend=backend, **alone).isnan()
