# SPDX-License-Identifier: Apache-2.0
"""Top-k teachers as they are called: dtypes, layouts, modules, torch.compile, and errors."""

from __future__ import annotations

import pytest
import torch
from counting import Count
from test_grads import assert_gradients
from test_sparse import ENTRIES, close, dense  # noqa: F401

from kdkernels import checks
from kdkernels import functional as kd
from kdkernels.modules import TopKDivergenceLoss
from kdkernels.ops.rowwise import GRAD_ROWS, GRAD_STUDENT, GRAD_TEACHER
from kdkernels.testing import LOSSES, gradients


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
    loss = LOSSES["topk_js"]
    inputs = loss.inputs(8, 32000, device=device)
    with Count() as count, torch.no_grad():
        loss(inputs, backend=kernel)
    assert count.largest <= inputs["topk_indices"].nbytes


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
    monkeypatch.setattr(checks, "readable", lambda tensor: False)
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


@pytest.mark.parametrize("backend", LOSSES["topk_tv"].backends())
def test_no_logits_for_log_probabilities(backend):
    """Nor probabilities. A little above 0 is rounding, and rows that do not count hold anything."""
    student, teacher = dense()
    options = {"backend": backend}
    for wrong in (teacher, (3 * teacher).softmax(-1)):
        values, indices = wrong.topk(8)
        with pytest.raises(ValueError, match=r"topk_values must be log-prob.*values='logits'"):
            kd.topk_divergence(student, values, indices, **options)
        kd.topk_divergence(student, values, indices, missing="renormalize", **options)
    values, indices = teacher.log_softmax(-1).topk(8)
    kd.topk_divergence(student, values - values.max() + 0.2, indices, **options)
    expected = kd.topk_divergence(student[:3], values[:3], indices[:3], **options)
    mask, labels = torch.arange(6) < 3, torch.where(torch.arange(6) < 3, 0, -100)
    values[3:] = 100.0
    for absent in ({"mask": mask}, {"labels": labels}):
        close(kd.topk_divergence(student, values, indices, **absent, **options), expected)
