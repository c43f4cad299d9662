# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels, run by Triton's interpreter on CPU tensors, against the reference in fp64.

The interpreter must be chosen before the kernels are decorated, so the tests run in a process of
their own, which the first one starts. Shapes are tiny; tiles are shrunk so that a short row takes
the path of a long one. Races, alignment and rounding of real hardware are beyond the interpreter.
"""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: nothing to interpret")

from interpreter import INTERPRETED, assert_passes_interpreted

from kdkernels import checks
from kdkernels import functional as F
from kdkernels.divergences import DIVERGENCES, Choices, Numbers

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of the loss (relative) and of gradients (relative L2). Those in 16 bits are rounded twice, saved
# and scaled, and the interpreter truncates to bf16 where hardware rounds.
LOSS = {torch.float64: 1e-12}
GRADIENT = {torch.float64: 1e-11, torch.bfloat16: 1e-2, torch.float16: 7e-4}

if not INTERPRETED:

    def test_in_a_process_with_the_interpreter():
        assert_passes_interpreted(__file__)


def logits(*shape, dtype=torch.float32, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(*shape, generator=generator) * 2
    student = teacher + noise * torch.randn(*shape, generator=generator)
    return student.to(dtype), teacher.to(dtype)


def run(function, backend, leaves, upstream=0.5, **arguments):
    """Loss and the gradient of every leaf; the reference in fp64 on the same numbers."""
    if backend == "reference":
        leaves = {name: x.double() for name, x in leaves.items()}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    loss = function(**leaves, **arguments, backend=backend)
    loss.backward(torch.full_like(loss, upstream))
    return loss.detach(), {name: x.grad for name, x in leaves.items()}


def error(ours, oracle):
    oracle = oracle.double()
    return ((ours.double() - oracle).norm() / oracle.norm().clamp(min=1e-30)).item()


def check(function, leaves, loose=(), **arguments):
    """Compare loss and gradients; those named in ``loose`` are sums that nearly cancel."""
    loss, grads = run(function, "triton", leaves, **arguments)
    oracle, oracle_grads = run(function, "reference", leaves, **arguments)
    dtype = leaves["student"].dtype
    assert error(loss, oracle) <= LOSS.get(dtype, 2e-6)
    for name, grad in grads.items():
        assert grad.dtype == leaves[name].dtype
        bound = GRADIENT.get(grad.dtype, 3e-6) * (100 if name in loose else 1)
        assert error(grad, oracle_grads[name]) <= bound, name


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("kind", DIVERGENCES)
    def test_every_kind(self, kind, tiles):
        for dtype in (torch.float64, torch.float32):
            student, teacher = logits(3, 37, dtype=dtype)
            leaves = {"student": student, "teacher": teacher}
            check(F.divergence, leaves, kind=kind, temperature=2.0)

    @pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_student_alone(self, dtype, kind, tiles):
        student, teacher = logits(3, 37, dtype=dtype)
        check(F.divergence, {"student": student}, teacher=teacher, kind=kind)

    @pytest.mark.parametrize("form", ["sum", "mixture"])
    def test_ensemble(self, form, tiles):
        """One teacher close to the student, one without weight, classes off on one or all sides."""
        for dtype in DTYPES:
            student, teacher = logits(3, 37, dtype=dtype)
            near = student + (student.abs() * 2**-6).to(dtype)
            teachers = torch.stack([teacher, near, teacher.flip(-1)])
            teachers[:, 0, 5] = student[0, 5] = teachers[2, 1, 6] = -math.inf
            check(F.multi_teacher_kl_div, {"student": student}, teachers=teachers, form=form)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            rows = torch.tensor([1.5, 2.0, 4.0], dtype=wide)
            leaves = {"student": student, "teachers": teachers, "row_weight": rows - 1.5}
            leaves |= {"temperature": rows, "teacher_temperature": rows.flip(0)}
            leaves["weights"] = torch.tensor([0.5, 0.0, 2.0], dtype=wide)
            check(
                F.multi_teacher_kl_div, leaves, ("temperature", "teacher_temperature"), form=form,
                labels=torch.tensor([3, -100, 7]), ce_weight=0.3, label_smoothing=0.1,
                reduction="none",
            )  # fmt: skip

    @pytest.mark.parametrize("kind", DIVERGENCES)
    def test_far_apart(self, kind, tiles):
        student, teacher = logits(3, 37, noise=10.0)
        check(F.divergence, {"student": student, "teacher": teacher}, kind=kind)

    @pytest.mark.parametrize("alpha, beta", [(-0.5, 0.2), (2.0, -1.0), (1e-3, 0.5), (3.0, 0.4)])
    def test_exponents_of_ab(self, alpha, beta, tiles):
        leaves = dict(zip(("student", "teacher"), logits(3, 37, dtype=torch.float64), strict=True))
        check(F.divergence, leaves, kind="ab", alpha=alpha, beta=beta)

    @pytest.mark.parametrize("alpha", [0.5, 2.0])
    def test_renyi(self, alpha, tiles):
        leaves = dict(zip(("student", "teacher"), logits(3, 37, dtype=torch.float64), strict=True))
        check(F.divergence, leaves, kind="renyi", alpha=alpha)

    @pytest.mark.parametrize("kind", DIVERGENCES)
    def test_rows(self, kind, tiles):
        """Gradients to temperatures (a row's own and a common one) and to row weights."""
        dtype = torch.float64 if tiles == "swept" else torch.float32
        student, teacher = logits(3, 37, dtype=dtype, noise=3.0)
        leaves = {
            "student": student,
            "teacher": teacher,
            "temperature": torch.tensor([1.5, 2.0, 4.0], dtype=dtype),
            "teacher_temperature": torch.tensor(2.0, dtype=dtype),
            "row_weight": torch.tensor([0.5, 0.0, 2.0], dtype=dtype),
        }
        loose = ("temperature", "teacher_temperature")
        check(F.divergence, leaves, loose, kind=kind, reduction="none")
        if kind == "forward_kl":
            check(F.divergence, leaves, loose, kind=kind, scale="none")

    @pytest.mark.parametrize("noise", [1e-2, 1e-3, 1e-4])
    def test_exact_where_student_is_close(self, noise):
        """True KL from 1e-4 to 1e-8, in one tile of 4096 classes."""
        student, teacher = logits(2, 4096, noise=noise)
        for kind in ("forward_kl", "reverse_kl", "js", "jeffreys"):
            check(F.divergence, {"student": student}, teacher=teacher, kind=kind)

    @pytest.mark.parametrize("kind", DIVERGENCES)
    def test_exact_in_a_sweep(self, kind, tiles):
        for noise in (1e-2, 1e-4):
            student, teacher = logits(2, 100, noise=noise)
            check(F.divergence, {"student": student, "teacher": teacher}, kind=kind)

    @pytest.mark.parametrize("kind", DIVERGENCES)
    def test_identical(self, kind, tiles):
        student, _ = logits(3, 37)
        loss, grads = run(F.divergence, "triton", {"student": student, "teacher": student},
                          kind=kind, temperature=3.0)  # fmt: skip
        assert loss == 0 and not any(grad.any() for grad in grads.values())

    @pytest.mark.parametrize("kind", DIVERGENCES)
    def test_infinities(self, kind, tiles):
        """Each row is a case of -inf on one side, both sides, or logits of 1e4."""
        inf = math.inf
        student = torch.randn(8, 37, dtype=torch.float64)
        teacher = torch.randn(8, 37, dtype=torch.float64)
        student[0, :20] = teacher[0, 5:20] = -inf  # the student's support is the smaller
        teacher[1, :20] = -inf  # the teacher's is
        student[2, 17:] = teacher[2, 17:] = -inf  # a common one, its last tile empty
        student[3, :17] = teacher[3, :17] = -inf  # its first tile empty
        student[4, :18], teacher[4, 18:] = -inf, -inf  # disjoint
        student[5, 0] = teacher[5, 1] = 1e4
        student[6] = teacher[7] = -inf  # no finite class
        leaves = {
            "student": student,
            "teacher": teacher,
            "temperature": torch.tensor(2.0, dtype=torch.float64),
            "row_weight": torch.ones(8, dtype=torch.float64),
        }
        loss, grads = run(F.divergence, "triton", leaves, kind=kind, reduction="none")
        oracle, expected = run(F.divergence, "reference", leaves, kind=kind, reduction="none")
        torch.testing.assert_close(loss, oracle, rtol=1e-10, atol=0, equal_nan=True)
        finite = ~oracle.isnan()
        if kind == "chi2":  # 1e4 apart overflows even fp64: infinite, without a gradient
            assert loss[5] == inf and not grads["student"][5].any()
            finite[5] = False
        for name in ("student", "teacher", "row_weight"):
            torch.testing.assert_close(
                grads[name][finite], expected[name][finite], rtol=1e-9, atol=1e-14
            )

    @pytest.mark.parametrize(
        "reduction, label_smoothing, dtype",
        [
            ("none", 0.0, torch.float32),
            ("none", 0.1, torch.float16),
            ("sum", 0.1, torch.bfloat16),
            ("batchmean", 0.0, torch.float16),
            ("batchmean", 0.1, torch.float64),
            ("mean", 0.1, torch.float32),
        ],
    )
    def test_cross_entropy(self, reduction, label_smoothing, dtype, tiles):
        student, teacher = logits(6, 37, dtype=dtype)
        labels = torch.tensor([0, 36, 5, -100, 17, 2])
        arguments = {
            "labels": labels,
            "mask": torch.tensor([True, True, False, True, True, True]),
            "label_smoothing": label_smoothing,
            "reduction": reduction,
        }
        check(F.kd_loss, {"student": student, "teacher": teacher}, **arguments)
        check(F.kd_loss, {"student": student}, teacher=teacher, alpha=0.0, **arguments)

    def test_probability_labels(self, tiles):
        student, teacher = logits(4, 37)
        labels = torch.rand(4, 40)[:, :37]
        check(F.kd_loss, {"student": student}, teacher=teacher, labels=labels, temperature=1.0)
        student[:, 3] = -math.inf
        labels[:, 3] = torch.tensor([0.0, 0.0, 0.5, 1.0])
        teacher[0, 3] = -math.inf
        leaves, arguments = {"student": student}, {"teacher": teacher, "reduction": "none"}
        loss, grads = run(F.kd_loss, "triton", leaves, labels=labels, **arguments)
        oracle, expected = run(F.kd_loss, "reference", leaves, labels=labels, **arguments)
        assert loss.isinf().tolist() == oracle.isinf().tolist() == [False, True, True, True]
        assert error(grads["student"], expected["student"]) < 1e-6

    def test_masked_rows_are_not_read(self, tiles):
        student, teacher = logits(4, 37)
        student[1], teacher[2] = math.nan, math.inf
        mask = torch.tensor([True, False, False, True])
        loss, grads = run(F.kl_div, "triton", {"student": student, "teacher": teacher}, mask=mask)
        rows = {"student": student[mask], "teacher": teacher[mask]}
        oracle, expected = run(F.kl_div, "reference", rows)
        assert error(loss, oracle) < 2e-6
        for name, grad in grads.items():
            assert not grad[~mask].any()
            assert error(grad[mask], expected[name]) < 3e-6

    def test_nan_reaches_the_loss(self, tiles):
        for value, side in ((math.nan, 0), (math.nan, 1), (math.inf, 0), (math.inf, 1)):
            pair = logits(2, 37)
            pair[side][0, 20] = value
            for kind in DIVERGENCES:
                rows = F.divergence(*pair, kind=kind, reduction="none", backend="triton")
                assert rows.isnan().tolist() == [True, False], (kind, value, side)

    @pytest.mark.parametrize("label", [-1, 37, 2**40])
    def test_label_out_of_range(self, label, tiles, monkeypatch):
        """As on a device, where labels are not read before the kernel does."""
        monkeypatch.setattr(checks, "readable", lambda tensor: False)
        student, teacher = logits(3, 37)
        rows = F.kd_loss(student, teacher, torch.tensor([1, label, 2]), reduction="none",
                         backend="triton")  # fmt: skip
        assert rows.isnan().tolist() == [False, True, False]

    @pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
    def test_nothing_counts(self, reduction, tiles):
        student, teacher = logits(2, 37)
        loss, grads = run(F.kl_div, "triton", {"student": student}, teacher=teacher,
                          mask=torch.zeros(2, dtype=torch.bool), reduction=reduction)  # fmt: skip
        assert not loss.any() and not grads["student"].any()
        empty = torch.empty(0, 37)
        loss, _ = run(F.kl_div, "triton", {"student": empty}, teacher=empty, reduction=reduction)
        assert not loss.any()

    def test_strides(self, tiles):
        """Shifted and expanded rows without a copy; rows that no two strides describe, with one."""
        student, teacher = logits(2, 5, 4, 37)
        views = (lambda x: x[:, 0, :-1], lambda x: x[:, 1:], lambda x: x[:, :, 0, ::2],
                 lambda x: x[:, 1:, 1:], lambda x: x[0, 0, :1].expand(4, -1))  # fmt: skip
        for view in views:
            leaves = {"student": student, "teacher": teacher}
            for shifted in (view, lambda x, view=view: view(x).contiguous()):
                check(lambda student, teacher, shifted=shifted, view=view, **arguments: F.kl_div(
                    view(student), shifted(teacher), **arguments), leaves)  # fmt: skip

    @pytest.mark.parametrize("shape", [(37,), (1, 37), (2, 3, 37), (3, 1)])
    def test_shapes(self, shape):
        student, teacher = logits(*shape, dtype=torch.float64)
        check(F.reverse_kl_div, {"student": student}, teacher=teacher, reduction="none")

    def test_mixed_dtypes(self, tiles):
        student, teacher = logits(3, 37)
        for s, t in ((torch.float16, torch.float32), (torch.float32, torch.float64)):
            check(F.kl_div, {"student": student.to(s), "teacher": teacher.to(t)})

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_fp16_survives_a_small_factor(self, side):
        """1/N and weights reach an fp16 gradient together with the GradScaler's factor."""
        pair = dict(zip(("student", "teacher"), logits(64, 37, dtype=torch.float16), strict=True))
        leaf = {side: pair.pop(side)}
        arguments = {**pair, "row_weight": torch.full((64,), 1e-4), "upstream": 2.0**16}
        check(
            F.kl_div,
            leaf if side == "student" else {**leaf, "student": pair.pop("student")},
            **{k: v for k, v in arguments.items() if k in ("row_weight", "upstream", *pair)},
        )

    def test_graph_kept(self):
        student, teacher = logits(3, 37)
        student.requires_grad_()
        loss = F.kl_div(student, teacher, backend="triton")
        first = torch.autograd.grad(loss * 2, student, retain_graph=True)[0].clone()
        assert torch.equal(torch.autograd.grad(loss * 2, student)[0], first)

    @pytest.mark.parametrize("strided", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_inplace(self, dtype, strided, tiles):
        pair = dict(zip(("student", "teacher"), logits(3, 38, dtype=dtype), strict=True))

        def loss(student, teacher, backend):
            student = student * 1
            if strided:
                student, teacher = student[:, ::2], teacher[:, ::2]
            return F.reverse_kl_div(student, teacher, backend=backend,
                                    inplace=backend == "triton")  # fmt: skip

        check(loss, {"student": pair["student"]}, teacher=pair["teacher"])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_scale_rows(self, dtype, tiles):
        from kdkernels.triton.scale import _scale_rows_

        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        rows = torch.rand(6, dtype=accumulator)
        for upstream in (torch.tensor(1.0), torch.tensor(0.3), rows, rows[:1].expand(6)):
            for factor in (None, torch.rand(6, dtype=accumulator)):
                storage = torch.randn(6, 40).to(dtype)
                for grad in (storage[:, :37], storage.t()[:6, :6]):
                    scale = upstream.to(accumulator) * (1 if factor is None else factor)
                    expected = (grad.to(accumulator) * scale.view(-1, 1)).to(dtype)
                    _scale_rows_(grad, upstream.to(accumulator), factor)
                    ulp = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0
                    torch.testing.assert_close(grad, expected, rtol=ulp, atol=0)

    def test_registered(self):
        """Schema, fake and autograd agree with what the operators do; compilation traces them."""
        student, teacher = logits(2, 3, 37)
        check(torch.compile(F.reverse_kl_div, backend="aot_eager", fullgraph=True),
              {"student": student}, teacher=teacher)  # fmt: skip
        labels = torch.tensor([1, 2, 3, -100, 4, 5])
        numbers, choices = Numbers(2.0, 2.0, 0.9, 0.1, 0.1), Choices(reduction=2)

        def arguments(grads):
            return student, teacher, numbers, choices, grads, labels, None, torch.rand(6)

        registered = torch.ops.kdkernels
        torch.library.opcheck(registered.rowwise_triton.default, arguments(7))
        torch.library.opcheck(registered.rowwise_triton_inplace.default, arguments(1))
