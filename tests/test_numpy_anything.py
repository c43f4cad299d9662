# SPDX-License-Identifier: Apache-2.0
"""Every loss of the NumPy binding on any values and any shapes: no crash, and no NaN of its own.

As tests/test_numpy.py, which has the helpers, it runs under the sanitizers too.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_numpy import INF, logits, pairs, sums_to_zero
from test_numpy_families import LABELLED

from kdkernels import divergences
from kdkernels import numpy as kdnp


def unsound(*sides):
    """Rows of which a loss may be NaN: with NaN, +inf, or no finite class."""
    return np.any([(np.isnan(x) | (x == INF)).any(-1) | (x == -INF).all(-1) for x in sides], 0)


@st.composite
def row_options(draw, rows):
    return {
        "temperature": draw(st.sampled_from((0.5, 1.0, 4.0))),
        "teacher_temperature": draw(st.sampled_from((None, 0.5, 2.0))),
        "scale": draw(st.sampled_from(divergences.SCALES)),
        "threads": draw(st.sampled_from((1, 4))),
        "mask": np.array(draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), bool),
    }


@st.composite
def class_ranges(draw, classes):
    first = draw(st.integers(0, classes - 1))
    return draw(st.sampled_from((None, (first, draw(st.integers(first + 1, classes))))))


def check_rows(value, student, student_gradient, mask, may_be_nan, steepness=0.0):
    """What holds of every loss over rows on any values.

    ``steepness`` is what standardising multiplies gradients by, one over the row's deviation.
    """
    assert value.shape == student.shape[:-1]
    assert not np.isnan(value[~may_be_nan | ~mask]).any()
    assert not value[~mask].any() and not student_gradient[~mask].any()
    assert not np.isnan(student_gradient[~may_be_nan]).any()
    assert sums_to_zero(student_gradient, (64 + steepness) * (1 + np.abs(value)))


@settings(deadline=None, max_examples=120)
@given(pairs(), st.sampled_from(["divergence", *{f for f, _ in LABELLED.values()}]), st.data())
def test_any_rowwise_loss_of_anything(pair, function, data):
    student, teacher = pair
    rows, classes = student.shape
    options = data.draw(row_options(rows))
    if options["teacher_temperature"] is None and function == "ats_loss":
        del options["teacher_temperature"]
    if data.draw(st.booleans()) and function != "ats_loss":
        options["standardize"] = True
    options["class_range"] = data.draw(class_ranges(classes))
    first, last = options["class_range"] or (0, classes)
    if function in ("divergence", "kd_loss", "dkd_loss", "ats_loss") and data.draw(st.booleans()):
        teacher = teacher[:, first:last]
    labels = first + np.arange(rows) % (last - first)
    if data.draw(st.booleans()):
        labels = np.eye(classes, dtype=teacher.dtype)[labels]
    if function == "divergence":
        options["kind"] = data.draw(st.sampled_from(divergences.DIVERGENCES))
    with np.errstate(over="ignore"):  # gradients beyond fp16
        value, gradients = getattr(kdnp, function)(
            student, teacher, labels, reduction="none", **options
        )
    inside = [x[:, first:last] if x.shape[1] == classes else x for x in (student, teacher)]
    steepness = 0.0
    if "standardize" in options:
        with np.errstate(invalid="ignore"):  # inf - inf
            steepness = 1 / (inside[0].astype(np.float64).std(-1) + 1e-7)
    check_rows(
        value, student, gradients.student, options["mask"],
        unsound(student, teacher, *inside), steepness,
    )  # fmt: skip


def test_two_alike_classes_standardised():
    """A gradient of 8 made of terms of 20,000: opposite to their rounding, as eager's are."""
    student = np.array([[0.00152658, 0.00143809]], np.float32)
    value, gradients = kdnp.wsld_loss(
        student, np.zeros_like(student), np.array([0]), temperature=0.5, scale="t2",
        standardize=True, reduction="none",
    )  # fmt: skip
    yes = np.array([True])
    check_rows(value, student, gradients.student, yes, ~yes, 1 / student.std(-1))


@settings(deadline=None, max_examples=100)
@given(pairs(), st.integers(1, 3), st.booleans(), st.data())
def test_any_teachers(pair, more, mixture, data):
    student, teacher = pair
    rows, classes = student.shape
    teachers = [teacher, *(data.draw(logits(rows, classes)).astype(teacher.dtype)
                           for _ in range(more - 1))]  # fmt: skip
    weights = np.array(data.draw(st.lists(st.sampled_from((0.0, 0.5, 2.0)), min_size=more,
                                          max_size=more)))  # fmt: skip
    weights[0] += 0.25
    options = data.draw(row_options(rows))
    with np.errstate(over="ignore"):
        value, gradients = kdnp.multi_teacher_kl_div(
            student, teachers, np.arange(rows) % classes, weights=weights, reduction="none",
            form="mixture" if mixture else "sum", ce_weight=data.draw(st.sampled_from((0.0, 1.0))),
            **options,
        )  # fmt: skip
    looked_at = [x for x, w in zip(teachers, weights, strict=True) if w]
    check_rows(value, student, gradients.student, options["mask"], unsound(student, *looked_at))
    assert gradients.teachers.shape == (more, rows, classes)


@settings(deadline=None, max_examples=150)
@given(pairs(), st.data())
def test_any_topk_teacher(pair, data):
    student, teacher = pair
    rows, classes = student.shape
    k = data.draw(st.integers(1, classes))
    random = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    order = [random.permutation(classes) for _ in range(rows)]
    indices = np.array(order, np.int64).reshape(rows, classes)[:, :k]
    values = np.take_along_axis(teacher, indices, -1)
    kind = data.draw(st.sampled_from(("forward_kl", "reverse_kl", "js", "tv")))
    missing = data.draw(st.sampled_from(divergences.MISSING[: 1 if kind == "reverse_kl" else 3]))
    options = data.draw(row_options(rows))
    if missing == "tail" and data.draw(st.booleans()):
        options["teacher_logsumexp"] = random.normal(size=rows) * 10
    with np.errstate(over="ignore"):
        run = lambda ids: kdnp.topk_divergence(  # noqa: E731
            student, values, ids, kind=kind, missing=missing, reduction="none", **options
        )
        value, gradients = run(indices)
        chosen = np.take_along_axis(student, indices, -1)
        narrow = unsound(values, chosen) if missing == "renormalize" else unsound(values)
        check_rows(value, student, gradients.student, options["mask"], narrow | unsound(student))
        absent = values == -INF
        assert not gradients.topk_values[absent & ~narrow[:, None]].any()
        wrong = indices + np.where(random.random(indices.shape) < 0.1, 1, 0)  # repeated, or C
        sound = [len({*i[~a]}) == (~a).sum() and (i[~a] < classes).all()
                 for i, a in zip(wrong, absent, strict=True)]  # fmt: skip
        if (np.array(sound, bool) | ~options["mask"]).all():
            run(wrong)
        else:
            with pytest.raises(ValueError, match=r"^topk_divergence: topk_indices must be"):
                run(wrong)


@settings(deadline=None, max_examples=100)
@given(pairs(), st.sampled_from(("paper", "torchdistill")), st.data())
def test_dist_of_anything(pair, compat, data):
    student, teacher = pair
    mask = data.draw(row_options(len(student)))["mask"]
    with np.errstate(over="ignore", invalid="ignore"):
        value, gradients = kdnp.dist_loss(
            student, teacher, temperature=data.draw(st.sampled_from((0.5, 4.0))), mask=mask,
            threads=data.draw(st.sampled_from((1, 4))), compat=compat,
        )  # fmt: skip
    assert np.isnan(value) == unsound(student, teacher)[mask].any()
    assert not gradients.student[~mask].any() and not gradients.teacher[~mask].any()
    if not np.isnan(value):
        assert not np.isnan(gradients.temperature)
        assert not any(np.isnan(x).any() for x in gradients[:2])
        assert value >= -1e-4
