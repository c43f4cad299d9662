# SPDX-License-Identifier: Apache-2.0
"""The rowwise family's CUDA kernels, run by the simulator on a machine without a GPU.

They compute what the reference does in fp64, on every path: rows of a warp, of a block, and in the
shared memory of clusters of each size (the simulated device has little of it, so that short rows
fill it), in several orders of the threads. Races, missing waits and accesses out of bounds raise.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiling import SANITIZED, run, tool
from simulated_rowwise_calls import DTYPES, build, expected, load, simulate

from kdkernels.divergences import DIVERGENCES, KINDS

ROOT = Path(__file__).parents[1]
INF = float("inf")

WARPS, THREADS, SLOT_CHUNKS = 2, 64, 16
CLUSTERS = {1: 90, 2: 400, 4: 1001, 8: 4000}  # and how many classes they have here


@pytest.fixture
def module():
    built = load()
    built.set_limits(64, 80, THREADS, WARPS, SLOT_CHUNKS)
    built.set_device(90, 2, 227 * 1024)
    return built


def logits(rows, classes, dtype=torch.float32, seed=0, spread=3.0, skip=0):
    """(student, teacher), each ``skip`` elements past an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(2):
        base = torch.zeros(rows * classes + skip, dtype=dtype)
        part = base[skip:].view(rows, classes)
        part.copy_(torch.randn(rows, classes, generator=generator) * spread)
        out.append(part)
    return out


def check(module, student, teacher, *, gradient=True, seed=0, inplace=False, **options):
    """Compare a call with the reference; the loss, the gradient, and how the call was laid out."""
    value, grad = expected(student, teacher, **options)
    got, got_grad, plan = simulate(
        module, student, teacher, gradient=gradient, seed=seed, inplace=inplace, **options
    )
    torch.testing.assert_close(got.double(), value, rtol=4e-6, atol=1e-9)
    if gradient:
        eps = torch.finfo(student.dtype).eps
        finite = torch.isfinite(grad)
        assert (torch.isfinite(got_grad) == finite).all()
        error = (got_grad - grad)[finite].norm()
        assert error <= (eps + 4e-6) * grad[finite].norm() + 1e-12
    return got, got_grad, plan


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 10, 37, 64])
def test_a_warp_has_a_row(module, classes, dtype):
    *_, plan = check(module, *logits(7, classes, DTYPES[dtype]))
    assert plan["one_warp"] and plan["narrow"] == (dtype != "fp64")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_has_a_row(module, dtype):
    *_, plan = check(module, *logits(3, 75, DTYPES[dtype]))
    assert not plan["one_warp"] and not plan["slots"]
    module.set_limits(64, 1000, THREADS, WARPS, SLOT_CHUNKS)
    for classes, skip in ((600, 0), (601, 1), (601, 6)):  # several chunks a thread, of two warps
        *_, plan = check(module, *logits(3, classes, DTYPES[dtype], skip=skip))
        assert plan["threads"] == THREADS and plan["narrow"] == (dtype != "fp64")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_cluster_has_a_row(module, cluster, dtype):
    student, teacher = logits(5, CLUSTERS[cluster], DTYPES[dtype])
    *_, plan = simulate(module, student[:1], teacher[:1], gradient=False)
    while plan["cluster"] < cluster:  # for which a device with too little memory asks
        module.set_device(90, 2, 2 * plan["shared_bytes"] - 16)
        *_, plan = simulate(module, student[:1], teacher[:1], gradient=False)
    for seed in range(2):
        *_, plan = check(module, student, teacher, seed=seed)
        assert plan["slots"] and plan["cluster"] == cluster
        assert plan["groups"] < 5  # some have several rows, one after the other


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("skip", [1, 2, 3, 5, 7])
def test_any_alignment(module, skip, dtype):
    module.set_device(90, 1, 8192)
    student, teacher = logits(3, 203, DTYPES[dtype], skip=skip)
    *_, plan = check(module, student, teacher)
    assert plan["slots"]
    _, other = logits(3, 203, DTYPES[dtype], skip=(skip * 3) % 8)
    check(module, student, other)
    module.set_device(80, 1, 8192)
    *_, plan = check(module, student, other)
    assert not plan["slots"] and not plan["narrow"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("classes", [60, 75, 300])
def test_maxima_that_keep_moving(module, classes, capability):
    """What a thread has summed moves with its maxima, and is lost where all before was off."""
    module.set_device(capability, 1, 8192)
    noise = torch.randn(2, 5, classes, generator=torch.Generator().manual_seed(0))
    student = torch.linspace(-200, 200, classes) + noise[0]
    student[1] = student[1].flip(-1)
    student[2, : classes // 2] = -INF
    student[3, 1::2] -= 30
    student[4, classes // 3] += 300
    for near in (0.0, 1e-4, 0.5):
        teacher = student + near * noise[1]
        check(module, student, teacher)
        check(module, student, teacher + 20, kind="js", temperature=0.5)
    labels = torch.tensor([classes - 1, 0, classes - 2, 0, classes // 3])
    check(module, student, teacher, labels=labels, ce_weight=0.3, temperature=4.0)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("classes", [50, 150])
def test_every_divergence(module, kind, classes):
    module.set_device(90, 2, 8192)
    student, teacher = logits(5, classes)
    student[1, 3::2] = teacher[1, 3::2] = -INF
    check(module, student, teacher, kind=kind, temperature=2.0)
    half = student.half() / 3, teacher.bfloat16() / 3  # of different dtypes
    check(module, *half, kind=kind, temperature=1.5, teacher_temperature=2.5)
    check(module, student, teacher, kind=kind, gradient=False)
    check(module, student, teacher, kind=kind, inplace=True)


@pytest.mark.parametrize("classes", [50, 150])
@pytest.mark.parametrize("powers", [(-0.5, 1.0), (1.0, -0.5), (0.5, -1.0), (-0.5, -0.5)])
def test_powers_of_classes_that_are_off(module, classes, powers):
    module.set_device(90, 1, 8192)
    student, teacher = logits(3, classes, spread=1.0)
    student[1, 3::2] = teacher[1, 3::2] = student[2, 1:] = teacher[2, 1:] = -INF
    check(module, student, teacher, kind="ab", alpha=powers[0], beta=powers[1], temperature=2.0)


@pytest.mark.parametrize("classes", [50, 150])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kd_weight", [0.0, 0.9])
def test_cross_entropy(module, classes, smoothing, kd_weight):
    module.set_device(90, 2, 8192)
    student, teacher = logits(5, classes)
    labels = torch.tensor([0, classes - 1, -100, 3, 17])
    check(
        module, student, teacher, labels=labels, ce_weight=0.3, kd_weight=kd_weight,
        label_smoothing=smoothing, temperature=4.0,
    )  # fmt: skip
    probabilities = torch.softmax(torch.randn(5, classes), -1)
    check(
        module, student, teacher, labels=probabilities, ce_weight=0.3, kd_weight=kd_weight,
        label_smoothing=smoothing, temperature=4.0,
    )  # fmt: skip


@pytest.mark.parametrize("classes", [30, 75, 150])
def test_masks_and_weights(module, classes):
    module.set_device(90, 1, 8192)
    student, teacher = logits(9, classes)
    per_row = {
        "mask": torch.tensor([0, 0, 1, 1, 0, 1, 0, 1, 0], dtype=torch.bool),
        "row_weight": torch.linspace(0.5, 2, 9),
        "temperature": torch.linspace(1, 3, 9),
        "teacher_temperature": torch.linspace(2, 1, 9),
    }
    for reduction in ("batchmean", "sum", "none"):
        *_, grad, _ = check(module, student, teacher, reduction=reduction, **per_row)
        assert (grad[~per_row["mask"]] == 0).all()
    none = per_row | {"mask": torch.zeros(9, dtype=torch.bool)}
    value, grad, _ = simulate(module, student, teacher, **none)
    assert value == 0 and (grad == 0).all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "js", "tv"])
@pytest.mark.parametrize("classes", [40, 150])
def test_rows_that_fp32_does_not_hold(module, kind, classes):
    module.set_device(90, 1, 8192)
    student, teacher = logits(6, classes)
    student[0, :3] = teacher[0, :3] = -INF  # off on both sides: no reason for double
    teacher[1, 5] = -INF
    student[2, 5] = -INF
    student[3] *= 1e3
    student[4], teacher[4] = teacher[4], student[4] * 1e4
    got, _, plan = check(module, student, teacher, kind=kind, reduction="none")
    assert 2 <= plan["inexact"] <= 4
    assert torch.isinf(got[2]) == (kind == "forward_kl")
    assert torch.isinf(got[1]) == (kind == "reverse_kl")


def test_few_such_rows_among_many(module):
    """A warp looks for them among 32 rows at a time."""
    student, teacher = logits(300, 10)
    student[[3, 130, 131, 299]] *= 1e3
    _, _, plan = check(module, student, teacher)
    assert plan["inexact"] == 4 and plan["groups"] == 8


def test_shared_memory_of_several_blocks(module):
    """A block is given what leaves the others as much, with what is reserved for each."""
    student, teacher = logits(1, 1000)
    *_, plan = simulate(module, student, teacher, gradient=False)
    for reserved, cluster in ((0, 1), (16, 2)):
        module.set_device(90, 2, plan["shared_bytes"], 2 * plan["shared_bytes"], reserved)
        *_, spread = simulate(module, student, teacher, gradient=False)
        assert spread["cluster"] == cluster


def test_nan_stays_in_its_row(module):
    student, teacher = logits(4, 30)
    student[1, 3], teacher[2] = float("nan"), -INF
    value, grad, _ = simulate(module, student, teacher, reduction="none")
    bad = torch.tensor([False, True, True, False])
    assert (torch.isnan(value) == bad).all() and (torch.isnan(grad).all(-1) == bad).all()
    assert (torch.isfinite(grad).all(-1) == ~bad).all()


def test_label_out_of_range_is_nan(module):
    student, teacher = logits(3, 30)
    labels = torch.tensor([3, 30, -7])
    value, grad, _ = simulate(
        module, student, teacher, labels=labels, ce_weight=1.0, reduction="none"
    )
    assert torch.isnan(value).tolist() == [False, True, True]
    assert torch.isnan(grad).all(-1).tolist() == [False, True, True]


@pytest.mark.parametrize("classes", [30, 75, 150])
def test_identical_and_close_rows(module, classes):
    module.set_device(90, 1, 8192)
    student, _ = logits(4, classes)
    value, grad, _ = simulate(module, student, student.clone())
    assert value == 0 and (grad == 0).all()
    for scale in (0.3, 0.05, 1e-3, 1e-5):
        teacher = student + scale * torch.randn(4, classes)
        check(module, student, teacher)
        if scale > 1e-2:  # below, the logits' rounding is what is seen
            check(module, student, teacher - 0.75)
        teacher[:, 3] -= 9  # close, but for a class
        check(module, student, teacher, kind="js", temperature=2.0)


@pytest.mark.parametrize("temperature", [0.3, 20.0])
@pytest.mark.parametrize("classes", [30, 75, 150])
def test_offsets(module, classes, temperature):
    """What the rounding of a large maximum takes is made good."""
    module.set_device(90, 1, 8192)
    student, teacher = logits(4, classes)
    labels = torch.tensor([0, classes - 1, 3, 17])
    for shift in (3e3, -7e4):
        options = {"labels": labels, "ce_weight": 0.5, "temperature": temperature}
        check(module, student + shift, teacher - shift / 3, **options)
        check(module, student + shift, teacher, temperature=temperature, teacher_temperature=1.5)


def test_same_bits_in_any_order(module):
    module.set_device(90, 2, 6144)
    student, teacher = logits(5, 600, torch.bfloat16)
    results = [simulate(module, student, teacher, seed=seed)[:2] for seed in range(4)]
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(grad, results[0][1])


def test_strided_classes(module):
    student, teacher = (x.T.contiguous().T for x in logits(4, 75))
    check(module, student, teacher)


@pytest.mark.slow
def test_sanitizers():
    """All of the above under AddressSanitizer and UndefinedBehaviourSanitizer."""
    library = run([tool("g++"), "-print-file-name=libasan.so"]).stdout.strip()
    code = (
        f"import sys; sys.path[:0] = [{str(build(SANITIZED).parent)!r}, {str(ROOT / 'tests')!r}];"
        "import torch, simulated_rowwise as m, test_cuda_rowwise as t;"
        f"m.set_limits(64, 80, {THREADS}, {WARPS}, {SLOT_CHUNKS}); m.set_device(90, 2, 6144);"
        "[t.check(m, *t.logits(3, c, d, skip=1)) for c in (10, 75, 300) for d in"
        " (torch.float32, torch.bfloat16, torch.float16)];"
        "import test_cuda_rowwise_members as a;"
        "a.ops.rowwise._compiled = a.operators(m, []);"
        "[a.check(f, {**a.inputs_of(c), **a.per_row()}, a.ALL) for c in a.PLACES.values()"
        " for f in a.MEMBERS.values()];"
        "[a.check(f, a.inputs_of(c, 'bf16', skip=1)) for c in a.PLACES.values()"
        " for f in a.TARGETS.values()]"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]


def test_every_kind_has_its_source():
    kinds = {path.stem for path in (ROOT / "csrc/kd/cuda/rowwise/kinds").glob("*.cu")}
    assert kinds == set(KINDS)
