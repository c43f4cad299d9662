# SPDX-License-Identifier: Apache-2.0
"""The rowwise family's losses that look at the target class, standardised rows and class ranges, in
Triton's interpreter against the reference in fp64; see test_triton_interpreter.py.
"""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: nothing to interpret")

from interpreter import INTERPRETED, assert_passes_interpreted
from test_triton_interpreter import DTYPES, check, logits, run

from kdkernels import checks
from kdkernels import functional as F
from kdkernels.divergences import Choices, Numbers

if not INTERPRETED:

    def test_in_a_process_with_the_interpreter():
        assert_passes_interpreted(__file__)


LABELLED = {
    "dkd": (F.dkd_loss, {"alpha": 0.7, "beta": 3.0}),
    "nkd": (F.nkd_loss, {"gamma": 1.5}),
    "ats": (F.ats_loss, {}),
    "wsld": (F.wsld_loss, {}),
}
STANDARD = {
    "standardized": (F.kl_div, {"standardize": True}),
    "standardized reverse": (F.reverse_kl_div, {"standardize": True}),
    "standardized renyi": (F.divergence, {"kind": "renyi", "standardize": True}),
    "standardized dkd": (F.dkd_loss, {"standardize": True}),
    "standardized wsld": (F.wsld_loss, {"standardize": True}),
}
FORMS = LABELLED | STANDARD
LOOSE = ("temperature", "teacher_temperature")


def takes_labels(form):
    return form in LABELLED or FORMS[form][0] in (F.dkd_loss, F.wsld_loss)


def arguments(form, labels=(0, 36, 5), **more):
    labels = {"labels": torch.tensor(labels)} if takes_labels(form) else {}
    return labels | FORMS[form][1] | more


def per_row(rows, dtype):
    return {
        "temperature": torch.linspace(1.5, 4.0, rows, dtype=dtype),
        "teacher_temperature": torch.tensor(2.5, dtype=dtype),
        "row_weight": torch.tensor([0.5, 0.0, 2.0], dtype=dtype)[:rows],
    }


class TestInterpreted:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("form", FORMS)
    def test_every_gradient(self, form, tiles):
        dtype = torch.float64 if tiles == "swept" else torch.float32
        leaves = dict(zip(("student", "teacher"), logits(3, 37, dtype=dtype), strict=True))
        check(FORMS[form][0], leaves, **arguments(form))
        leaves |= per_row(3, dtype)
        check(FORMS[form][0], leaves, LOOSE, **arguments(form, reduction="none"))

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_student_alone(self, dtype, form, tiles):
        student, teacher = logits(3, 37, dtype=dtype)
        check(FORMS[form][0], {"student": student}, teacher=teacher, **arguments(form))

    @pytest.mark.parametrize("form", LABELLED)
    def test_with_cross_entropy(self, form, tiles):
        student, teacher = logits(6, 37)
        ce = {} if form == "ats" else {"ce_weight": 0.4}
        labels = {"labels": torch.tensor([0, 36, 5, -100, 17, 2])}
        given = arguments(form) | labels | ce | {"label_smoothing": 0.1, "reduction": "mean"}
        given["mask"] = torch.tensor([True, True, False, True, True, True])
        check(FORMS[form][0], {"student": student}, teacher=teacher, **given)
        given["labels"] = torch.rand(6, 37)
        check(FORMS[form][0], {"student": student, "teacher": teacher}, **given)

    @pytest.mark.parametrize("form", FORMS)
    def test_class_range(self, form, tiles):
        dtype = torch.float64 if tiles == "swept" else torch.float32
        leaves = dict(zip(("student", "teacher"), logits(3, 37, dtype=dtype), strict=True))
        leaves |= per_row(3, dtype)
        given = arguments(form, (7, 30, 20), class_range=(7, 31))
        if form in LABELLED and form != "ats":
            given["ce_weight"] = 0.4
        check(FORMS[form][0], leaves, LOOSE, **given)

    @pytest.mark.parametrize("form", ["dkd", "ats", "standardized"])
    def test_teacher_of_the_class_range(self, form, tiles):
        student, teacher = logits(3, 37)
        leaves = {"student": student, "teacher": teacher[:, 7:31]}
        given = arguments(form, (7, 30, 20), class_range=(7, 31), reduction="mean")
        check(FORMS[form][0], leaves, **given)

    @pytest.mark.parametrize("window", [(0, 1), (3, 5), (36, 37), (0, 37)])
    def test_narrow_ranges(self, window, tiles):
        student, teacher = logits(3, 37, dtype=torch.float64)
        leaves = {"student": student, "teacher": teacher}
        given = {"labels": torch.full((3,), window[0]), "class_range": window}
        check(F.dkd_loss, leaves, **given, ce_weight=1.0)
        check(F.nkd_loss, leaves, **given)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("classes", [1, 2])
    def test_few_classes(self, classes, form):
        student, teacher = logits(3, classes, dtype=torch.float64)
        leaves = {"student": student, "teacher": teacher}
        given = arguments(form, (0, classes - 1, 0), reduction="none")
        loss, grads = run(FORMS[form][0], "triton", leaves, **given)
        oracle, expected = run(FORMS[form][0], "reference", leaves, **given)
        torch.testing.assert_close(loss, oracle, rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-13)

    @pytest.mark.parametrize("form", FORMS)
    def test_extremes(self, form, tiles):
        """Each row is a case: of -inf at the target or everywhere else, of 1e4, constant rows."""
        dtype = torch.float64 if tiles == "swept" else torch.float16
        inf, at, others = math.inf, 3, torch.arange(37) != 3
        student, teacher = logits(15, 37, dtype=dtype)
        student[0, at] = teacher[1, at] = -inf
        student[2, at] = teacher[2, at] = -inf
        student[3, others] = -inf  # certain
        teacher[4, others] = -inf
        student[5, others] = teacher[5, others] = -inf
        student[6] = teacher[7] = -inf  # no finite class
        student[8, at] = teacher[9, at] = 1e4
        student[10, 0] = teacher[10, 1] = 1e4
        # Constant. Apart by an offset, fp32 holds their difference to its precision only.
        student[11], teacher[12] = 5.0, 1e4 if dtype == torch.float64 else 10.0
        student[13] = teacher[13]
        student[14, :20] = teacher[14, :20] = -inf  # the target among others, on both sides
        rows = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = {
            "student": student,
            "teacher": teacher,
            "temperature": torch.full((15,), 2.0, dtype=rows),
            "row_weight": torch.ones(15, dtype=rows),
        }
        given = arguments(form, (at,) * 15, reduction="none")
        loss, grads = run(FORMS[form][0], "triton", leaves, **given)
        oracle, expected = run(FORMS[form][0], "reference", leaves, **given)
        rtol = 1e-9 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(
            loss.double(), oracle, rtol=rtol, atol=1e-3 * rtol, equal_nan=True
        )
        for row in (~oracle.isnan()).nonzero().flatten().tolist():
            for name, grad in grads.items():
                scale = max(1e-3, expected[name][row].abs().max().item())
                bound = 1e-9 if dtype == torch.float64 else 2e-3
                torch.testing.assert_close(
                    grad[row].double(), expected[name][row], rtol=0, atol=bound * scale,
                    msg=f"{name} of row {row}",
                )  # fmt: skip

    @pytest.mark.parametrize("form", FORMS)
    def test_nan(self, form, tiles):
        """Also at the target, which the sweeps do not see."""
        for value in (math.nan, math.inf):
            for side in (0, 1):
                for column in (5, 20):
                    pair = logits(3, 37)
                    pair[side][2, column] = value
                    given = arguments(form, reduction="none", backend="triton")
                    rows = FORMS[form][0](*pair, **given)
                    assert rows.isnan().tolist() == [False, False, True], (value, side, column)

    @pytest.mark.parametrize("form", LABELLED)
    def test_target_out_of_range(self, form, tiles, monkeypatch):
        """As on a device, where labels are not read before the kernel does."""
        monkeypatch.setattr(checks, "readable", lambda tensor: False)
        student, teacher = logits(4, 37)
        student.requires_grad_()
        given = {"reduction": "none", "backend": "triton"}
        rows = FORMS[form][0](student, teacher, torch.tensor([1, 37, -1, 2**40]), **given)
        assert rows.isnan().tolist() == [False, True, True, True]
        rows.sum().backward()
        assert student.grad.isnan().all(-1).tolist() == [False, True, True, True]
        assert not student.grad[0].isnan().any()
        labels = torch.tensor([5, 4, 20, 19])
        rows = FORMS[form][0](student, teacher, labels, class_range=(5, 20), **given)
        inside = form == "wsld"  # whose target is at temperature 1, where every class is seen
        assert rows.isnan().tolist() == ([False] * 4 if inside else [False, True, True, False])

    @pytest.mark.parametrize("offset", [0.0, 1.0, 1e4])
    def test_standardized_offsets(self, offset, tiles):
        """A common offset moves neither deviation nor loss; a constant row is uniform."""
        student, teacher = logits(3, 37)
        student, teacher = student + offset, teacher + offset
        student[1] = 0.1 + offset
        check(F.kl_div, {"student": student, "teacher": teacher}, standardize=True)
        loss, grads = run(F.kl_div, "triton", {"student": student, "teacher": student},
                          standardize=True)  # fmt: skip
        assert loss == 0 and not any(grad.any() for grad in grads.values())
        _, grads = run(F.kl_div, "triton", {"student": student}, teacher=teacher, standardize=True)
        assert not grads["student"][1].any()

    def test_standardized_range_after_empty_tiles(self, tiles):
        student, teacher = logits(3, 60, dtype=torch.float64)
        student[:, 20:40] = teacher[:, 22:41] = -math.inf
        check(F.js_div, {"student": student, "teacher": teacher}, standardize=True,
              class_range=(18, 60))  # fmt: skip

    @pytest.mark.parametrize("noise", [1e-2, 1e-4])
    def test_exact_where_student_is_close(self, noise, tiles):
        student, teacher = logits(2, 100, noise=noise)
        leaves = {"student": student, "teacher": teacher}
        check(F.dkd_loss, leaves, labels=torch.tensor([3, 99]), alpha=1.0, beta=0.5)
        check(F.dkd_loss, leaves, labels=torch.tensor([3, 99]), alpha=1.0, beta=0.0)

    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.parametrize("form", ["dkd", "nkd"])
    def test_parts(self, form, reduction, tiles):
        student, teacher = logits(4, 37, dtype=torch.float64)
        student[2, 5] = -math.inf
        given = arguments(form, (0, 36, 5, 7), reduction=reduction, return_parts=True)
        given["row_weight"] = torch.tensor([0.5, 1.0, 0.0, 2.0], dtype=torch.float64)
        given["class_range"] = (0, 37)
        ours, oracle = (
            FORMS[form][0](student, teacher, **given, backend=backend)
            for backend in ("triton", "reference")
        )
        torch.testing.assert_close(tuple(ours), tuple(oracle), rtol=1e-11, atol=0)

    @pytest.mark.parametrize("form", FORMS)
    def test_inplace(self, form, tiles):
        student, teacher = logits(3, 37, dtype=torch.float16)

        def loss(student, teacher, backend, **given):
            inplace = backend == "triton"
            return FORMS[form][0](student * 1, teacher, **given, backend=backend, inplace=inplace)

        check(loss, {"student": student}, teacher=teacher, **arguments(form))

    def test_fp16_overflow(self, tiles):
        """Gradients that times the usual factor no fp16 number would hold."""
        student, teacher = logits(2, 37, dtype=torch.float16)
        student[0, 1], teacher[0, 2] = 2000.0, 2001.0
        student[0, 2] = 1999.0
        leaves = {"student": student, "teacher": teacher}
        check(F.reverse_kl_div, leaves, temperature=4.0, upstream=2.0**-4)
        check(F.dkd_loss, {"student": student}, teacher=teacher, labels=torch.tensor([1, 0]),
              alpha=500.0, beta=500.0, upstream=2.0**-8)  # fmt: skip

    def test_registered(self):
        student, teacher = logits(6, 37)
        labels = torch.tensor([1, 2, 3, -100, 4, 5])
        numbers = Numbers(2.0, 2.0, 0.9, 0.1, 0.1, target_weight=0.5)
        choices = Choices(reduction=2, target=1, first=0, width=30)
        given = (
            student, teacher, numbers, choices, 15, labels, None, torch.rand(6), None, None, labels
        )  # fmt: skip
        torch.library.opcheck(torch.ops.kdkernels.rowwise_triton.default, given)
