# SPDX-License-Identifier: Apache-2.0
"""The compiled operators under torch.library's checks and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from kdkernels import backends, functional
from kdkernels.divergences import KINDS, REDUCTIONS, Choices, Numbers
from kdkernels.ops.rowwise import GRAD_ROWS, GRAD_STUDENT, GRAD_TEACHER
from kdkernels.testing import LOSSES, gradients

pytestmark = pytest.mark.skipif(
    not backends.verdict("rowwise", "cpu", "cpu").ok, reason="_C_cpu is not built"
)
OPS = torch.ops.kdkernels


def scalars(reduction="batchmean", ce_weight=0.0):
    numbers = Numbers(2.0, 2.0, beta=0.5, ce_weight=ce_weight, label_smoothing=0.1)
    return numbers, Choices(KINDS.index("js"), reduction=REDUCTIONS.index(reduction))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grads", [0, GRAD_STUDENT, GRAD_STUDENT | GRAD_TEACHER | GRAD_ROWS])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_opcheck(dtype, grads, reduction):
    student, teacher = torch.randn(2, 3, 7, dtype=dtype), torch.randn(2, 3, 7, dtype=dtype)
    labels, mask = torch.randint(7, (6,)), torch.tensor([True, False, True, True, True, True])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, temperature = torch.rand(6, dtype=wide), torch.rand(1, dtype=wide) + 1
    for options in (
        (None, None, None, None, None),
        (labels, mask, weight, temperature, temperature),
    ):
        ce_weight = 0.5 * (options[0] is not None)
        rest = (*scalars(reduction, ce_weight), grads, *options)
        torch.library.opcheck(OPS.rowwise.default, (student, teacher, *rest))
        torch.library.opcheck(OPS.rowwise_inplace.default, (student, teacher, *rest))


@pytest.mark.parametrize("factor", [None, torch.rand(6)])
def test_opcheck_scale(factor):
    torch.library.opcheck(OPS.scale_rows_.default, (torch.randn(6, 5), torch.tensor(0.5), factor))


@pytest.mark.parametrize(
    "name",
    ["kl_div", "js_div", "kd_loss", "divergence_renyi", "kl_div_standardized", "dkd_loss",
     "nkd_loss", "ats_loss", "wsld_loss"],
)  # fmt: skip
@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fullgraph(name, upstream, dtype):
    torch._dynamo.reset()  # one code object, of which only so many versions are kept
    loss = LOSSES[name]
    inputs = loss.inputs(6, 10, dtype=dtype, optional=True, requires_grad=True)
    compiled = torch.compile(lambda i: loss(i, backend="cpu"), fullgraph=True)
    up = torch.tensor(upstream)
    wanted = gradients(loss(inputs, backend="cpu"), inputs, up)
    value = compiled(inputs)
    torch.testing.assert_close(value, loss(inputs, backend="cpu"), rtol=0, atol=0)
    for key, gradient in gradients(value, inputs, up).items():
        # Compiled, the backward multiplies in one more rounding.
        rtol = 2e-3 if dtype == torch.float16 else 1e-6
        torch.testing.assert_close(gradient, wanted[key], rtol=rtol, atol=1e-7)


def test_row_reduction_compiled():
    student = torch.randn(6, 10, requires_grad=True)
    teacher, weights = torch.randn(6, 10), torch.rand(6)

    def total(student):
        return (functional.kl_div(student, teacher, reduction="none") * weights).sum()

    (wanted,) = torch.autograd.grad(total(student), student)
    (got,) = torch.autograd.grad(torch.compile(total, fullgraph=True)(student), student)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-8)


def test_one_graph_for_any_number_of_rows():
    counter = CompileCounter()
    counters.clear()
    compiled = torch.compile(
        lambda s, t: functional.kl_div(s, t, temperature=2.0), backend=counter, fullgraph=True,
        dynamic=True,
    )  # fmt: skip
    for rows in (4, 8, 33, 5):
        s, t = torch.randn(rows, 10, requires_grad=True), torch.randn(rows, 10)
        torch.testing.assert_close(compiled(s, t), functional.kl_div(s, t, temperature=2.0))
    assert counter.frame_count == 1


def test_second_use_of_a_compiled_graph():
    student, teacher = torch.randn(6, 10, requires_grad=True), torch.randn(6, 10)
    compiled = torch.compile(lambda s: functional.kl_div(s, teacher), fullgraph=True)
    value = compiled(student)
    first = torch.autograd.grad(value, student, torch.tensor(0.5), retain_graph=True)[0]
    second = torch.autograd.grad(value, student, torch.tensor(2.0))[0]
    torch.testing.assert_close(4 * first, second)


def test_inplace_refused_under_compile():
    teacher = torch.randn(4, 10)

    def loss(x):
        return functional.kl_div(x * 2, teacher, inplace=True)

    with pytest.raises(Exception, match="inplace=True works in eager mode only"):
        torch.compile(loss, fullgraph=True)(torch.randn(4, 10, requires_grad=True))


def test_autocast_changes_nothing():
    student = torch.randn(6, 10, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(6, 10)
    outside = functional.kl_div(student, teacher, temperature=3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = functional.kl_div(student, teacher, temperature=3.0)
        reference = functional.kl_div(student, teacher, temperature=3.0, backend="reference")
    assert inside.dtype == reference.dtype == torch.float32
    assert torch.equal(inside, outside)
    torch.testing.assert_close(reference, outside, rtol=1e-5, atol=0)
