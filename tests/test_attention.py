# SPDX-License-Identifier: Apache-2.0
"""The learning simplifier: its algebra, its limits and its gradients."""

from __future__ import annotations

import math

import pytest
import torch

from kdkernels import backends
from kdkernels.functional import learning_simplifier
from kdkernels.testing import LOSSES, assert_close_to_oracle, gradients, leaves

ENTRIES = [loss for loss in LOSSES.values() if loss.family == "attention"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
entries = pytest.mark.parametrize("entry", ENTRIES, ids=lambda x: x.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
needs_cpu = pytest.mark.skipif(
    not backends.verdict("attention", "cpu", "cpu").ok, reason="_C_cpu is not built"
)
INF = math.inf


def problem(*shape, dim=6, heads=2, tokens="class", dtype=torch.float64, device="cpu", grad=False):
    """Arguments of learning_simplifier with weights of a size that matters, in ``dtype``."""
    classes = shape[-1]
    width, outputs = (dim + 1, 1) if tokens == "class" else (classes, classes)

    def normal(*size):
        x = torch.randn(size, dtype=torch.float64)
        return (x / size[0] ** 0.5).to(device, dtype).requires_grad_(grad)

    arguments = {
        "teacher_logits": (3 * torch.randn(shape, dtype=torch.float64)).to(device, dtype),
        "query_weight": normal(width, dim),
        "key_weight": normal(width, dim),
        "value_weight": normal(width, dim),
        "output_weight": normal(dim, outputs),
    }
    arguments["teacher_logits"].requires_grad_(grad)
    if tokens == "class":
        arguments["class_embedding"] = normal(classes, dim)
    return arguments, {"tokens": tokens, "num_heads": heads}


@entries
@dtypes
def test_loss_and_gradients(entry, dtype, backend, device):
    """By the pass rule, to student, teacher, the temperature of each row, and all weights."""
    for shape in ((5, 1), (4, 2), (3, 2, 10), (70, 127)):
        inputs = entry.inputs(*shape, dtype=dtype, device=device, optional=True, requires_grad=True)
        exact, plain = leaves(inputs, torch.float64), leaves(inputs)
        value, oracle = entry(inputs, backend=backend), entry(exact, backend="reference")
        yardstick = entry(plain, backend="reference")
        assert_close_to_oracle(value, yardstick, oracle, f"loss at {shape}")
        wanted, theirs = gradients(oracle, exact), gradients(yardstick, plain)
        for name, gradient in gradients(value, inputs).items():
            assert gradient.dtype == inputs[name].dtype
            assert_close_to_oracle(gradient, theirs[name], wanted[name], f"{name} at {shape}")


@entries
def test_baselines_compute_the_same(entry):
    inputs = entry.inputs(6, 20, dtype=torch.float64)
    wanted = entry(inputs, backend="reference")
    for eager in (entry.eager, *entry.others.values()):
        torch.testing.assert_close(eager(**inputs, **entry.hyper), wanted, rtol=1e-10, atol=0)


@pytest.mark.parametrize("tokens", ["class", "batch"])
@pytest.mark.parametrize("residual", [True, False])
def test_heads_and_residual(tokens, residual, backend, device):
    """Against a loop over rows and heads that knows no batching."""
    given, options = problem(4, 9, heads=3, tokens=tokens, device=device)
    result = learning_simplifier(
        **given, **options, residual=residual, temperature=2.0, backend=backend
    )
    soft = given["teacher_logits"] / 2
    if tokens == "class":
        batches = [torch.cat([given["class_embedding"], s[:, None]], -1) for s in soft]
    else:
        batches = [soft]
    rows = []
    for x in batches:
        parts = []
        for head in range(3):
            q, k, v = (
                x @ given[f"{name}_weight"][:, 2 * head : 2 * head + 2]
                for name in ("query", "key", "value")
            )
            parts.append((q @ k.t() / 2**0.5).softmax(-1) @ v)
        rows.append(torch.cat(parts, -1) @ given["output_weight"])
    attended = torch.stack([row.squeeze(-1) for row in rows]) if tokens == "class" else rows[0]
    wanted = 2 * attended + residual * given["teacher_logits"]
    torch.testing.assert_close(result, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", ["class", "batch"])
@dtypes
def test_identity_at_first(tokens, dtype, backend, device):
    given, options = problem(3, 11, tokens=tokens, dtype=dtype, device=device)
    given["output_weight"].zero_()
    result = learning_simplifier(**given, **options, temperature=3.0, backend=backend)
    assert torch.equal(result, given["teacher_logits"].to(result.dtype))


def test_classes_that_take_no_part(backend, device):
    """They stay at -inf, and the others' results and gradients are those of a problem without."""
    given, options = problem(3, 8, device=device)
    logits, embedding = given["teacher_logits"], given["class_embedding"]
    logits[:, 5] = -INF
    logits[2] = -INF  # a row without any class
    given = leaves({name: x.requires_grad_() for name, x in given.items()})
    on = [0, 1, 2, 3, 4, 6, 7]
    without = {name: x.detach().clone() for name, x in given.items()}
    without |= {"teacher_logits": logits[:2, on], "class_embedding": embedding[on]}
    without = {name: x.detach().requires_grad_() for name, x in without.items()}
    result = learning_simplifier(**given, **options, backend=backend)
    wanted = learning_simplifier(**without, **options, backend="reference")
    assert torch.equal(result == -INF, logits == -INF)
    torch.testing.assert_close(result[:2, on], wanted)
    upstream = torch.randn_like(result)
    kept = upstream[:2, on]
    actual = gradients(result, given, upstream)
    for name, gradient in gradients(wanted, without, kept).items():
        ours = actual[name]
        if name == "teacher_logits":
            ours = ours[:2, on]
        if name == "class_embedding":
            ours = ours[on]
        torch.testing.assert_close(ours, gradient)
    assert not actual["teacher_logits"][logits == -INF].any()
    assert not actual["class_embedding"][5].any()


def test_batch_tokens_ignore_absent_classes(backend, device):
    given, options = problem(4, 8, tokens="batch", device=device, grad=True)
    with torch.no_grad():
        given["teacher_logits"][:, 5] = -INF
    result = learning_simplifier(**given, **options, backend=backend)
    assert torch.equal(result == -INF, given["teacher_logits"] == -INF)
    upstream = torch.randn_like(result)
    assert all(x.isfinite().all() for x in gradients(result, given, upstream).values())


@dtypes
@pytest.mark.parametrize("tokens", ["class", "batch"])
@pytest.mark.parametrize("case", ["constant", "one hot", "huge", "one row", "one class"])
def test_extremes_are_finite(case, tokens, dtype, backend, device):
    shape = {"one row": (1, 30), "one class": (4, 1)}.get(case, (4, 30))
    given, options = problem(*shape, tokens=tokens, dtype=dtype, device=device, grad=True)
    with torch.no_grad():
        logits = given["teacher_logits"]
        if case == "constant":
            logits.fill_(2.5)
        if case == "one hot":
            logits.fill_(-100)[:, 3] = 100
        if case == "huge":
            logits.sign_().mul_(1e4)
    result = learning_simplifier(**given, **options, backend=backend)
    assert result.isfinite().all()
    assert all(x.isfinite().all() for x in gradients(result.mean(), given).values())
    if case == "one class" and tokens == "class":  # whose attention is to itself
        value = given["value_weight"].double() * given["output_weight"].double().view(-1)
        token = torch.cat([given["class_embedding"].double().view(-1), torch.zeros(1)])
        fixed = 4 * (token @ value).sum()
        wanted = given["teacher_logits"].double() * (1 + value[-1].sum()) + fixed
        torch.testing.assert_close(result.double(), wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("tokens", ["class", "batch"])
def test_layouts(tokens, backend, device):
    given, options = problem(4, 3, 10, tokens=tokens, device=device)
    wanted = learning_simplifier(**given, **options, backend=backend)
    logits = given["teacher_logits"]
    wide = torch.randn(4, 3, 21, dtype=torch.float64, device=device)
    wide[..., 1::2] = logits
    views = [wide[..., 1::2], logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)]
    for view in views:
        result = learning_simplifier(**given | {"teacher_logits": view}, **options, backend=backend)
        torch.testing.assert_close(result, wanted)
    transposed = {n: x.t().contiguous().t() if x.dim() == 2 else x for n, x in given.items()}
    torch.testing.assert_close(
        learning_simplifier(**transposed, **options, backend=backend), wanted
    )


@pytest.mark.parametrize("tokens", ["class", "batch"])
def test_no_rows(tokens, backend, device):
    given, options = problem(0, 10, tokens=tokens, device=device, grad=True)
    result = learning_simplifier(**given, **options, backend=backend)
    assert result.shape == (0, 10)
    assert not any(x.any() for x in gradients(result.sum(), given).values())


@pytest.mark.parametrize("tokens", ["class", "batch"])
def test_gradcheck(tokens, backend, device):
    given, options = problem(3, 4, dim=4, tokens=tokens, device=device, grad=True)
    given["temperature"] = torch.tensor([1.5, 2.0, 3.0], dtype=torch.float64, device=device)
    given["temperature"].requires_grad_()
    names = list(given)

    def function(*tensors):
        arguments = dict(zip(names, tensors, strict=True))
        return learning_simplifier(**arguments, **options, backend=backend)

    assert torch.autograd.gradcheck(function, tuple(given.values()))
    if backend == "reference":
        assert torch.autograd.gradgradcheck(function, tuple(given.values()))


@pytest.mark.parametrize("tokens", ["class", "batch"])
def test_higher_orders_need_the_reference(tokens, kernel, device):
    given, options = problem(3, 6, tokens=tokens, device=device, grad=True)

    def value(teacher_logits):
        arguments = given | {"teacher_logits": teacher_logits}
        return learning_simplifier(**arguments, **options, backend=kernel).square().sum()

    logits = given["teacher_logits"]
    with pytest.raises(RuntimeError, match=r'learning_simplifier: .* backend="reference"'):
        torch.autograd.grad(value(logits), logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r'learning_simplifier: .* backend="reference"'):
        torch.func.grad(value)(logits.detach())


@pytest.mark.parametrize("tokens", ["class", "batch"])
def test_backward_again(tokens, backend, device):
    given, options = problem(3, 6, tokens=tokens, device=device, grad=True)
    result = learning_simplifier(**given, **options, backend=backend).sum()
    inputs = list(given.values())
    first = torch.autograd.grad(result, inputs, retain_graph=True)
    second = torch.autograd.grad(result, inputs, torch.tensor(2.0, dtype=torch.float64))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize("tokens", ["class", "batch"])
def test_only_what_is_asked_for(tokens, backend, device):
    """A frozen teacher, and frozen weights."""
    given, options = problem(3, 6, tokens=tokens, device=device, grad=True)
    wanted = gradients(learning_simplifier(**given, **options, backend=backend).sum(), given)
    for frozen in given:
        fewer = leaves(given)
        fewer[frozen].requires_grad_(False)
        result = learning_simplifier(**fewer, **options, backend=backend).sum()
        for name, gradient in gradients(result, fewer).items():
            torch.testing.assert_close(gradient, wanted[name])


@needs_cpu
@pytest.mark.parametrize("sizes", [(1, 1, 1), (9, 3, 17), (20, 100, 33), (64, 40, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_products_at_the_edges_of_tiles(sizes, dtype):
    """Rows, columns and depths that fill no tile."""
    rows, dim, classes = sizes
    given, options = problem(rows, classes, dim=dim, heads=1, tokens="batch", dtype=dtype)
    result = learning_simplifier(**given, **options, backend="cpu")
    exact = {name: x.double() for name, x in given.items()}
    wanted = learning_simplifier(**exact, **options, backend="reference")
    plain = learning_simplifier(**given, **options, backend="reference")
    assert_close_to_oracle(result, plain, wanted)
