# SPDX-License-Identifier: Apache-2.0
"""Top-k teachers: the properties of losses over rows, and what becomes of the tail."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from test_conformance import (  # noqa: F401
    test_gradient_is_that_of_the_returned_number,
    test_inputs_are_left_alone,
    test_mean_is_over_rows_that_count,
    test_scale_is_explicit,
)
from test_edges import test_all_rows_masked, test_no_rows, test_one_class  # noqa: F401
from test_grads import (  # noqa: F401
    assert_gradients,
    test_all_arguments,
    test_double_backward_is_refused,
    test_gradcheck,
    test_gradient,
    test_gradient_is_zero_where_rows_do_not_count,
    test_gradients_accumulate,
    test_no_gradient_is_recorded_where_none_is_needed,
    test_one_value_used_twice,
    test_scalar_temperatures,
    test_second_backward_needs_a_kept_graph,
)
from test_threads_isa import test_same_bits_for_any_number_of_threads, threads  # noqa: F401
from test_values import (  # noqa: F401
    test_autocast_changes_nothing,
    test_every_option_at_once,
    test_reductions_follow_from_rows,
    test_reference_is_the_published_formula,
    test_rows_do_not_see_each_other,
    test_teacher_temperature_defaults_to_the_students,
    test_tensor_temperature_is_the_number,
    test_value,
)

from kdkernels import checks, ops
from kdkernels import functional as kd
from kdkernels.modules import TopKDivergenceLoss
from kdkernels.ops.rowwise import GRAD_ROWS, GRAD_STUDENT, GRAD_TEACHER
from kdkernels.testing import LOSSES, gradients, leaves

ENTRIES = [loss for loss in LOSSES.values() if loss.family == "sparse"]
KINDS = {"forward_kl": {}, "reverse_kl": {}, "js": {"beta": 0.3}, "tv": {}}
kinds = pytest.mark.parametrize("kind", KINDS)
missings = pytest.mark.parametrize("missing", ["tail", "zero", "renormalize"])


def dense(rows=6, classes=40, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher = 2 * torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    student = teacher / 2 + torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    return student.to(device, dtype), teacher.to(device, dtype)


def close(value, expected, rel=1e-9, abs=1e-14):
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= rel * expected.abs().max() + abs


@kinds
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_all_classes_are_the_dense_divergence(kind, temperature, backend, device):
    """Whatever is done about the missing classes, since there are none; in any order."""
    student, teacher = dense(device=device)
    order = torch.rand(student.shape).argsort(-1).to(device)
    values = teacher.log_softmax(-1).gather(-1, order)
    for grad in (student, values, teacher):
        grad.requires_grad_()
    options = {"temperature": temperature, "backend": backend, **KINDS[kind]}
    expected = kd.divergence(student, teacher, kind=kind, **options)
    wanted = torch.autograd.grad(expected, [student, teacher])
    for missing in ("tail", "zero", "renormalize"):
        if (kind, missing) == ("reverse_kl", "zero"):
            continue
        value = kd.topk_divergence(student, values, order, kind=kind, missing=missing, **options)
        close(value, expected)
        to_student, to_values = torch.autograd.grad(value, [student, values])
        close(to_student, wanted[0])
        close(torch.zeros_like(teacher).scatter(-1, order, to_values), wanted[1])


def bucketed(student, teacher, indices, temperature):
    """Log-probabilities of the stored classes and of all the others together."""
    out = []
    for logits in (student, teacher):
        log_p = (logits / temperature).log_softmax(-1)
        others = log_p.scatter(-1, indices, -math.inf).logsumexp(-1, keepdim=True)
        out.append(torch.cat([log_p.gather(-1, indices), others], -1))
    return out


@kinds
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("values", ["log_probs", "logits"])
def test_tail_is_one_more_class(kind, temperature, values, backend, device):
    """Exact, and so are its gradients, with the teacher's logsumexp at the temperature."""
    student, teacher = dense(device=device)
    student.requires_grad_(), teacher.requires_grad_()
    full = teacher.log_softmax(-1) if values == "log_probs" else teacher + 7.0
    stored, indices = full.topk(5)
    whole = (full / temperature).logsumexp(-1)
    value = kd.topk_divergence(
        student, stored, indices, kind=kind, values=values, temperature=temperature,
        teacher_logsumexp=whole, backend=backend, **KINDS[kind],
    )  # fmt: skip
    expected = temperature**2 * kd.divergence(
        *bucketed(student, teacher, indices, temperature), kind=kind, backend="reference",
        **KINDS[kind],
    )  # fmt: skip
    close(value, expected)
    for gradient, wanted in zip(
        torch.autograd.grad(value, [student, teacher]),
        torch.autograd.grad(expected, [student, teacher]),
        strict=True,
    ):
        close(gradient, wanted)
    if temperature == 1.0 and values == "log_probs":
        alone = kd.topk_divergence(
            student, stored, indices, kind=kind, backend=backend, **KINDS[kind]
        )
        close(alone, expected)


@kinds
def test_even_tail_is_exact_at_any_temperature(kind, backend, device):
    """What is assumed without the logsumexp: the other classes have one logit."""
    student, teacher = dense(device=device)
    indices = teacher.topk(5).indices
    even = torch.full_like(teacher, -1.0).scatter(-1, indices, teacher.gather(-1, indices))
    stored = even.log_softmax(-1).gather(-1, indices)
    options = {"kind": kind, "temperature": 3.0, "backend": backend, **KINDS[kind]}
    whole = (even.log_softmax(-1) / 3.0).logsumexp(-1)
    close(
        kd.topk_divergence(student, stored, indices, **options),
        kd.topk_divergence(student, stored, indices, teacher_logsumexp=whole, **options),
    )


@kinds
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_renormalized_is_dense_over_the_stored_classes(kind, temperature, backend, device):
    student, teacher = dense(device=device)
    student.requires_grad_()
    stored, indices = teacher.topk(7)
    options = {"kind": kind, "temperature": temperature, "backend": backend, **KINDS[kind]}
    value = kd.topk_divergence(
        student, stored, indices, values="logits", missing="renormalize", **options
    )
    expected = kd.divergence(student.gather(-1, indices), stored, **options)
    close(value, expected)
    gradient, wanted = (torch.autograd.grad(v, student)[0] for v in (value, expected))
    close(gradient, wanted)
    unread = student.detach().clone()
    unread.scatter_(-1, teacher.topk(40).indices[:, 7:], math.nan)
    again = kd.topk_divergence(
        unread, stored, indices, values="logits", missing="renormalize", **options
    )
    assert torch.equal(again, value.detach())


@pytest.mark.parametrize("kind", ["forward_kl", "js", "tv"])
def test_zero_is_dense_with_a_teacher_off_elsewhere(kind, backend, device):
    student, teacher = dense(device=device)
    student.requires_grad_()
    stored, indices = teacher.topk(7)
    off = torch.full_like(teacher, -math.inf).scatter(-1, indices, stored)
    options = {"kind": kind, "temperature": 2.0, "backend": backend, **KINDS[kind]}
    value = kd.topk_divergence(student, stored, indices, missing="zero", **options)
    expected = kd.divergence(student, off, **options)
    close(value, expected)
    gradient, wanted = (torch.autograd.grad(v, student)[0] for v in (value, expected))
    close(gradient, wanted)


@kinds
def test_distillkit_takes_the_tail_for_one_class(kind, backend, device):
    student, teacher = dense(device=device)
    log_p, indices = teacher.log_softmax(-1).topk(5)
    rest = (-log_p.logsumexp(-1, keepdim=True).expm1()).log()
    whole = (torch.cat([log_p, rest], -1) / 2).logsumexp(-1)
    options = {"kind": kind, "temperature": 2.0, "backend": backend, **KINDS[kind]}
    close(
        kd.topk_divergence(student, log_p, indices, compat="distillkit", **options),
        kd.topk_divergence(student, log_p, indices, teacher_logsumexp=whole, **options),
    )


@kinds
@missings
@pytest.mark.parametrize("classes", [33, 3000])
def test_absent_entries_are_as_if_not_stored(kind, missing, classes, backend, device):
    """Ragged k: -inf, whatever the index, repeated or out of range."""
    if (kind, missing) == ("reverse_kl", "zero"):
        pytest.skip("infinite by its definition")
    student, teacher = dense(classes=classes, device=device)
    log_p, indices = teacher.log_softmax(-1).topk(9)
    options = {"kind": kind, "missing": missing, "temperature": 1.5, **KINDS[kind]}
    options |= {"reduction": "none", "backend": backend}
    padded, ids = log_p.clone(), indices.clone()
    counts = [9, 4, 1, 6, 2, 3]
    for row, n in enumerate(counts):
        padded[row, n:] = -math.inf
        ids[row, n:] = torch.tensor([-1, classes + 5, 0, 0, 0, 0, 0, 0])[: 9 - n]
    student.requires_grad_(), padded.requires_grad_()
    value = kd.topk_divergence(student, padded, ids, **options)
    to_student, to_values = torch.autograd.grad(value.sum(), [student, padded])
    for row, n in enumerate(counts):
        one = student.detach()[row].requires_grad_()
        stored = log_p[row, :n].clone().requires_grad_()
        expected = kd.topk_divergence(one, stored, indices[row, :n], **options)
        close(value[row], expected)
        wanted = torch.autograd.grad(expected, [one, stored])
        close(to_student[row], wanted[0])
        close(to_values[row, :n], wanted[1])
        assert not to_values[row, n:].any()


def test_rows_without_values(backend, device):
    student, _ = dense(device=device)
    values = torch.full((6, 3), -math.inf, dtype=torch.float64, device=device)
    indices = torch.full((6, 3), -1, device=device)
    student.requires_grad_()
    value = kd.topk_divergence(student, values, indices, backend=backend)
    assert value == 0
    assert not torch.autograd.grad(value, student)[0].any()
    for missing in ("zero", "renormalize"):
        value = kd.topk_divergence(student, values, indices, missing=missing, backend=backend)
        assert value.isnan()
    masked = kd.topk_divergence(
        student, values, indices, missing="zero", backend=backend,
        mask=torch.zeros(6, dtype=torch.bool, device=device),
    )  # fmt: skip
    assert masked == 0
    assert not torch.autograd.grad(masked, student)[0].any()


@kinds
@missings
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_student_that_is_its_teacher(kind, missing, dtype, backend, device):
    """0 to the rounding of what was stored, never below; so is the gradient."""
    _, teacher = dense(64, 500, device=device)
    student = teacher.to(dtype).requires_grad_()
    values, indices = teacher.log_softmax(-1).topk(20)
    if missing == "zero":
        if kind == "reverse_kl":
            pytest.skip("infinite by its definition")
        student = torch.full_like(teacher, -math.inf).scatter(-1, indices, values)
        student = student.to(dtype).requires_grad_()
    rows = kd.topk_divergence(
        student, values.to(dtype), indices, kind=kind, missing=missing, reduction="none",
        backend=backend, **KINDS[kind],
    )  # fmt: skip
    eps = torch.finfo(dtype).eps
    assert (rows >= 0).all()
    assert rows.max() <= (20 * eps if kind == "tv" else 100 * eps**2)
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    assert gradient.abs().max() <= (1 if kind == "tv" else 20 * eps)


@kinds
def test_a_small_tail_is_no_difference(kind, kernel, device):
    """Both tails far below fp32's eps beside 1: eager finds them as 1 - sum, which is rounding."""
    student, teacher = dense(16, 3000, device=device)
    indices = teacher.topk(5).indices
    for logits in (student, teacher):
        logits.scatter_add_(-1, indices, torch.full_like(logits[:, :5], 25.0))
    exact = bucketed(student.float().double(), teacher, indices, 1.0)
    stored = teacher.log_softmax(-1).gather(-1, indices)
    value = kd.topk_divergence(
        student.float(), stored.float(), indices, kind=kind, backend=kernel,
        teacher_logsumexp=(stored.float().double().exp().sum(-1) + exact[1][:, -1].exp()).log(),
        **KINDS[kind],
    )  # fmt: skip
    expected = kd.divergence(*exact, kind=kind, backend="reference", **KINDS[kind])
    close(value, expected.float(), rel=1e-5)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_logits_are_finite(kind, dtype, backend, device):
    student, teacher = dense(dtype=dtype, device=device)
    student = (1e4 * student.sign()).requires_grad_()
    stored, indices = (1e4 * teacher.sign()).topk(5)
    for options in (
        {"missing": "renormalize"},
        {"missing": "tail", "teacher_logsumexp": stored[:, 0].float() + 2.0},
    ):
        value = kd.topk_divergence(
            student, stored, indices, kind=kind, values="logits", backend=backend,
            **options, **KINDS[kind],
        )  # fmt: skip
        assert value.isfinite()
        assert torch.autograd.grad(value, student)[0].isfinite().all()


@kinds
def test_a_confident_student_keeps_its_tail(kind, backend, device):
    """A mass that underflows in fp32 beside the stored classes' has a logarithm all the same."""
    student, teacher = dense(4, 2000, dtype=torch.float32, device=device)
    values, indices = teacher.log_softmax(-1).topk(3)
    student = student.scatter(-1, indices, 300.0).requires_grad_()
    options = {"kind": kind, **KINDS[kind]}
    value = kd.topk_divergence(student, values, indices, backend=backend, **options)
    wide = leaves({"student": student, "values": values}, torch.float64)
    expected = kd.topk_divergence(*wide.values(), indices, backend="reference", **options)
    close(value, expected.float(), rel=1e-5)
    (gradient,) = torch.autograd.grad(value, student)
    (wanted,) = torch.autograd.grad(expected, wide["student"])
    close(gradient, wanted.float(), rel=1e-5, abs=1e-8)


@kinds
def test_a_teacher_with_one_class(kind, backend, device):
    """One-hot: nothing is left for the tail, and reverse KL is finite all the same."""
    student, _ = dense(device=device)
    student.requires_grad_()
    values, indices = torch.zeros(6, 1, device=device), torch.arange(6, device=device)[:, None]
    options = {"kind": kind, "reduction": "none", "backend": backend, **KINDS[kind]}
    rows = kd.topk_divergence(student, values, indices, **options)
    p = student.softmax(-1).gather(-1, indices).squeeze(-1)
    expected = {
        "forward_kl": -p.log(),
        "reverse_kl": p * p.log() + (1 - p) * ((1 - p).log() - math.log(1e-7)),
        "tv": 1 - p,
        "js": 0.3 * -(0.3 + 0.7 * p).log()
        + 0.7 * (p * (p / (0.3 + 0.7 * p)).log() - (1 - p) * math.log(0.7)),
    }[kind]
    close(rows, expected, rel=1e-6)
    gradient, wanted = (torch.autograd.grad(v.sum(), student)[0] for v in (rows, expected))
    close(gradient, wanted, rel=1e-6)


def test_values_that_exceed_one_are_renormalised(backend, device):
    """Log-probabilities in bf16 may sum to more than 1."""
    student, teacher = dense(device=device)
    values, indices = teacher.log_softmax(-1).topk(40)
    over = (values + 0.1)[:, :30]
    value = kd.topk_divergence(student, over, indices[:, :30], missing="tail", backend=backend)
    assert over.exp().sum(-1).min() > 1
    expected = kd.topk_divergence(student, over, indices[:, :30], missing="zero", backend=backend)
    close(value, expected)


def test_minus_infinity_in_the_student(backend, device):
    student, teacher = dense(4, 60, dtype=torch.float32, device=device)
    values, indices = teacher.log_softmax(-1).topk(5)
    stored_off = student.clone()
    stored_off[0, indices[0, 1]] = -math.inf
    tail_off = torch.full_like(student, -math.inf).scatter(-1, indices, student.gather(-1, indices))
    some_off = student.scatter(-1, teacher.topk(60).indices[:, 30:], -math.inf)
    for kind in KINDS:
        options = {"kind": kind, "reduction": "none", "backend": backend, **KINDS[kind]}
        for logits, infinite in ((stored_off, [0]), (tail_off, [0, 1, 2, 3]), (some_off, [])):
            logits = logits.clone().requires_grad_()
            rows = kd.topk_divergence(logits, values, indices, **options)
            expected = torch.zeros(4, dtype=torch.bool, device=device)
            if kind == "forward_kl":
                expected[infinite] = True
            assert torch.equal(rows.isinf(), expected) and not rows.isnan().any()
            (gradient,) = torch.autograd.grad(rows.sum(), logits)
            wide = logits.detach().double().requires_grad_()
            exact = kd.topk_divergence(wide, values, indices, **options | {"backend": "reference"})
            (wanted,) = torch.autograd.grad(exact.sum(), wide)
            close(gradient, wanted.float(), rel=1e-5)


def test_forward_kl_keeps_its_gradient_where_it_is_infinite(backend, device):
    student, teacher = dense(1, 10, device=device)
    values, indices = teacher.log_softmax(-1).topk(3)
    student[0, indices[0, 0]] = -math.inf
    student.requires_grad_()
    value = kd.topk_divergence(student, values, indices, temperature=1.0, backend=backend)
    (gradient,) = torch.autograd.grad(value, student)
    p = student.detach().softmax(-1).squeeze(0)
    teacher = torch.zeros(10, dtype=torch.float64, device=device)
    teacher[indices[0]] = values[0].exp()
    others = teacher == 0
    teacher[others] = (1 - teacher.sum()) * (p / p[others].sum())[others]
    assert value == math.inf
    close(gradient.squeeze(0), p - teacher)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("argument", ["student", "topk_values"])
@pytest.mark.parametrize("missing", ["tail", "renormalize"])
def test_bad_numbers_stay_in_their_row(argument, value, missing, backend, device):
    student, teacher = dense(5, 1500, dtype=torch.float32, device=device)
    values, indices = teacher.log_softmax(-1).topk(5)
    inputs = {"student": student, "topk_values": values}
    inputs[argument][2, indices[2, 3] if argument == "student" else 3] = value
    for tensor in inputs.values():
        tensor.requires_grad_()
    options = {"missing": missing, "reduction": "none", "backend": backend}
    rows = kd.topk_divergence(**inputs, topk_indices=indices, **options)
    assert rows[2].isnan() and rows[[0, 1, 3, 4]].isfinite().all()
    for gradient in gradients(rows, inputs).values():
        assert gradient[2].isnan().any() and gradient[[0, 1, 3, 4]].isfinite().all()
    mask = torch.arange(5, device=device) != 2
    rows = kd.topk_divergence(**inputs, topk_indices=indices, mask=mask, **options)
    for x in (rows, *gradients(rows, inputs).values()):
        assert x.isfinite().all() and not x[2].any()


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float16),
    ],
)
def test_mixed_dtypes(loss, dtypes, backend, device):
    inputs = loss.inputs(5, 2100, dtype=torch.float64, device=device)
    for name, dtype in zip(("student", "topk_values"), dtypes, strict=True):
        inputs[name] = inputs[name].to(dtype).requires_grad_()
    assert_gradients(loss, inputs, backend)


@pytest.mark.parametrize("index", [torch.int64, torch.int32, torch.int16], ids=str)
@pytest.mark.parametrize("layout", ["shifted", "transposed", "classes_first", "expanded", "vector"])
def test_layouts(loss, layout, index, backend, device):
    view = {
        "shifted": lambda x: x[:, :-1],
        "transposed": lambda x: x.transpose(0, 1),
        "classes_first": lambda x: x.mT.contiguous().mT,
        "expanded": lambda x: x[:1].expand(4, -1, -1),
        "vector": lambda x: x[0, 0],
    }[layout]
    inputs = loss.inputs(4, 6, 70, device=device)
    inputs = {name: view(x) for name, x in inputs.items()}
    packed = {name: x.contiguous() for name, x in inputs.items()}
    inputs["topk_indices"] = inputs["topk_indices"].to(index)
    for each in (inputs, packed):
        each["student"].requires_grad_(), each["topk_values"].requires_grad_()
    value = loss(inputs, backend=backend, reduction="none")
    expected = loss(packed, backend=backend, reduction="none")
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    wanted = gradients(expected, packed)
    for name, gradient in gradients(value, inputs).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_fp16_gradients_survive_scaling(kernel, device):
    """Under a GradScaler: gradients that underflow in fp16 until they are scaled."""
    student, teacher = dense(512, 2000, dtype=torch.float16, device=device)
    values, indices = teacher.float().log_softmax(-1).topk(20)
    student.requires_grad_()
    scale = 2.0**16
    (kd.topk_divergence(student, values, indices, backend=kernel) * scale).backward()
    wide = student.detach().double().requires_grad_()
    kd.topk_divergence(wide, values, indices, backend="reference").backward()
    error = (student.grad.double() - scale * wide.grad).norm() / (scale * wide.grad).norm()
    assert error <= 5e-4


# Of the tests above, what runs in half a minute by Triton's interpreter, which must be chosen
# before the kernels are decorated.
INTERPRETED = (
    "dense", "one_more_class", "even_tail", "takes_the_tail", "without_values", "one_class",
    "minus_infinity", "exceed_one", "mixed_dtypes", "(gradcheck and topk_js)",
    "(every_option and t2-batchmean)", "not_checked", "where_rows_do_not_count", "infinite",
)  # fmt: skip

if not ops.triton_interpreted():

    def test_triton_in_a_process_with_the_interpreter():
        pytest.importorskip("triton", reason="triton is not installed: nothing to interpret")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["--disable-warnings", "-k", f"triton and ({' or '.join(INTERPRETED)})"]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        result = subprocess.run(
            [*command, __file__], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]


def call(device="cpu", **changes):
    student, teacher = dense(5, 30, device=device)
    values, indices = teacher.log_softmax(-1).topk(4)
    given = {"student": student, "topk_values": values, "topk_indices": indices} | changes
    return kd.topk_divergence(**given)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "topk_values must be a tensor", {"topk_values": [1.0]}),
        (TypeError, "topk_indices must be integers", {"topk_indices": torch.ones(5, 4)}),
        (TypeError, "topk_values must be float", {"topk_values": torch.ones(5, 4).long()}),
        (ValueError, r"must have shape \(5, 'k'\)", {"topk_values": torch.ones(4, 4)}),
        (ValueError, "one shape", {"topk_values": torch.ones(5, 3)}),
        (ValueError, "kind must be one of", {"kind": "renyi"}),
        (ValueError, "missing must be one of", {"missing": "uniform"}),
        (ValueError, "takes no beta", {"beta": 0.5}),
        (ValueError, "needs teacher_logsumexp", {"values": "logits"}),
        (ValueError, "has no use", {"missing": "zero", "teacher_logsumexp": torch.ones(5)}),
        (ValueError, "infinite", {"missing": "zero", "kind": "reverse_kl"}),
        (ValueError, "infinite", {"missing": "zero", "kind": "js", "beta": 1.0}),
        (ValueError, "shape of the rows", {"teacher_logsumexp": torch.ones(4)}),
        (ValueError, "compat must be one of", {"compat": "easydistill"}),
    ],
)
def test_errors_say_what_is_expected(error, message, changes):
    with pytest.raises(error, match=f"topk_divergence: .*{message}"):
        call(**changes)


def test_indices_are_checked(backend, device):
    """On a GPU, where nothing is read to be checked, they make a row NaN."""
    for index, message in (
        (30, r"must be in \[0, 30\)"),
        (-1, r"must be in \[0, 30\)"),
        (3, "must be distinct"),
    ):
        indices = torch.tensor([[0, 1, 2, 3]] * 5, device=device)
        indices[2, 1] = index
        options = {"topk_indices": indices, "backend": backend, "device": device}
        if device == "cpu":
            with pytest.raises(ValueError, match=f"topk_divergence: topk_indices {message}"):
                call(**options)
        else:
            rows = call(**options, reduction="none")
            assert torch.equal(rows.isnan(), torch.arange(5, device=device) == 2)
        for rows_that_count in (
            {"mask": torch.tensor([True, True, False, True, True], device=device)},
            {"labels": torch.tensor([0, 0, -100, 0, 0], device=device)},
        ):
            assert call(**options, **rows_that_count).isfinite()


def test_bad_indices_are_nan_where_they_are_not_checked(backend, device, monkeypatch):
    """What a GPU does with them, on whatever device."""
    if backend == "cpu":
        pytest.skip("its kernel checks them")
    monkeypatch.setattr(checks, "_readable", lambda tensor: False)
    for index in (30, -1, 3, 2**40):
        indices = torch.tensor([[0, 1, 2, 3]] * 5, device=device)
        indices[2, 1] = index
        student = dense(5, 30, device=device)[0].requires_grad_()
        rows = call(
            device, student=student, topk_indices=indices, reduction="none", backend=backend
        )
        bad = torch.arange(5, device=device) == 2
        assert torch.equal(rows.isnan(), bad)
        (gradient,) = torch.autograd.grad(rows.sum(), student)
        assert gradient[~bad].isfinite().all()


def test_module_is_its_function(loss, backend, device):
    inputs = loss.inputs(5, 30, device=device)
    module = TopKDivergenceLoss(**loss.hyper, backend=backend)
    assert torch.equal(module(**inputs), loss(inputs, backend=backend))
    more = {"mask": torch.arange(5) < 3, "row_weight": torch.rand(5)}
    more = {name: x.to(device) for name, x in more.items()}
    more |= {"teacher_logsumexp": torch.full((5,), 3.0, device=device)}
    assert torch.equal(module(**inputs, **more), loss(inputs | more, backend=backend))
    with pytest.raises(ValueError, match="infinite"):
        TopKDivergenceLoss(kind="reverse_kl", missing="zero")
    assert repr(TopKDivergenceLoss(values="logits")) == "TopKDivergenceLoss(values='logits')"


def test_compiled(loss, kernel, device):
    inputs = loss.inputs(6, 300, device=device, optional=True, requires_grad=True)
    compiled = torch.compile(lambda x: loss(x, backend=kernel), backend="aot_eager", fullgraph=True)
    value, expected = compiled(inputs), loss(inputs, backend=kernel)
    torch.testing.assert_close(value, expected)
    wanted = gradients(expected, inputs)
    for name, gradient in gradients(value, inputs).items():
        torch.testing.assert_close(gradient, wanted[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grads", [0, GRAD_STUDENT, GRAD_STUDENT | GRAD_TEACHER | GRAD_ROWS])
@pytest.mark.parametrize("reduction", [0, 2])
def test_opcheck(dtype, grads, reduction, kernel, device):
    student, values = torch.randn(2, 3, 9, dtype=dtype), torch.randn(2, 3, 4, dtype=dtype) - 4
    indices = torch.rand(6, 9).argsort(-1)[:, :4].contiguous()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    row, one = torch.rand(6, dtype=wide), torch.rand(1, dtype=wide) + 1
    labels, mask = torch.randint(9, (6,)), torch.tensor([True, False, True, True, True, True])
    operator = {"cpu": torch.ops.kdkernels.sparse, "triton": torch.ops.kdkernels.sparse_triton}
    for options in ((), (labels, mask, row, one, row + 1, row + 1)):
        tensors = [x.to(device) for x in (student, values, indices)]
        options = [x.to(device) for x in options]
        arguments = (*tensors, [2.0, 0.0, 0.3], [2, 1, reduction], grads, *options)
        torch.library.opcheck(operator[kernel].default, arguments)


def test_transforms(kernel, device):
    student, teacher = dense(device=device)
    values, indices = teacher.log_softmax(-1).topk(4)

    def function(student, backend):
        return kd.topk_divergence(student, values, indices, backend=backend)

    with pytest.raises(RuntimeError, match=r'torch\.func.*backend="reference"'):
        torch.func.grad(function)(student, kernel)
    gradient = torch.func.grad(function)(student, "reference")
    student.requires_grad_()
    close(gradient, torch.autograd.grad(function(student, kernel), student)[0])


def test_nothing_as_wide_as_the_vocabulary_is_made_for_the_teacher(kernel, device):
    """Beside the gradient: O(N k)."""
    from test_values import _Count

    loss = LOSSES["topk_js"]
    inputs = loss.inputs(8, 32000, device=device)
    with _Count() as count, torch.no_grad():
        loss(inputs, backend=kernel)
    assert count.largest <= inputs["topk_indices"].nbytes
