# SPDX-License-Identifier: Apache-2.0
"""Several teachers at once. ``**rows`` are those of :mod:`kdkernels.numpy`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kdkernels.divergences import Choices, Numbers
from kdkernels.numpy import arrays
from kdkernels.numpy.rows import merged, prepare
from kdkernels.scalars import choice, number


class EnsembleGradients(NamedTuple):
    """Of the loss; the logits' in their dtype, the others float64."""

    student: np.ndarray
    teachers: np.ndarray  # (M, ..., C)
    row_weight: np.ndarray
    temperature: np.ndarray
    teacher_temperature: np.ndarray
    weights: np.ndarray  # (M,), or (M, ...) where the weights are


def multi_teacher_kl_div(
    student: np.ndarray,
    teachers: np.ndarray | Sequence[np.ndarray],
    labels: np.ndarray | None = None,
    *,
    weights: np.ndarray | None = None,
    form: str = "sum",
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    **rows,
) -> tuple[np.ndarray, EnsembleGradients]:
    """``kdkernels.functional.multi_teacher_kl_div`` and its gradients."""
    name = "multi_teacher_kl_div"
    native = arrays.native(name)
    options = merged(name, rows)
    choice(name, "form", form, ("sum", "mixture"))
    ce_weight = number(name, "ce_weight", ce_weight)
    smoothing = number(name, "label_smoothing", label_smoothing, 0.0, 1.0)
    if labels is None and ce_weight:
        raise TypeError(f"{name}: labels must be an array where ce_weight is not 0, got None.")
    if not isinstance(teachers, (np.ndarray, Sequence)) or len(teachers) == 0:
        raise TypeError(
            f"{name}: teachers must be an array (M, ..., C) or a sequence of at least one array, "
            f"got {teachers!r:.40}."
        )
    for teacher in teachers:
        arrays.logits(name, student, teacher)
        if teacher.dtype != teachers[0].dtype:
            raise TypeError(
                f"{name}: teachers must have one dtype, got {teachers[0].dtype} and "
                f"{teacher.dtype}."
            )
    rows = prepare(name, student, labels, options)
    dtype, mixture = arrays.accumulated_in(student, teachers[0]), form == "mixture"
    count, n = len(teachers), rows.counts.size
    flat = _weights(name, weights, count, rows.shape, dtype, mixture)
    total = flat.sum(0) if mixture and weights is not None else None
    normal = flat if total is None else flat / total

    wide = [arrays.widened(x) for x in (student, *teachers)]
    row_loss, row_grads = np.empty(n), np.empty((4 + count, n))
    grad_student = np.empty((n, student.shape[-1]), wide[0].dtype)
    grad_teachers = np.empty((count, n, student.shape[-1]), wide[1].dtype)
    native.ensemble(
        arrays.matrix(wide[0]), [arrays.matrix(x) for x in wide[1:]], mixture,
        Numbers(ce_weight=ce_weight, label_smoothing=smoothing),
        Choices(t2=rows.t2, ignore_index=rows.ignore_index), *rows.per_row(),
        np.ascontiguousarray(normal, np.float64), rows.factor, row_loss, grad_student,
        list(grad_teachers), row_grads, rows.threads,
    )  # fmt: skip
    to_weights = row_grads[4:]
    if np.ndim(weights) < 2:
        to_weights = to_weights.sum(1, keepdims=True)
    if total is not None:  # the weights were divided by it
        to_weights = (to_weights - (to_weights * normal).sum(0)) / total
    return rows.loss(row_loss, dtype), EnsembleGradients(
        grad_student.reshape(student.shape).astype(student.dtype, copy=False),
        grad_teachers.reshape(count, *student.shape).astype(teachers[0].dtype, copy=False),
        row_grads[0].reshape(rows.shape),
        *rows.to_temperatures(row_grads[1:3]),
        to_weights.reshape((count,) if weights is None else weights.shape),
    )


def _weights(name: str, value, count: int, rows: tuple[int, ...], dtype, mixture: bool):
    """Weights (M, 1) or (M, N); those of a mixture have a positive sum."""
    if value is None:
        return np.full((count, 1), 1.0 / count)
    arrays.floats(name, "weights", value)
    if value.shape not in ((count,), (count, *rows)):
        raise ValueError(
            f"{name}: weights must have shape {(count,)} or {(count, *rows)}, got {value.shape}."
        )
    if not np.isfinite(value).all():
        raise ValueError(f"{name}: weights must be finite, got {value.tolist()}.")
    if mixture and not ((value >= 0).all() and (value.sum(0) > 0).all()):
        raise ValueError(
            f"{name}: weights of a mixture must not be negative, nor all be 0, "
            f"got {value.tolist()}."
        )
    return value.reshape(count, -1 if value.size else 0).astype(dtype)
