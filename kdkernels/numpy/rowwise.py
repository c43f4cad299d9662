# SPDX-License-Identifier: Apache-2.0
"""Row-wise divergences, alone or mixed with cross-entropy.

``**rows`` are those of :mod:`kdkernels.numpy`, with ``standardize`` and ``class_range``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kdkernels import divergences
from kdkernels.divergences import Choices, Numbers
from kdkernels.numpy import arrays
from kdkernels.numpy.rows import merged, prepare
from kdkernels.scalars import number


class Gradients(NamedTuple):
    """Of the loss; each of its argument's shape, the logits' in their dtype, the others float64."""

    student: np.ndarray
    teacher: np.ndarray
    row_weight: np.ndarray
    temperature: np.ndarray
    teacher_temperature: np.ndarray


class Parts(NamedTuple):
    """A loss, and what it is made of: reduced as it is, without weights."""

    loss: np.ndarray
    target: np.ndarray
    non_target: np.ndarray


def kl_div(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray | None = None, **rows
) -> tuple[np.ndarray, Gradients]:
    """``kdkernels.functional.kl_div`` and its gradients."""
    return _run("kl_div", student, teacher, labels, rows, "forward_kl")


def reverse_kl_div(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray | None = None, **rows
) -> tuple[np.ndarray, Gradients]:
    """``kdkernels.functional.reverse_kl_div`` and its gradients."""
    return _run("reverse_kl_div", student, teacher, labels, rows, "reverse_kl")


def js_div(
    student: np.ndarray,
    teacher: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    beta: float = 0.5,
    **rows,
) -> tuple[np.ndarray, Gradients]:
    """``kdkernels.functional.js_div`` and its gradients."""
    kind, _, beta, _ = divergences.resolve("js_div", "js", None, beta)
    return _run("js_div", student, teacher, labels, rows, kind, beta=beta)


def tv_distance(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray | None = None, **rows
) -> tuple[np.ndarray, Gradients]:
    """``kdkernels.functional.tv_distance`` and its gradients."""
    return _run("tv_distance", student, teacher, labels, rows, "tv")


def divergence(
    student: np.ndarray,
    teacher: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    kind: str = "forward_kl",
    alpha: float | None = None,
    beta: float | None = None,
    **rows,
) -> tuple[np.ndarray, Gradients]:
    """``kdkernels.functional.divergence`` and its gradients."""
    kernel_kind, alpha, beta, weight = divergences.resolve("divergence", kind, alpha, beta)
    return _run(
        "divergence", student, teacher, labels, rows, kernel_kind, kd_weight=weight, alpha=alpha,
        beta=beta,
    )  # fmt: skip


def kd_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    labels: np.ndarray,
    *,
    temperature: float | np.ndarray = 4.0,
    alpha: float = 0.9,
    label_smoothing: float = 0.0,
    **rows,
) -> tuple[np.ndarray, Gradients]:
    """``kdkernels.functional.kd_loss``, ``(1 - alpha) CE + alpha T^2 KL``, and its gradients."""
    alpha = number("kd_loss", "alpha", alpha, 0.0, 1.0)
    return _labelled(
        "kd_loss", student, teacher, labels, temperature, rows, "forward_kl", kd_weight=alpha,
        ce_weight=1.0 - alpha, label_smoothing=label_smoothing,
    )  # fmt: skip


def dkd_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    labels: np.ndarray,
    *,
    temperature: float | np.ndarray = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    warmup: float = 1.0,
    ce_weight: float = 0.0,
    return_parts: bool = False,
    label_smoothing: float = 0.0,
    **rows,
) -> tuple[np.ndarray | Parts, Gradients]:
    """``kdkernels.functional.dkd_loss`` and its gradients."""
    alpha, beta, warmup = (
        number("dkd_loss", argument, value)
        for argument, value in (("alpha", alpha), ("beta", beta), ("warmup", warmup))
    )
    return _labelled(
        "dkd_loss", student, teacher, labels, temperature, rows, "forward_kl", "decoupled",
        arrays.flag("dkd_loss", "return_parts", return_parts), kd_weight=warmup * beta,
        ce_weight=ce_weight, label_smoothing=label_smoothing, target_weight=warmup * alpha,
    )  # fmt: skip


def nkd_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    labels: np.ndarray,
    *,
    temperature: float | np.ndarray = 1.0,
    gamma: float = 1.5,
    ce_weight: float = 0.0,
    return_parts: bool = False,
    label_smoothing: float = 0.0,
    **rows,
) -> tuple[np.ndarray | Parts, Gradients]:
    """``kdkernels.functional.nkd_loss`` and its gradients."""
    return _labelled(
        "nkd_loss", student, teacher, labels, temperature, rows, "cross_entropy", "separate",
        arrays.flag("nkd_loss", "return_parts", return_parts),
        kd_weight=number("nkd_loss", "gamma", gamma), ce_weight=ce_weight,
        label_smoothing=label_smoothing, target_weight=1.0,
    )  # fmt: skip


def ats_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    labels: np.ndarray,
    *,
    temperature: float | np.ndarray = 1.0,
    target_temperature: float = 4.0,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    teacher_temperature: float | np.ndarray = 2.0,
    **rows,
) -> tuple[np.ndarray, Gradients]:
    """``kdkernels.functional.ats_loss`` and its gradients."""
    if rows.get("standardize"):
        raise NotImplementedError("ats_loss: standardize=True is not supported.")
    alpha = number("ats_loss", "alpha", alpha, 0.0, 1.0)
    target_temperature = number("ats_loss", "target_temperature", target_temperature)
    if target_temperature <= 0:
        raise ValueError(
            f"ats_loss: target_temperature must be positive, got {target_temperature}."
        )
    return _labelled(
        "ats_loss", student, teacher, labels, temperature,
        rows | {"teacher_temperature": teacher_temperature}, "cross_entropy", "tempered",
        kd_weight=alpha, ce_weight=1.0 - alpha, label_smoothing=label_smoothing,
        target_temperature=target_temperature,
    )  # fmt: skip


def wsld_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    labels: np.ndarray,
    *,
    temperature: float | np.ndarray = 4.0,
    alpha: float = 2.25,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    **rows,
) -> tuple[np.ndarray, Gradients]:
    """``kdkernels.functional.wsld_loss`` and its gradients."""
    return _labelled(
        "wsld_loss", student, teacher, labels, temperature, rows, "cross_entropy", "weighting",
        kd_weight=number("wsld_loss", "alpha", alpha), ce_weight=ce_weight,
        label_smoothing=label_smoothing,
    )  # fmt: skip


def _labelled(
    name, student, teacher, labels, temperature, rows, kind, target="ordinary", parts=False, *,
    ce_weight, label_smoothing, **numbers,
):  # fmt: skip
    if labels is None:
        raise TypeError(f"{name}: labels must be an array, got None.")
    return _run(
        name, student, teacher, labels, rows | {"temperature": temperature}, kind, target, parts,
        ce_weight=number(name, "ce_weight", ce_weight),
        label_smoothing=number(name, "label_smoothing", label_smoothing, 0.0, 1.0),
        **numbers,
    )  # fmt: skip


def _class_range(name: str, value, student) -> tuple[int, int]:
    """The first class and the number of classes of a range (m, n)."""
    arrays.floats(name, "student", student)
    classes = student.shape[-1] if student.ndim else 0
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: class_range must be a pair (m, n), got {value!r}.")
    first, last = value
    arrays.integer(name, "class_range", first)
    arrays.integer(name, "class_range", last)
    if not 0 <= first < last <= classes:
        raise ValueError(
            f"{name}: class_range must be (m, n) with 0 <= m < n <= {classes}, got {value!r}."
        )
    return first, last - first


def _targets(name: str, labels: np.ndarray, counts: np.ndarray, first: int, width: int):
    """The target class of each row; of label probabilities, the most probable."""
    targets = labels if labels.ndim == 1 else np.ascontiguousarray(labels.argmax(-1), np.int64)
    bad = targets[counts & ((targets < first) | (targets >= first + width))]
    if bad.size:
        raise ValueError(
            f"{name}: labels must be in class_range [{first}, {first + width}), got {bad[0]}."
        )
    return targets


def _run(
    name, student, teacher, labels, rows: dict, kind, target="ordinary", parts=False, **numbers
) -> tuple[np.ndarray | Parts, Gradients]:
    native = arrays.native(name)
    options = merged(name, rows, standardize=False, class_range=None)
    standardize = arrays.flag(name, "standardize", options["standardize"])
    first, width = 0, 0
    if options["class_range"] is None:
        arrays.logits(name, student, teacher)
    else:
        first, width = _class_range(name, options["class_range"], student)
        narrow = target not in ("separate", "weighting")  # else its softmax needs every class
        arrays.logits(name, student, teacher, width if narrow else None)
    rows = prepare(name, student, labels, options, width)
    targets = None
    if target != "ordinary":
        seen = (first, width) if width and target != "weighting" else (0, student.shape[-1])
        targets = _targets(name, rows.labels, rows.counts, *seen)

    wide = arrays.widened(student), arrays.widened(teacher)
    n = rows.counts.size
    row_loss, row_grads = np.empty(n), np.empty((6 if parts else 4, n))
    grads = [np.empty(x.shape, x.dtype) for x in wide]
    native.rowwise(
        *map(arrays.matrix, wide),
        Numbers(**numbers),
        Choices(
            divergences.KINDS.index(kind), rows.t2, 0, rows.ignore_index,
            divergences.TARGETS.index(target), standardize, first, width,
        ),
        *rows.per_row(), targets, rows.factor, row_loss, *map(arrays.matrix, grads), row_grads,
        rows.threads,
    )  # fmt: skip
    dtype = arrays.accumulated_in(student, teacher)
    loss = rows.loss(row_loss, dtype)
    if parts:  # they come with the reduction's factor
        shares = row_grads[4:].reshape(2, *rows.shape)
        by_row = rows.reduction == "none"
        loss = Parts(loss, *(np.asarray(x if by_row else x.sum(), dtype) for x in shares))
    return loss, Gradients(
        grads[0].astype(student.dtype, copy=False),
        grads[1].astype(teacher.dtype, copy=False),
        row_grads[0].reshape(rows.shape),
        *rows.to_temperatures(row_grads[1:3]),
    )
