# SPDX-License-Identifier: Apache-2.0
"""The learning simplifier: its algebra, its limits, its gradients, and its modules."""

from __future__ import annotations

import math
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import kdkernels
from kdkernels import backends
from kdkernels.bench import measure
from kdkernels.functional import learning_simplifier
from kdkernels.ops.attention import (
    GRAD_COEFFICIENTS,
    GRAD_TEACHER,
    GRAD_TEMPERATURE,
    GRAD_WEIGHTS,
)
from kdkernels.testing import LOSSES, assert_close_to_oracle, gradients, leaves

ENTRIES = [loss for loss in LOSSES.values() if loss.family == "attention"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
entries = pytest.mark.parametrize("entry", ENTRIES, ids=lambda x: x.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
needs_cpu = pytest.mark.skipif(
    not backends.verdict("attention", "cpu", "cpu").ok, reason="_C_cpu is not built"
)
OPS = torch.ops.kdkernels
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


class TestModules:
    def test_simplifier(self):
        simplifier = kdkernels.LearningSimplifier(10, 8, num_heads=2)
        teacher = torch.randn(4, 10)
        assert torch.equal(simplifier(teacher), teacher)
        torch.nn.init.normal_(simplifier.output_weight)
        weights = dict(simplifier.named_parameters())
        wanted = learning_simplifier(teacher, **weights, num_heads=2)
        assert torch.equal(simplifier(teacher), wanted)
        again = kdkernels.LearningSimplifier(10, 8, num_heads=2)
        again.load_state_dict(simplifier.state_dict())
        assert torch.equal(again(teacher), wanted)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"num_heads": 3}, r"num_heads must divide dim \(8\), got 3"),
            ({"dim": 0}, "dim must be at least 1"),
            ({"tokens": "row"}, "tokens must be one of"),
            ({"temperature": -1.0}, "temperature must be positive"),
            ({"backend": "gpu"}, "backend must be one of"),
        ],
    )
    def test_refused_at_construction(self, changed, message):
        with pytest.raises(ValueError, match=message):
            kdkernels.LearningSimplifier(**{"num_classes": 10, "dim": 8} | changed)

    @pytest.mark.parametrize("tokens", ["class", "batch"])
    def test_loss(self, tokens):
        """Cross-entropy and divergence from the simplified teacher, learning the simplifier too."""
        loss = kdkernels.StudentFriendlyKDLoss(
            10, 8, tokens=tokens, temperature=torch.nn.Parameter(torch.tensor(3.0))
        )
        torch.nn.init.normal_(loss.simplifier.output_weight, std=0.1)
        student, teacher = torch.randn(2, 4, 10)
        student.requires_grad_()
        labels = torch.randint(10, (4,))
        value = loss(student, teacher, labels)
        soft = (loss.simplifier(teacher) / 3).log_softmax(-1)
        kl = (soft.exp() * (soft - (student / 3).log_softmax(-1))).sum(-1).mean()
        wanted = torch.nn.functional.cross_entropy(student, labels) + 9 * kl
        torch.testing.assert_close(value, wanted)
        value.backward()
        assert all(p.grad.any() for p in [student, *loss.parameters()])

    def test_around_a_loss_with_labels(self):
        dkd = kdkernels.DKDLoss(temperature=4.0)
        loss = kdkernels.StudentFriendlyKDLoss(10, 8, loss=dkd, ce_weight=0.0)
        student, teacher = torch.randn(2, 4, 10)
        labels = torch.randint(10, (4,))
        torch.testing.assert_close(loss(student, teacher, labels), dkd(student, teacher, labels))

    @pytest.mark.parametrize("inner", [kdkernels.ReverseKLDivLoss(), torch.nn.MSELoss()], ids=str)
    def test_around_another_loss(self, inner):
        loss = kdkernels.StudentFriendlyKDLoss(10, 8, loss=lambda s, t, *_: inner(s, t))
        student, teacher = torch.randn(2, 4, 10)
        labels = torch.randint(10, (4,))
        wanted = inner(student, teacher)  # the target before the first step
        wanted = wanted + torch.nn.functional.cross_entropy(student, labels)
        torch.testing.assert_close(loss(student, teacher, labels), wanted)

    def test_detached_student(self):
        """The distillation loss then trains the simplifier alone, towards the student."""
        loss = kdkernels.StudentFriendlyKDLoss(10, 8, detach_student=True)
        torch.nn.init.normal_(loss.simplifier.output_weight)
        student, teacher = torch.randn(2, 4, 10)
        student.requires_grad_()
        labels = torch.randint(10, (4,))
        loss(student, teacher, labels).backward()
        ce = torch.nn.functional.cross_entropy(student, labels)
        torch.testing.assert_close(student.grad, torch.autograd.grad(ce, student)[0])
        assert all(p.grad.any() for p in loss.parameters())

    def test_needs_labels(self):
        student, teacher = torch.randn(2, 4, 10)
        with pytest.raises(ValueError, match="labels must be given"):
            kdkernels.StudentFriendlyKDLoss(10)(student, teacher)
        kdkernels.StudentFriendlyKDLoss(10, ce_weight=0.0)(student, teacher)


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
