# SPDX-License-Identifier: Apache-2.0
"""DIST and MLKD as they are called: operators, compiled, on threads, as modules, with bad input."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from kdkernels import functional as kd
from kdkernels import modules
from kdkernels.ops.batchwise import DistChoices, DistNumbers
from kdkernels.testing import LOSSES, assert_close_to_oracle, gradients

FAMILY = [loss for loss in LOSSES.values() if loss.family.startswith("batchwise.")]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
losses = pytest.mark.parametrize("entry", FAMILY, ids=lambda loss: loss.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
compiled = pytest.mark.skipif("cpu" not in FAMILY[0].backends("cpu"), reason="_C_cpu is not built")


@pytest.mark.parametrize("shape", [(1000, 100), (37, 3000), (70, 16000)])
@losses
@compiled
def test_same_bits_for_any_number_of_threads(entry, shape):
    inputs = entry.inputs(*shape, optional=True, requires_grad=True)
    results, before = [], torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            value = entry(inputs, backend="cpu")
            results.append([value, *gradients(value, inputs).values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("shape", [(1, 9), (33, 33), (64, 100), (130, 270), (1100, 50)])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("some", [False, True])
@compiled
def test_relations_are_torchs_matrix_products(shape, dtype, some):
    inputs = LOSSES["mlkd_loss"].inputs(*shape, dtype=dtype)
    soft, _ = torch.ops.kdkernels.mlkd_softmax(*inputs.values(), [4.0, 1.0])
    chosen = [(torch.arange(n) % 3 > 0).to(dtype) if some else None for n in shape]
    loss, *found = torch.ops.kdkernels.mlkd_relate(soft, [0.3, 0.7], 3, None, *chosen)

    def formula(wide):
        p = soft[:, 0].to(wide).requires_grad_()
        q = (soft[:, 0].to(wide) - soft[:, 1].to(wide)).detach().requires_grad_()
        near, far = p @ p.mT - q @ q.mT, p.mT @ p - q.mT @ q
        if some:
            near, far = (
                x * (c.to(wide)[:, None] * c.to(wide))
                for x, c in zip((near, far), chosen, strict=True)
            )
        value = 0.3 * near.square().sum() + 0.7 * far.square().sum()
        return value.detach(), *torch.autograd.grad(value, (p, q))

    for kernel, plain, oracle in zip(
        (loss, *found), formula(dtype), formula(torch.float64), strict=True
    ):
        assert_close_to_oracle(kernel, plain, oracle, "relations")


@dtypes
@compiled
def test_opcheck(dtype):
    own = torch.ops.kdkernels
    student, teacher = torch.randn(2, 2, 3, 7, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mask, temperature = torch.tensor([True, False] * 3), torch.ones(1, dtype=wide)
    for grads, options in ((0, ()), (1, (None, None)), (15, (mask, temperature))):
        arguments = (student, teacher, DistNumbers(2.0), DistChoices(), grads, *options)
        torch.library.opcheck(own.dist.default, arguments)
    temperatures = [4.0, 2.0]
    torch.library.opcheck(own.mlkd_softmax.default, (student, teacher, temperatures, mask))
    soft, _ = own.mlkd_softmax(student, teacher, temperatures, mask)
    chosen = torch.ones(6, dtype=wide)
    for options in ((), (torch.ones(2, dtype=wide), chosen, torch.ones(7, dtype=wide))):
        torch.library.opcheck(own.mlkd_relate.default, (soft, [1.0, 2.0], 3, *options))
    for relations in (None, soft[:, 0].contiguous()):
        torch.library.opcheck(
            own.mlkd_gradient.default,
            (student, soft, relations, chosen, temperatures, False, mask),
        )


@pytest.mark.parametrize("upstream", [1.0, 0.5])
@losses
@compiled
def test_fullgraph(entry, upstream):
    inputs = entry.inputs(6, 10, optional=True, requires_grad=True)
    function = torch.compile(lambda i: entry(i, backend="cpu"), fullgraph=True)
    up = torch.tensor(upstream)
    expected, value = entry(inputs, backend="cpu"), function(inputs)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    wanted = gradients(expected, inputs, up)
    for name, gradient in gradients(value, inputs, up).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("function", "options", "error", "message"),
    [
        (kd.dist_loss, {"beta": math.nan}, ValueError, "beta must be finite"),
        (kd.dist_loss, {"temperature": 0.0}, ValueError, "temperature must be positive"),
        (kd.dist_loss, {"compat": "mdistiller"}, ValueError, "compat must be one of"),
        (kd.dist_loss, {"scale": "t"}, ValueError, "scale must be one of"),
        (kd.dist_loss, {"mask": torch.ones(4)}, TypeError, "mask must be bool"),
        (kd.dist_loss, {"labels": torch.full((4,), 9)}, ValueError, r"labels must be in \[0, 5\)"),
        (kd.dist_loss, {"labels": torch.rand(4, 5)}, TypeError, "class indices"),
        (kd.mlkd_loss, {"temperatures": 4.0}, TypeError, "must be a sequence"),
        (kd.mlkd_loss, {"temperatures": []}, ValueError, "1 to 16 numbers"),
        (kd.mlkd_loss, {"temperatures": [1.0, -1.0]}, ValueError, "must be positive"),
        (kd.mlkd_loss, {"selection": "mean"}, ValueError, "selection must be one of"),
        (kd.mlkd_loss, {"class_weight": "1"}, TypeError, "class_weight must be a number"),
    ],
)
def test_errors_name_what_is_wrong(function, options, error, message):
    with pytest.raises(error, match=f"{function.__name__}: .*{message}"):
        function(torch.randn(4, 5), torch.randn(4, 5), **options)


@pytest.mark.parametrize(
    ("module", "function", "options"),
    [
        (modules.DISTLoss, kd.dist_loss, {"temperature": 4.0, "gamma": 2.0}),
        (modules.MLKDLoss, kd.mlkd_loss, {"temperatures": (2.0, 3.0), "selection": "none"}),
    ],
)
def test_modules_are_their_functions(module, function, options):
    student, teacher = torch.randn(2, 6, 10)
    made, call = module(**options), functools.partial(function, student, teacher, **options)
    assert torch.equal(made(student, teacher), call())
    mask = torch.tensor([True, False] * 3)
    assert torch.equal(made(student, teacher, mask=mask), call(mask=mask))
    shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
    assert repr(made) == f"{module.__name__}({shown})"
    with pytest.raises(ValueError, match="compat"):
        module(compat="nobody")
