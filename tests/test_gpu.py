# SPDX-License-Identifier: Apache-2.0
"""What only a GPU can show, over the registry: real sizes, streams, graphs, no synchronisation.

The other test files also run on a GPU where there is one: pytest -m gpu.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from kdkernels import functional as kd
from kdkernels.testing import LOSSES, assert_close_to_oracle, gradients, leaves

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]


@pytest.fixture(params=["triton", "cuda"])
def kernel(request):
    if request.param not in LOSSES["kl_div"].backends(DEVICE):
        pytest.skip(f"no {request.param} kernel here")
    return request.param


def student_and_teacher(loss, *shape, **options):
    """Inputs of which the logits require gradients."""
    return loss.inputs(*shape, device=DEVICE, requires_grad=True, **options)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((256, 1000), torch.float32),  # rows in registers
        ((257, 1001), torch.float16),  # unaligned rows
        ((128, 32000), torch.bfloat16),
        ((32, 128256), torch.bfloat16),  # rows in several blocks
        ((32, 128257), torch.float32),
        ((8, 262144), torch.bfloat16),
    ],
    ids=str,
)
def test_values_and_gradients(loss, kernel, shape, dtype):
    assert_as_in_fp64(loss, kernel, shape, dtype)


@pytest.mark.parametrize("name", ["cifar100_b64", "imagenet_b256", "llama2_vocab"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_families(any_loss, kernel, name, dtype):
    if any_loss.by_row or name not in any_loss.shapes or kernel not in any_loss.backends(DEVICE):
        pytest.skip("another test's, or no such kernel or shape")
    assert_as_in_fp64(any_loss, kernel, any_loss.shapes[name], dtype)


def assert_as_in_fp64(loss, kernel, shape, dtype):
    inputs = student_and_teacher(loss, *shape, dtype=dtype)
    exact, plain = leaves(inputs, torch.float64), leaves(inputs)
    values = (
        loss(inputs, backend=kernel),
        loss.eager(**plain, **loss.hyper),
        loss(exact, backend="reference"),
    )
    assert_close_to_oracle(*values, "loss")
    by_name = [gradients(v, x) for v, x in zip(values, (inputs, plain, exact), strict=True)]
    for name in by_name[0]:
        assert_close_to_oracle(*(each[name] for each in by_name), name)


@pytest.mark.parametrize("optional", [False, True], ids=["plain", "per_row"])
def test_no_synchronisation(loss, kernel, optional):
    """Neither forward nor backward waits for the GPU, whatever the upstream gradient."""
    inputs = student_and_teacher(loss, 64, 1000, optional=optional)
    if optional:
        inputs["mask"] = torch.arange(64, device=DEVICE) % 3 != 0
    half = torch.tensor(0.5, device=DEVICE)
    loss(inputs, backend=kernel).backward(half)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(inputs, backend=kernel).backward()
        loss(inputs, backend=kernel).backward(half)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graph_replay(loss, kernel):
    """A captured forward and backward computes on whatever its inputs hold at replay."""
    inputs = student_and_teacher(loss, 64, 1000)
    upstream = torch.tensor(0.5, device=DEVICE)

    def step():
        value = loss(inputs, backend=kernel)
        return value, gradients(value, inputs, upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, grads = step()
    for seed, factor in ((1, 1.0), (2, 0.25)):
        upstream.fill_(factor)
        with torch.no_grad():
            for name, tensor in loss.inputs(64, 1000, device=DEVICE, seed=seed).items():
                inputs[name].copy_(tensor)
        graph.replay()
        expected_value, expected = step()
        assert torch.equal(value, expected_value)
        for name in expected:
            assert torch.equal(grads[name], expected[name]), name


def test_side_stream(kernel):
    """The kernel waits for what its own stream was given before, and for nothing else."""
    loss = LOSSES["kd_loss"]
    inputs = loss.inputs(512, 32000, device=DEVICE)
    expected = loss(inputs, backend=kernel)
    late = torch.zeros_like(inputs["student"])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # some 50 ms, in which a kernel elsewhere would read zeros
        late.copy_(inputs["student"])
        value = loss(inputs | {"student": late}, backend=kernel)
    stream.synchronize()
    assert torch.equal(value, expected)


def test_same_bits_every_time(loss, kernel):
    inputs = student_and_teacher(loss, 256, 32000, dtype=torch.bfloat16)
    first, second = (loss(inputs, backend=kernel) for _ in range(2))
    assert torch.equal(first, second)
    for a, b in zip(
        gradients(first, inputs).values(), gradients(second, inputs).values(), strict=True
    ):
        assert torch.equal(a, b)


def test_offsets_beyond_32_bits(kernel):
    """The last rows of more than 2^31 elements are what they are alone."""
    rows, classes = 2**14 + 64, 2**17
    if torch.cuda.mem_get_info()[0] < 10 * rows * classes:
        pytest.skip("needs 22 GB of GPU memory")
    student, teacher = (
        torch.randn(rows, classes, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)
    )
    student.requires_grad_()
    value = kd.kl_div(student, teacher, reduction="none", backend=kernel)
    (grad,) = torch.autograd.grad(value, student, torch.ones_like(value))
    for part in (slice(0, 4), slice(rows - 4, rows)):
        alone = student.detach()[part].clone().requires_grad_()
        expected = kd.kl_div(alone, teacher[part].clone(), reduction="none", backend=kernel)
        (expected_grad,) = torch.autograd.grad(expected, alone, torch.ones_like(expected))
        assert torch.equal(value[part], expected)
        assert torch.equal(grad[part], expected_grad)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compile(loss, kernel, mode):
    """In one graph; under CUDA graphs too, whose kernels must be on the capturing stream."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda given: loss(given, backend=kernel), fullgraph=True, dynamic=False, mode=mode
    )
    for seed in range(4):  # recorded at the second call, replayed from the third
        inputs = student_and_teacher(loss, 64, 1000, seed=seed)
        torch.compiler.cudagraph_mark_step_begin()
        value = compiled(inputs)
        upstream = torch.tensor(0.5, device=DEVICE)
        grads = gradients(value, inputs, upstream)
        expected = loss(inputs, backend=kernel)
        torch.testing.assert_close(value, expected)
        for name, grad in gradients(expected, inputs, upstream).items():
            torch.testing.assert_close(grads[name], grad)


def test_backward_scales_and_repeats(loss, kernel):
    inputs = student_and_teacher(loss, 64, 1000)
    value = loss(inputs, backend=kernel)
    torch.autograd.backward(value, retain_graph=True)
    unit = {name: inputs[name].grad.clone() for name in ("student", "teacher")}
    for name in unit:
        inputs[name].grad = None
    for _ in range(2):
        halves = torch.autograd.grad(
            value, [inputs[name] for name in unit], torch.tensor(0.5, device=DEVICE),
            retain_graph=True,
        )  # fmt: skip
        for half, whole in zip(halves, unit.values(), strict=True):
            assert torch.equal(2 * half, whole)


@pytest.mark.parametrize("name", ["kl_div", "kd_loss"])
def test_fp16_under_a_scaler(name, kernel):
    """At this size gradients divided by the number of rows would be below fp16's smallest."""
    loss = LOSSES[name]
    rows, classes, scale = 8192, 32000, 2.0**16
    block = loss.inputs(64, classes, device=DEVICE, dtype=torch.float16)
    inputs = {name: x.repeat(rows // 64, *[1] * (x.dim() - 1)) for name, x in block.items()}
    student = inputs["student"].requires_grad_()
    scaler = torch.amp.GradScaler(DEVICE, init_scale=scale)
    scaler.scale(loss(inputs, backend=kernel)).backward()
    exact = leaves(block, torch.float64)
    exact["student"].requires_grad_()
    oracle = gradients(loss(exact, backend="reference"), exact)["student"] * (64 / rows)
    grad = student.grad[:64].double() / scale
    assert student.grad.isfinite().all()
    assert (grad - oracle).norm() <= 2e-3 * oracle.norm()


# Rows of a warp, of a block, unaligned, and of several blocks, a few of each.
_SMALL_CALLS = """
import sys, torch
from kdkernels.testing import LOSSES
for name in ("kl_div", "dkd_loss", "kl_div_standardized"):
    for shape in ((3, 10), (5, 1001), (2, 40000), (2, 140001)):
        for dtype in (torch.bfloat16, torch.float32):
            inputs = LOSSES[name].inputs(*shape, device="cuda", dtype=dtype, requires_grad=True)
            LOSSES[name](inputs, backend=sys.argv[1]).backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool, kernel):
    sanitizer = shutil.which("compute-sanitizer") or pytest.skip("no compute-sanitizer")
    result = subprocess.run(
        [
            sanitizer, "--tool", tool, "--error-exitcode", "99", "--print-limit", "5",
            sys.executable, "-c", _SMALL_CALLS, kernel,
        ],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if "Device not supported" in result.stdout:
        pytest.skip("compute-sanitizer does not know this device")
    assert result.returncode == 0, result.stdout + result.stderr
