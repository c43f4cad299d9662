# SPDX-License-Identifier: Apache-2.0
"""Losses over the elements of maps (B, C, ...) of one stage."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kdkernels.numpy import arrays
from kdkernels.scalars import choice, number

_SQUARE, _OFD, _AB = range(3)  # ElementKind of csrc/kd/maps.h


class MapGradients(NamedTuple):
    """Of the loss; the maps' in their dtype, the margin's or variance's (C,) in float64."""

    student: np.ndarray
    teacher: np.ndarray | None = None
    parameter: np.ndarray | None = None


def fitnet_loss(
    student: np.ndarray, teacher: np.ndarray, *, reduction: str = "mean", threads: int = 1
) -> tuple[np.ndarray, MapGradients]:
    """``kdkernels.functional.fitnet_loss`` and its gradients."""
    name = "fitnet_loss"
    factor = 2 * _mean(name, student, teacher, reduction, False)
    return _run(name, _SQUARE, student, teacher, None, factor, threads)


def masked_mse(
    student: np.ndarray,
    teacher: np.ndarray,
    mask: np.ndarray,
    *,
    reduction: str = "mean",
    threads: int = 1,
) -> tuple[np.ndarray, MapGradients]:
    """``kdkernels.functional.masked_mse`` and its gradients."""
    name = "masked_mse"
    factor = 2 * _mean(name, student, teacher, reduction, False)
    mask = np.asarray(mask)
    if mask.dtype.kind not in "bf" or mask.ndim != student.ndim or any(
        m not in (1, n) for m, n in zip(mask.shape, student.shape, strict=True)
    ):  # fmt: skip
        raise ValueError(
            f"{name}: mask must be bool or floating-point and have the student's sizes "
            f"{student.shape} or 1, got {mask.dtype} of shape {mask.shape}."
        )
    if any(m > 1 for m in mask.shape[2:]):
        mask = np.broadcast_to(mask, mask.shape[:2] + student.shape[2:])
    return _run(name, _SQUARE, student, teacher, mask, factor, threads)


def ofd_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    margin: np.ndarray | None = None,
    *,
    reduction: str = "mean",
    threads: int = 1,
) -> tuple[np.ndarray, MapGradients]:
    """``kdkernels.functional.ofd_loss`` and its gradients; ``margin`` has C elements."""
    name = "ofd_loss"
    factor = 2 * _mean(name, student, teacher, reduction, True)
    if margin is not None:
        margin = _per_channel(name, "margin", margin, student)
    return _run(name, _OFD, student, teacher, margin, factor, threads)


def ab_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    *,
    margin: float = 1.0,
    reduction: str = "mean",
    threads: int = 1,
    compat: str = "paper",
) -> tuple[np.ndarray, MapGradients]:
    """``kdkernels.functional.ab_loss`` and its gradient, which the teacher has none of."""
    name = "ab_loss"
    margin = number(name, "margin", margin, 0.0)
    scale = {"paper": 3 / 1000, "torchdistill": 1.0}
    factor = 2 * scale[choice(name, "compat", compat, tuple(scale))]
    factor *= _mean(name, student, teacher, reduction, True)
    return _run(name, _AB, student, teacher, None, factor, threads, margin)


def vid_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    variance: np.ndarray,
    *,
    reduction: str = "mean",
    threads: int = 1,
) -> tuple[np.ndarray, MapGradients]:
    """``kdkernels.functional.vid_loss`` of variances (C,), and its gradients."""
    name = "vid_loss"
    factor = _mean(name, student, teacher, reduction, False)
    variance = _per_channel(name, "variance", variance, student)
    v = variance.reshape(-1).astype(np.float64)
    loss, gradients = _run(name, _SQUARE, student, teacher, 1 / variance, factor, threads)
    half = factor / 2 * (student.size // student.shape[1])
    slope = half / v - gradients.parameter / v**2
    return loss + loss.dtype.type(half * np.log(v).sum()), gradients._replace(parameter=slope)


def _mean(name: str, student, teacher, reduction: str, by_sample: bool) -> float:
    """The factor of a reduction of valid maps, whose mean divides by samples or by elements."""
    choice(name, "reduction", reduction, ("mean", "sum"))
    for argument, value in (("student", student), ("teacher", teacher)):
        arrays.floats(name, argument, value)
    if student.shape != teacher.shape or student.ndim < 2 or 0 in student.shape[1:]:
        raise ValueError(
            f"{name}: student and teacher must have one shape (B, C, ...) with no empty dimension "
            f"but the batch, got {student.shape} and {teacher.shape}."
        )
    count = len(student) if by_sample else student.size
    return 1.0 / max(count, 1) if reduction == "mean" else 1.0


def _per_channel(name: str, argument: str, value, student) -> np.ndarray:
    """(1, C, 1, ...)."""
    value = np.asarray(value)
    if value.dtype.kind != "f" or value.size != student.shape[1]:
        raise ValueError(
            f"{name}: {argument} must be floating-point with one element for each of "
            f"{student.shape[1]} channels, got {value.dtype} of shape {value.shape}."
        )
    return value.reshape(1, -1, *[1] * (student.ndim - 2))


def _run(name, kind, student, teacher, parameter, factor, threads, margin=1.0):
    native = arrays.native(name)
    arrays.threads(name, threads)
    accumulated = arrays.accumulated_in(student, teacher)
    wide = [arrays.widened(x) for x in (student, teacher)]
    grads = [np.empty(x.shape, x.dtype) for x in wide]
    if kind == _AB:
        grads[1] = None
    slope = None
    if parameter is not None:
        if parameter.size == parameter.shape[1]:
            slope = np.empty(parameter.size)
        places = int(np.prod(parameter.shape[2:]))
        parameter = np.require(parameter, accumulated, "CA")
        parameter = parameter.reshape(*parameter.shape[:2], places)
    loss = native.elementwise(
        *map(_flat, wide), parameter, factor, (margin,), (kind,),
        *(None if g is None else _flat(g) for g in grads), slope, threads,
    )  # fmt: skip
    grads = [
        None if g is None else g.astype(x.dtype, copy=False)
        for g, x in zip(grads, (student, teacher), strict=True)
    ]
    return np.asarray(loss, accumulated), MapGradients(*grads, slope)


def _flat(maps: np.ndarray) -> np.ndarray:
    """(B, C, P), contiguous: of a gradient a view."""
    places = int(np.prod(maps.shape[2:]))
    return np.require(maps, requirements="CA").reshape(*maps.shape[:2], places)
