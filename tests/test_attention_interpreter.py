# SPDX-License-Identifier: Apache-2.0
"""The attention family in Triton's interpreter, as tests/test_triton_interpreter.py has it."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from interpreter import INTERPRETED, assert_passes_interpreted

from kdkernels.functional import learning_simplifier
from kdkernels.ops.attention import GRAD_COEFFICIENTS, GRAD_TEACHER, GRAD_TEMPERATURE

if not INTERPRETED:

    def test_in_a_process_with_the_interpreter():
        assert_passes_interpreted(__file__)


def error(ours, oracle):
    return ((ours.double() - oracle).norm() / oracle.norm().clamp(min=1e-30)).item()


def compare(given, **options):
    """The result and all gradients, with those of the reference in fp64."""

    def run(backend, cast):
        leaves = {n: x.to(cast or x.dtype).requires_grad_() for n, x in given.items()}
        out = learning_simplifier(**leaves, num_heads=2, **options, backend=backend)
        out = out.masked_fill(out == -math.inf, 7.0)
        weight = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
        return [out, *torch.autograd.grad((out * weight).sum(), list(leaves.values()))]

    limit = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 1e-2}
    for ours, oracle in zip(run("triton", None), run("reference", torch.float64), strict=True):
        assert error(ours, oracle) <= limit[ours.dtype]


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.fixture(params=["one tile", "several"])
    def tiles(self, request, monkeypatch):
        from kdkernels.triton import attention

        if request.param == "several":
            small = attention.Tile(8, 8, 2)
            for name in ("FORWARD", "COEFFICIENTS", "TEACHER"):
                monkeypatch.setattr(attention, name, small)
            monkeypatch.setattr(attention, "PROGRAMS", 32)  # few shares of several samples
        return request.param

    @pytest.mark.parametrize(
        ("dtype", "temperature", "residual"),
        [
            (torch.float64, "each", True),
            (torch.float32, "one", False),
            (torch.bfloat16, "number", True),
        ],
        ids=str,
    )
    def test_values_and_gradients(self, dtype, temperature, residual, tiles):
        generator = torch.Generator().manual_seed(0)

        def normal(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

        given = {
            "teacher_logits": 3 * normal(5, 11),
            "class_embedding": normal(11, 4),
            "query_weight": normal(5, 4) / 2,
            "key_weight": normal(5, 4) / 2,
            "value_weight": normal(5, 4),
            "output_weight": normal(4, 1),
        }
        given["teacher_logits"][0, 3] = -math.inf
        given["teacher_logits"][1, :-1] = -math.inf
        given["teacher_logits"][2] = -math.inf
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if temperature != "number":
            size = 5 if temperature == "each" else 1
            given["temperature"] = torch.rand(size, generator=generator, dtype=wide) + 1

        compare(given, residual=residual)

    @pytest.mark.parametrize(
        ("dtype", "temperature", "residual"),
        [
            (torch.float64, "each", False),
            (torch.float32, "one", True),
            (torch.bfloat16, "number", True),
        ],
        ids=str,
    )
    def test_batch_tokens(self, dtype, temperature, residual, monkeypatch):
        from kdkernels.triton import row_attention

        monkeypatch.setattr(row_attention, "BLOCK", 8)
        generator = torch.Generator().manual_seed(0)

        def normal(*size):
            return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

        given = {
            "teacher_logits": 3 * normal(10, 11)[::2],
            "query_weight": normal(11, 4) / 3,
            "key_weight": normal(11, 4) / 3,
            "value_weight": normal(11, 6) / 3,
            "output_weight": normal(6, 11),
        }
        given["teacher_logits"][0, 3] = -math.inf
        given["teacher_logits"][2] = -math.inf
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if temperature != "number":
            size = 5 if temperature == "each" else 1
            given["temperature"] = torch.rand(size, generator=generator, dtype=wide) + 1
        compare(given, residual=residual, tokens="batch")

    def test_layouts(self):
        weights = torch.randn(2, 6, 6), torch.randn(2, 6)
        forward = torch.ops.kdkernels.attention
        learning_simplifier(  # registers the operators
            torch.randn(1, 2), query_weight=torch.ones(2, 1), key_weight=torch.ones(2, 1),
            value_weight=torch.ones(2, 1), class_embedding=torch.ones(2, 1),
            output_weight=torch.ones(1, 1), backend="triton",
        )  # fmt: skip
        base = torch.randn(4, 3, 11)
        for teacher in (base[..., 1:6], base[..., ::2][..., 1:], base.transpose(0, 1)[..., 2:7]):
            args = (*weights, 2.0, None, True, True)
            ours = torch.ops.kdkernels.attention_triton(teacher, *args)[0]
            torch.testing.assert_close(ours, forward(teacher, *args)[0])

    def test_registered(self):
        teacher, upstream = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
        scores, values = torch.randn(2, 6, 6), torch.randn(2, 6)
        from kdkernels.triton import attention  # noqa: F401  (registers the operators)

        registered, rest = torch.ops.kdkernels, (2.0, torch.rand(6) + 1, True)
        forward, backward = registered.attention_triton, registered.attention_backward_triton
        torch.library.opcheck(forward.default, (teacher, scores, values, *rest, True))
        stats = forward(teacher, scores, values, *rest, True)[1]
        for grads in (0, GRAD_TEACHER | GRAD_TEMPERATURE | GRAD_COEFFICIENTS):
            arguments = (upstream, teacher, scores, values, stats, *rest, grads)
            torch.library.opcheck(backward.default, arguments)

    def test_registered_with_weights(self):
        from kdkernels.triton import attention_weights, row_attention  # noqa: F401

        registered, teacher, received = torch.ops.kdkernels, torch.randn(3, 5), torch.randn(2, 6, 6)
        weights = torch.randn(6, 4), torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 1)
        given = (*weights, torch.randn(5, 5), 2)
        torch.library.opcheck(registered.attention_coefficients_triton.default, given)
        torch.library.opcheck(
            registered.attention_coefficients_backward_triton.default,
            (received, received[:, 0].contiguous(), *given),
        )
        weights = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 4), torch.randn(4, 5)
        forward, backward = (
            registered.row_attention_triton,
            registered.row_attention_backward_triton,
        )
        for gathered in (None, torch.randn(7, 5)):
            rest = (2, 2.0, torch.rand(3) + 1, True, gathered)
            torch.library.opcheck(forward.default, (teacher, *weights, *rest))
            saved = forward(teacher, *weights, *rest)[1]
            for grads in (0, GRAD_TEACHER | GRAD_TEMPERATURE | GRAD_COEFFICIENTS):
                arguments = (teacher, teacher, *weights, saved, *rest, grads)
                torch.library.opcheck(backward.default, arguments)
