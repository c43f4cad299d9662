# SPDX-License-Identifier: Apache-2.0
"""The rowwise losses and their gradients on NumPy arrays: the CPU kernels without torch.

Bit for bit what the ``cpu`` backend computes on the same values. Arrays are float64, float32 or
float16, of any strides; logits are ``(..., C)`` and the leading dimensions rows. The other
arguments mean what they mean in ``kdkernels.functional``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kdkernels import divergences
from kdkernels.scalars import choice, number

try:
    from kdkernels import _native
except ImportError as error:  # pragma: no cover - depends on the installation
    _native, _reason = None, str(error)

_FLOATS = (np.float64, np.float32, np.float16)


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


def _per_row(name: str, argument: str, value, rows: tuple[int, ...], dtype) -> np.ndarray:
    value = np.asarray(value, dtype=dtype)
    if value.shape != rows and value.size != 1:
        raise ValueError(f"{name}: {argument} must have shape {rows}, got {value.shape}.")
    return np.ascontiguousarray(value.reshape(-1))


def _temperature(name: str, argument: str, value, rows: tuple[int, ...]) -> np.ndarray:
    value = _per_row(name, argument, value, rows, np.float64)
    if not np.all((value > 0) & np.isfinite(value)):
        raise ValueError(f"{name}: {argument} must be positive and finite, got {value.min()}.")
    return value


def _labels(name: str, labels, student: np.ndarray, ignore_index: int) -> np.ndarray:
    labels = np.asarray(labels)
    rows, classes = student.shape[:-1], student.shape[-1]
    if labels.dtype.kind in "iu" and labels.shape == rows:
        bad = labels[((labels < 0) | (labels >= classes)) & (labels != ignore_index)]
        if bad.size:
            raise ValueError(
                f"{name}: labels must be in [0, {classes}) or ignore_index ({ignore_index}), "
                f"got {bad[0]}."
            )
        return np.ascontiguousarray(labels.reshape(-1), dtype=np.int64)
    if labels.dtype in _FLOATS and labels.shape == student.shape:
        return labels.reshape(-1, classes)
    raise ValueError(
        f"{name}: labels must be integers of shape {rows} or probabilities of shape "
        f"{student.shape}, got {labels.dtype} of shape {labels.shape}."
    )


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
    rows, classes = student.shape[:-1], student.shape[-1]
    if teacher_temperature is None:
        teacher_temperature = temperature
    valid = np.ones(rows, dtype=bool)
    if mask is not None:
        if np.asarray(mask).dtype != bool:
            raise TypeError(f"{name}: mask must be bool, got {np.asarray(mask).dtype}.")
        valid &= _per_row(name, "mask", mask, rows, bool).reshape(rows)
    if labels is not None:
        labels = _labels(name, labels, student, ignore_index)
        if labels.ndim == 1:
            valid &= (labels != ignore_index).reshape(rows)
    factor = 1.0
    if reduction in ("batchmean", "mean"):
        factor /= max(int(valid.sum()), 1) * (classes if reduction == "mean" else 1)

    # fp16 logits are widened: the kernels' fp16 gradients leave factors to torch's backward.
    wide = [x.astype(np.float32) if x.dtype == np.float16 else x for x in (student, teacher)]
    n = int(np.prod(rows))
    row_loss = np.empty(n)
    gradients = [np.empty(x.shape, x.dtype) for x in wide]
    row_grads = np.empty((4, n))
    _native.rowwise(
        *(x.reshape(-1, classes) for x in wide),
        labels,
        np.ascontiguousarray(valid.reshape(-1)),
        None if row_weight is None else _per_row(name, "row_weight", row_weight, rows, np.float64),
        _temperature(name, "temperature", temperature, rows),
        _temperature(name, "teacher_temperature", teacher_temperature, rows),
        divergences.KINDS.index(kind), alpha, beta, kd_weight, ce_weight, label_smoothing,
        ignore_index, scale == "t2", factor,
        row_loss, *(x.reshape(-1, classes) for x in gradients), row_grads, threads,
    )  # fmt: skip
    dtype = np.float64 if np.float64 in (student.dtype, teacher.dtype) else np.float32
    # In the order of the rows, as the torch operator sums.
    loss = row_loss.reshape(rows) if reduction == "none" else sum(row_loss.tolist()) * factor
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
