# SPDX-License-Identifier: Apache-2.0
"""The relation family's own properties; those of every loss over features are in test_features."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from interpreter import INTERPRETED, assert_passes_interpreted

import kdkernels
from kdkernels import functional as kd
from kdkernels.testing import LOSSES, assert_close_to_oracle, gradients, leaves

ENTRIES = [x for x in LOSSES.values() if x.family.startswith("relation.")]
BACKENDS = LOSSES["rkd_loss"].backends()
on_every = pytest.mark.parametrize("backend", BACKENDS)
# Where the family has no Triton kernel.
on_all_but_triton = pytest.mark.parametrize("backend", LOSSES["nst_loss"].backends())
# Of test_features and of this file, what runs in half a minute by Triton's interpreter.
PROPERTIES = (
    "value_and_gradients and float32", "each_side_alone", "mixed_dtypes", "channels_last",
    "gradcheck", "one_sample", "zero_and_identical", "autocast", "kept", "grad_scaler",
    "coincident", "cluster", "sizes", "squared", "compat",
)  # fmt: skip

if not INTERPRETED:

    def test_triton_in_a_process_with_the_interpreter():
        pytest.importorskip("triton", reason="triton is not installed: nothing to interpret")
        names = " or ".join(x.name for x in ENTRIES if "kdsvd" not in x.name)
        chosen = " or ".join(f"({x})" for x in PROPERTIES)
        assert_passes_interpreted(
            __file__,
            str(Path(__file__).with_name("test_features.py")),
            chosen=f"triton and ({chosen}) and ({names} or relation)",
        )


def embeddings(rows=7, width=5, other=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, n, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (width, other)
    ]


def assert_as_reference(function, tensors, backend, dtype=None, **options):
    """By the rule of the kernels, with the reference in the tensors' dtype as yardstick."""
    given = {str(i): x for i, x in enumerate(tensors)}
    runs = []
    for inputs, where in (
        (given, backend), (leaves(given), "reference"), (leaves(given, torch.float64), "reference")
    ):  # fmt: skip
        value = function(*inputs.values(), backend=where, **options)
        runs.append((value, gradients(value, inputs)))
    (value, found), (plain, yardstick), (exact, wanted) = runs
    assert_close_to_oracle(value, plain, exact)
    for name in found:
        assert_close_to_oracle(found[name], yardstick[name], wanted[name], name)


@pytest.mark.parametrize("rows", [3, 16, 33, 70])
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for name in ("rkd_loss", "pkt_loss", "cc_loss", "sp_loss", "sskd_similarity")
        for backend in LOSSES[name].backends()
    ],
)
def test_relation_sizes(name, rows, backend):
    """Batches about the size of a tile, and sides of different widths, wider than a tile."""
    if name == "sskd_similarity":
        rows *= 4
    if backend == "triton" and rows > 33:
        pytest.skip("long in the interpreter")
    student, teacher = embeddings(rows, 70, 33, torch.float32)
    assert_as_reference(getattr(kd, name), (student, teacher), backend)


@on_every
@pytest.mark.parametrize("power", [0, -6, 6])
def test_relation_coincident_rows_have_finite_gradients(power, backend):
    """The angles' in the suites explode; distances of 1e-6 at least are part of the formula."""
    student, teacher = embeddings(9, 6, 6, torch.float32)
    with torch.no_grad():
        student.mul_(10.0**power)
        student[4] = student[1]
        student[7] = student[1]
    assert_as_reference(kd.rkd_angle, (student, teacher), backend)
    value = kd.rkd_loss(student, teacher, backend=backend)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.isfinite().all()
    assert gradient.norm() * student.norm() < 1e4


@on_every
def test_relation_cluster_far_from_the_origin(backend):
    """Spread over norm 1e-3: distances by the Gram matrix of what is not centred are 40 % off."""
    student, teacher = embeddings(8, 16, 16, torch.float32)
    with torch.no_grad():
        student.mul_(1e-3).add_(1.0)
    for function in (kd.rkd_distance, kd.rkd_angle):
        exact = [x.detach().double().requires_grad_() for x in (student, teacher)]
        oracle = function(*exact, backend="reference")
        value = function(student, teacher, backend=backend)
        torch.testing.assert_close(value.double(), oracle, rtol=1e-6, atol=0)
        (wanted,) = torch.autograd.grad(oracle, exact[0])
        (gradient,) = torch.autograd.grad(value, student)
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()


@on_every
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_relation_squared_distances_and_sums(reduction, backend):
    for options in ({"squared": True}, {"squared": False}):
        assert_as_reference(kd.rkd_loss, embeddings(), backend, reduction=reduction, **options)
    student, teacher = embeddings()
    mean = kd.rkd_distance(student, teacher, backend=backend)
    total = kd.rkd_distance(student, teacher, reduction="sum", backend=backend)
    torch.testing.assert_close(total, 49 * mean)


@on_all_but_triton
def test_relation_compat(backend):
    for compat in ("paper", "torchdistill"):
        assert_as_reference(kd.cc_loss, embeddings(), backend, compat=compat, order=4, gamma=0.1)
        assert_as_reference(kd.cc_loss, embeddings(), backend, compat=compat, kernel="bilinear")
        assert_as_reference(kd.sp_loss, embeddings(), backend, compat=compat)
        maps = [torch.randn(2, c, n, n, dtype=torch.float64, requires_grad=True)
                for _ in "st" for c, n in ((3, 6), (4, 6), (5, 3))]  # fmt: skip

        def fsp(*maps, compat=compat, **options):
            return kd.fsp_loss(maps[:3], maps[3:], compat=compat, **options)

        assert_as_reference(fsp, maps, backend)


@on_all_but_triton
@pytest.mark.parametrize("channels", [(3, 5), (40, 6), (6, 40)])
def test_relation_nst_sizes(channels, backend):
    """Either Gram matrix, maps of different channels and heights."""
    maps = [torch.randn(2, c, n, n, dtype=torch.float64, requires_grad=True)
            for c, n in zip(channels, (6, 4), strict=True)]  # fmt: skip
    assert_as_reference(kd.nst_loss, maps, backend)


@pytest.mark.parametrize("name", ["rkd", "pkt", "polynomial", "neighbours", "gram_match"])
@pytest.mark.skipif("cpu" not in BACKENDS, reason="_C_cpu is not built")
def test_operators(name):
    numbers = {"rkd": [1.0, 2.0], "pkt": [1e-7], "polynomial": [0.0, 1.0]}.get(name, [])
    for dtype in (torch.float32, torch.float16) if name != "gram_match" else (torch.float32,):
        x = torch.randn((2, 4, 4) if name == "gram_match" else (5, 4)).to(dtype)
        operator = getattr(torch.ops.kdkernels, name).default
        for grads in range(4):
            torch.library.opcheck(operator, (x, x + 1, 0.5, numbers, [], grads))
    if name == "gram_match":
        gram = torch.eye(3).repeat(2, 1, 1)
        given = gram, gram, gram, 0.5, [1.0, 1.0], [], 7
        torch.library.opcheck(torch.ops.kdkernels.nst_grams.default, given)


def test_kdsvd_of_equal_singular_values():
    """The suites' gradient is not finite; ours is, and 0 where there is nothing to turn."""
    teacher = [torch.randn(2, 6, 4, 4, dtype=torch.float64) for _ in range(2)]
    same = torch.eye(16, 6, dtype=torch.float64).mT.reshape(1, 6, 4, 4).repeat(2, 1, 1, 1)
    for student in (torch.zeros_like(same), same):
        student.requires_grad_()
        value = kd.kdsvd_loss([student, student], teacher)
        (gradient,) = torch.autograd.grad(value, student)
        assert gradient.isfinite().all()


def test_least_wrong():
    scores = torch.tensor([[3.0, 1, 2], [1, 2, 3], [2, 3, 1], [1, 3, 2]])
    labels = torch.tensor([0, 0, 0, 0])  # ranks 0, 2, 1, 2
    assert kd.least_wrong(scores, labels, 1.0).tolist() == [True] * 4
    assert kd.least_wrong(scores, labels, 0.5).tolist() == [True, False, True, False]
    assert kd.least_wrong(scores, labels, 0.7).tolist() == [True, True, True, False]
    assert kd.least_wrong(scores, labels, 0.0).tolist() == [True, False, False, False]


def test_modules():
    student, teacher = embeddings(8, 5, 8)
    assert torch.equal(
        kdkernels.RKDLoss(angle_weight=1.0)(student, teacher),
        kd.rkd_loss(student, teacher, angle_weight=1.0),
    )
    module = kdkernels.CCLoss(5, 8, dim=4, compat="repdistiller").double()
    gradients = torch.autograd.grad(module(student, teacher), list(module.parameters()))
    assert len(gradients) == 4 and all(g.isfinite().all() for g in gradients)
    with pytest.raises(ValueError, match=r"^CCLoss: student_dim and teacher_dim"):
        kdkernels.CCLoss(5)
    with pytest.raises(ValueError, match="reduction"):
        kdkernels.PKTLoss(reduction="none")
    logits = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    loss = kdkernels.SSKDLoss()(logits, logits.detach(), student, teacher, torch.tensor([1, 2]))
    assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_what_is_refused():
    x = torch.zeros(4, 3)
    for call, message in (
        (lambda: kd.pkt_loss(x, x, eps=0.0), "eps must be in"),
        (lambda: kd.cc_loss(x, x, order=0), "order must be in"),
        (lambda: kd.cc_loss(x, x[:, :2], compat="repdistiller"), "teacher must have"),
        (lambda: kd.sskd_similarity(x, x, views=3), "views must be at least 2 and divide"),
        (lambda: kd.least_wrong(x, torch.zeros(4), math.inf), "ratio"),
        (lambda: kd.fsp_loss([x.view(1, 1, 4, 3)], [x.view(1, 1, 4, 3)]), "at least 2 stages"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
