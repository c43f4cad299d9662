# SPDX-License-Identifier: Apache-2.0
"""Losses and their gradients on NumPy arrays: the CPU kernels without torch.

Bit for bit what the ``cpu`` backend computes on the same values, except where torch rounds once
more: the gradients to scalar temperatures and to fp16 logits. Arrays are float64, float32 or
float16, of any strides; logits are ``(..., C)`` and the leading dimensions rows. The other
arguments mean what they mean in ``kdkernels.functional``.
"""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import numpy as np

from kdkernels import divergences
from kdkernels.scalars import choice, number

try:
    from kdkernels import _native
except ImportError as error:  # pragma: no cover - depends on the installation
    _native, _reason = None, str(error)

_FLOATS = (np.float64, np.float32, np.float16)
_MOST_THREADS = 1024


class Gradients(NamedTuple):
    """Of the loss; each of its argument's shape, the logits' in their dtype, the others float64."""

    student: np.ndarray
    teacher: np.ndarray
    row_weight: np.ndarray
    temperature: np.ndarray
    teacher_temperature: np.ndarray


def divergence(
    student: np.ndarray,
    teacher: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    kind: str = "forward_kl",
    alpha: float | None = None,
    beta: float | None = None,
    temperature: float | np.ndarray = 1.0,
    teacher_temperature: float | np.ndarray | None = None,
    scale: str = "t2",
    reduction: str = "batchmean",
    mask: np.ndarray | None = None,
    ignore_index: int = -100,
    row_weight: np.ndarray | None = None,
    threads: int = 1,
) -> tuple[np.ndarray, Gradients]:
    """``kdkernels.functional.divergence`` and its gradients (of the sum, for ``"none"``).

    With ``teacher_temperature=None``, the student's is used, and the gradient to it is the sum of
    ``temperature`` and ``teacher_temperature`` of the result.
    """
    kernel_kind, alpha, beta, weight = divergences.resolve("divergence", kind, alpha, beta)
    return _rowwise(
        "divergence", student, teacher, labels, temperature, teacher_temperature, scale, reduction,
        mask, ignore_index, row_weight, threads, kernel_kind, alpha, beta, weight, 0.0, 0.0,
    )  # fmt: skip


def kd_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    labels: np.ndarray,
    *,
    temperature: float | np.ndarray = 4.0,
    alpha: float = 0.9,
    label_smoothing: float = 0.0,
    teacher_temperature: float | np.ndarray | None = None,
    scale: str = "t2",
    reduction: str = "batchmean",
    mask: np.ndarray | None = None,
    ignore_index: int = -100,
    row_weight: np.ndarray | None = None,
    threads: int = 1,
) -> tuple[np.ndarray, Gradients]:
    """``kdkernels.functional.kd_loss``, ``(1 - alpha) CE + alpha T^2 KL``, and its gradients."""
    if labels is None:
        raise TypeError("kd_loss: labels must be an array, got None.")
    alpha = number("kd_loss", "alpha", alpha)
    smoothing = number("kd_loss", "label_smoothing", label_smoothing, 0.0, 1.0)
    return _rowwise(
        "kd_loss", student, teacher, labels, temperature, teacher_temperature, scale, reduction,
        mask, ignore_index, row_weight, threads, "forward_kl", 0.0, 0.0, alpha, 1.0 - alpha,
        smoothing,
    )  # fmt: skip


class AttentionGradients(NamedTuple):
    """Each of its argument's shape and dtype, but the temperature's, which is float64."""

    teacher: np.ndarray
    temperature: np.ndarray
    scores: np.ndarray
    values: np.ndarray


def class_attention(
    teacher: np.ndarray,
    scores: np.ndarray,
    values: np.ndarray,
    upstream: np.ndarray | None = None,
    *,
    temperature: float | np.ndarray = 1.0,
    residual: bool = True,
    threads: int = 1,
) -> tuple[np.ndarray, AttentionGradients | None]:
    """What ``kdkernels.functional.learning_simplifier`` makes of class tokens, and its gradients.

    ``teacher`` is ``(..., K)``. Instead of weights it takes what they come to per head:
    with ``s = teacher / temperature``, the score of classes i and j is ``scores[i, j]
    + scores[K, j] s_i + scores[i, K] s_j + scores[K, K] s_i s_j`` and the value of j is
    ``values[j] + values[K] s_j``; ``scores`` is ``(H, K + 1, K + 1)`` and ``values``
    ``(H, K + 1)``. The result has the dtype of ``scores``, float64 or float32, as ``values`` and
    ``upstream``, the gradient of the result, without which there are no gradients.
    """
    name = "class_attention"
    if _native is None:
        raise RuntimeError(f"{name}: the compiled kernels are not available ({_reason}).")
    rows, classes = teacher.shape[:-1], teacher.shape[-1]
    dtype, n = scores.dtype, int(np.prod(rows))
    for argument, value, shape in (
        ("scores", scores, (len(scores), classes + 1, classes + 1)),
        ("values", values, (len(scores), classes + 1)),
        ("upstream", upstream, teacher.shape),
    ):
        if value is not None and (value.shape != shape or value.dtype not in _FLOATS[:2]):
            raise ValueError(
                f"{name}: {argument} must be float64 or float32 of shape {shape}, "
                f"got {value.dtype} of shape {value.shape}."
            )
    if classes == 0 or teacher.dtype not in _FLOATS or not 1 <= threads <= _MOST_THREADS:
        raise ValueError(f"{name}: teacher must have classes, and threads be positive.")
    scores, values = (np.ascontiguousarray(x, dtype) for x in (scores, values))
    out, stats = np.empty((n, classes), dtype), np.empty((4, len(scores), n, classes), dtype)
    taus = _temperature(name, "temperature", temperature, rows)
    call = (_matrix(teacher), scores, values, taus, residual, out, stats)
    if upstream is None:
        _native.attention(*call, *[None] * 5, threads)
        return out.reshape(teacher.shape), None
    upstream = np.ascontiguousarray(upstream, dtype).reshape(n, classes)
    gradients = AttentionGradients(
        np.empty((n, classes), teacher.dtype), np.empty(n), np.empty_like(scores),
        np.empty_like(values),
    )  # fmt: skip
    _native.attention(*call, upstream, *gradients, threads)
    to_rows = gradients.temperature if np.size(temperature) > 1 else gradients.temperature.sum()
    return out.reshape(teacher.shape), gradients._replace(
        teacher=gradients.teacher.reshape(teacher.shape),
        temperature=np.reshape(to_rows, np.shape(temperature)),
    )


def _per_row(name: str, argument: str, value, rows: tuple[int, ...], kinds: str) -> np.ndarray:
    """An array of the rows' shape, flat, and float64 unless it is bool."""
    value = np.asarray(value)
    if value.dtype.kind not in kinds:
        expected = "bool" if kinds == "b" else "floating-point"
        raise TypeError(f"{name}: {argument} must be {expected}, got {value.dtype}.")
    if value.shape != rows:
        raise ValueError(
            f"{name}: {argument} must have the shape of the rows {rows}, got {value.shape}."
        )
    return np.require(value.reshape(-1), bool if kinds == "b" else np.float64, "CA")


def _temperature(name: str, argument: str, value, rows: tuple[int, ...]) -> np.ndarray:
    value = np.asarray(value)
    if value.dtype.kind not in ("fiu" if value.ndim == 0 else "f"):
        raise TypeError(
            f"{name}: {argument} must be a number or a floating-point array, got {value.dtype}."
        )
    if value.size != 1 and value.shape != rows:
        raise ValueError(
            f"{name}: {argument} must have one element or the shape of the rows {rows}, "
            f"got {value.shape}."
        )
    good = (value > 0) & np.isfinite(value)
    if not good.all():
        raise ValueError(
            f"{name}: {argument} must be positive and finite, got {value[~good].flat[0]}."
        )
    return np.require(value.reshape(-1), np.float64, "CA")


def _labels(name: str, labels, student: np.ndarray) -> np.ndarray:
    """Class indices, flat, or probabilities ``(N, C)``."""
    labels = np.asarray(labels)
    rows = student.shape[:-1]
    if labels.dtype.kind in "iu" and labels.shape == rows:
        return np.require(labels.reshape(-1), np.int64, "CA")
    if labels.dtype in _FLOATS and labels.shape == student.shape:
        return _matrix(labels)
    raise ValueError(
        f"{name}: labels must be integers of shape {rows} or probabilities of shape "
        f"{student.shape}, got {labels.dtype} of shape {labels.shape}."
    )


def _matrix(array: np.ndarray) -> np.ndarray:
    """``(..., C)`` as ``(N, C)``; copied only where strides or alignment leave no choice."""
    return np.require(array.reshape(-1, array.shape[-1]), requirements="A")


def _rowwise(
    name, student, teacher, labels, temperature, teacher_temperature, scale, reduction, mask,
    ignore_index, row_weight, threads, kind, alpha, beta, kd_weight, ce_weight, label_smoothing,
) -> tuple[np.ndarray, Gradients]:  # fmt: skip
    if _native is None:
        raise RuntimeError(f"{name}: the compiled extension _native did not load: {_reason}")
    for argument, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, np.ndarray) or value.dtype not in _FLOATS:
            got = getattr(value, "dtype", type(value).__name__)
            raise TypeError(
                f"{name}: {argument} must be a float64, float32 or float16 array, got {got}."
            )
    if student.shape != teacher.shape:
        raise ValueError(
            f"{name}: teacher must have the student's shape {student.shape}, got {teacher.shape}."
        )
    if student.ndim == 0 or student.shape[-1] == 0:
        raise ValueError(f"{name}: student must have shape (..., C), C >= 1, got {student.shape}.")
    choice(name, "scale", scale, divergences.SCALES)
    choice(name, "reduction", reduction, divergences.REDUCTIONS)
    for argument, value in (("ignore_index", ignore_index), ("threads", threads)):
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise TypeError(f"{name}: {argument} must be an integer, got {type(value).__name__}.")
    if not 1 <= threads <= _MOST_THREADS:
        raise ValueError(f"{name}: threads must be in [1, {_MOST_THREADS}], got {threads}.")
    rows, classes = student.shape[:-1], student.shape[-1]
    if teacher_temperature is None:
        teacher_temperature = temperature
    valid = np.ones(rows, dtype=bool).reshape(-1)
    if mask is not None:
        valid &= _per_row(name, "mask", mask, rows, "b")
    if labels is not None:
        labels = _labels(name, labels, student)
        if labels.ndim == 1:
            valid &= labels != ignore_index
            bad = labels[valid & ((labels < 0) | (labels >= classes))]
            if bad.size:
                raise ValueError(
                    f"{name}: labels must be in [0, {classes}) or ignore_index ({ignore_index}), "
                    f"got {bad[0]}."
                )
    factor = 1.0
    if reduction in ("batchmean", "mean"):
        factor /= max(int(valid.sum()), 1) * (classes if reduction == "mean" else 1)

    # fp16 logits are widened: the kernels' fp16 gradients leave factors to torch's backward.
    wide = [x.astype(np.float32) if x.dtype == np.float16 else x for x in (student, teacher)]
    n = valid.size
    row_loss = np.empty(n)
    gradients = [np.empty(x.shape, x.dtype) for x in wide]
    row_grads = np.empty((4, n))
    _native.rowwise(
        *map(_matrix, wide),
        divergences.Numbers(1.0, 0.0, kd_weight, ce_weight, label_smoothing, alpha, beta),
        divergences.Choices(divergences.KINDS.index(kind), scale == "t2", 0, ignore_index),
        labels,
        valid,
        None if row_weight is None else _per_row(name, "row_weight", row_weight, rows, "f"),
        _temperature(name, "temperature", temperature, rows),
        _temperature(name, "teacher_temperature", teacher_temperature, rows),
        None, factor, row_loss, *map(_matrix, gradients), row_grads, threads,
    )  # fmt: skip
    dtype = np.float64 if np.float64 in (student.dtype, teacher.dtype) else np.float32
    if reduction == "none":
        loss = row_loss.reshape(rows)
    else:  # in the order of the rows, as the torch operator sums; `sum` would compensate
        loss = functools.reduce(operator.add, row_loss.tolist(), 0.0) * factor
    per_row = [
        grad if np.ndim(value) and np.size(value) == n else grad.sum()
        for grad, value in zip(row_grads[1:3], (temperature, teacher_temperature), strict=True)
    ]
    return np.asarray(loss, dtype=dtype), Gradients(
        gradients[0].astype(student.dtype, copy=False),
        gradients[1].astype(teacher.dtype, copy=False),
        row_grads[0].reshape(rows),
        *(
            np.reshape(g, np.shape(v))
            for g, v in zip(per_row, (temperature, teacher_temperature), strict=True)
        ),
    )
