# SPDX-License-Identifier: Apache-2.0
"""The learning simplifier as a call: operators, threads, compiling, memory, refusals, ranks."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_attention import dtypes, entries, needs_cpu, problem

from kdkernels.bench import measure
from kdkernels.functional import learning_simplifier
from kdkernels.ops.attention import (
    GRAD_COEFFICIENTS,
    GRAD_TEACHER,
    GRAD_TEMPERATURE,
    GRAD_WEIGHTS,
)
from kdkernels.testing import LOSSES, gradients

OPS = torch.ops.kdkernels


@needs_cpu
@entries
def test_same_bits_whatever_the_threads(entry):
    """Of all gradients, at sizes that are split among threads."""
    inputs = entry.inputs(70, 205, optional=True, requires_grad=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            value = entry(inputs, backend="cpu")
            results.append([value, *gradients(value, inputs).values()])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_same_bits_for_any_number_of_threads(dtype):
    teacher = torch.randn(37, 205, dtype=dtype)
    scores, values = torch.randn(2, 206, 206, dtype=dtype), torch.randn(2, 206, dtype=dtype)
    upstream, before, results = torch.randn_like(teacher), torch.get_num_threads(), []
    grads = GRAD_TEACHER | GRAD_TEMPERATURE | GRAD_COEFFICIENTS
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            out, stats = OPS.attention(teacher, scores, values, 2.0, None, True, True)
            back = OPS.attention_backward(
                upstream, teacher, scores, values, stats, 2.0, None, True, grads
            )
            results.append((out, stats, *back))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_cpu
@dtypes
def test_opcheck(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    teacher, upstream = torch.randn(2, 3, 5, dtype=dtype), torch.randn(2, 3, 5, dtype=wide)
    scores, values = torch.randn(2, 6, 6, dtype=wide), torch.randn(2, 6, dtype=wide)
    for temperatures in (None, torch.rand(6, dtype=wide) + 1):
        rest = (2.0, temperatures, True)
        for save in (True, False):
            torch.library.opcheck(OPS.attention.default, (teacher, scores, values, *rest, save))
        stats = OPS.attention(teacher, scores, values, *rest, True)[1]
        for grads in (0, GRAD_COEFFICIENTS, GRAD_TEACHER | GRAD_TEMPERATURE | GRAD_COEFFICIENTS):
            torch.library.opcheck(
                OPS.attention_backward.default,
                (upstream, teacher, scores, values, stats, *rest, grads),
            )


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_opcheck_of_weights(dtype):
    given, _ = problem(3, 5, dim=4, dtype=dtype)
    _, *weights = given.values()
    torch.library.opcheck(OPS.attention_coefficients.default, (*weights, 2))
    received = torch.randn(2, 6, 6, dtype=dtype), torch.randn(2, 6, dtype=dtype)
    torch.library.opcheck(OPS.attention_coefficients_backward.default, (*received, *weights, 2))


@needs_cpu
@dtypes
def test_opcheck_of_rows(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given, _ = problem(3, 5, dim=4, tokens="batch", dtype=wide)
    teacher, *weights = given.values()
    teacher, upstream = teacher.to(dtype), torch.randn(3, 5, dtype=wide)
    for temperatures in (None, torch.rand(3, dtype=wide) + 1):
        for gathered in (None, torch.randn(7, 5, dtype=wide)):
            rest = (2, 2.0, temperatures, True, gathered)
            torch.library.opcheck(OPS.row_attention.default, (teacher, *weights, *rest))
            saved = OPS.row_attention(teacher, *weights, *rest)[1]
            for grads in (0, GRAD_WEIGHTS, GRAD_TEACHER | GRAD_TEMPERATURE | GRAD_WEIGHTS):
                torch.library.opcheck(
                    OPS.row_attention_backward.default,
                    (upstream, teacher, *weights, saved, *rest, grads),
                )


@needs_cpu
@entries
def test_fullgraph(entry):
    inputs = entry.inputs(6, 10, optional=True, requires_grad=True)
    compiled = torch.compile(lambda i: entry(i, backend="cpu"), fullgraph=True)
    value, wanted = compiled(inputs), entry(inputs, backend="cpu")
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    expected = gradients(wanted, inputs)
    for name, gradient in gradients(value, inputs).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def test_autocast_changes_nothing():
    given, options = problem(3, 6, dtype=torch.float32)
    outside = learning_simplifier(**given, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(learning_simplifier(**given, **options), outside)


@needs_cpu
def test_memory_grows_with_rows_times_classes():
    """At ImageNet's 256 x 1000 the maps of eager attention would be a gigabyte each."""
    entry = LOSSES["learning_simplifier"]
    inputs = measure.make_inputs(entry, (256, 1000), torch.float32, "cpu")
    step = measure.make_step(lambda i: entry(i, backend="cpu"), inputs, 1.0)
    assert measure.extra_bytes(step, "cpu") < 64e6


BAD_CALLS = {
    "tokens": ({"tokens": "token"}, ValueError, "tokens must be one of class, batch, got 'token'"),
    "logits": ({"teacher_logits": torch.zeros(2, 6).int()}, TypeError, "teacher_logits must be fl"),
    "0-d": ({"teacher_logits": torch.zeros(())}, ValueError, r"teacher_logits must have shape"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be positive"),
    "heads": (
        {"num_heads": 4},
        ValueError,
        r"query_weight must have a multiple of num_h",
    ),
    "no heads": ({"num_heads": 0}, ValueError, "num_heads must be at least 1, got 0"),
    "no embedding": ({"class_embedding": None}, ValueError, "class_embedding must be given"),
    "embedding": ({"class_embedding": torch.zeros(5, 6)}, ValueError, "class_embedding must have"),
    "query": (
        {"query_weight": torch.zeros(6, 6)},
        ValueError,
        r"query_weight must have .* got \(6",
    ),
    "key": ({"key_weight": torch.zeros(7, 4)}, ValueError, r"key_weight must have .*\(7, 4\)"),
    "value": ({"value_weight": torch.zeros(7)}, ValueError, "value_weight must have shape"),
    "output": ({"output_weight": torch.zeros(6, 6)}, ValueError, "output_weight must have shape"),
    "no tensor": ({"output_weight": 1.0}, TypeError, "output_weight must be a tensor, got float"),
    "device": ({"key_weight": torch.zeros(7, 6, device="meta")}, ValueError, "key_weight must be "),
    "group": ({"group": object()}, ValueError, 'group is for tokens="batch"'),
    "backend": ({"backend": "cuda"}, RuntimeError, "backend 'cuda' cannot run here"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_refusals(case):
    changed, exception, message = BAD_CALLS[case]
    given, options = problem(2, 6, dtype=torch.float32)
    with pytest.raises(exception, match=f"learning_simplifier: {message}"):
        learning_simplifier(**given | options | changed)


def _worker(rank, port, sizes):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=len(sizes))
    torch.manual_seed(0)
    given, options = problem(sum(sizes), 7, tokens="batch")
    weights = {n: x.requires_grad_() for n, x in given.items() if n != "teacher_logits"}
    rows = given["teacher_logits"].split(sizes)[rank]
    group = dist.group.WORLD
    ours = learning_simplifier(rows, **weights, **options, group=group)
    whole = learning_simplifier(given["teacher_logits"], **weights, **options)
    torch.testing.assert_close(ours, whole.split(sizes)[rank])
    wanted = torch.autograd.grad(whole.square().sum(), list(weights.values()))
    for gradient, expected in zip(
        torch.autograd.grad(ours.square().sum(), list(weights.values())), wanted, strict=True
    ):
        dist.all_reduce(gradient)
        torch.testing.assert_close(gradient, expected)
    with pytest.raises(NotImplementedError, match="must not require a gradient"):
        learning_simplifier(rows.clone().requires_grad_(), **weights, **options, group=group)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_rows_of_all_ranks(free_port):
    mp.spawn(_worker, (free_port, [3, 5]), nprocs=2)


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
