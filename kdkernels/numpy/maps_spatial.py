# SPDX-License-Identifier: Apache-2.0
"""Losses over the positions of maps (B, C, H, W) of one stage."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdkernels.numpy import arrays
from kdkernels.numpy.maps import MapGradients
from kdkernels.scalars import choice

_SQUARED, _ABSOLUTE, _NORM = range(3)  # MapDistance of csrc/kd/maps.h
_MOST_LEVELS = 8


def attention_transfer(
    student: np.ndarray,
    teacher: np.ndarray,
    *,
    power: int = 2,
    reduction: str = "mean",
    threads: int = 1,
    compat: str = "paper",
) -> tuple[np.ndarray, MapGradients]:
    """``kdkernels.functional.attention_transfer`` of maps of one size, and its gradients."""
    name = "attention_transfer"
    choice(name, "compat", compat, ("paper", "torchdistill"))
    distance = _NORM if compat == "torchdistill" else _SQUARED
    return _distance(name, student, teacher, power, distance, reduction, threads)


def ft_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    *,
    power: int = 2,
    distance_power: int = 1,
    reduction: str = "mean",
    threads: int = 1,
) -> tuple[np.ndarray, MapGradients]:
    """``kdkernels.functional.ft_loss`` of maps of one size, and its gradients."""
    name = "ft_loss"
    if distance_power not in (1, 2):
        raise ValueError(f"{name}: distance_power must be 1 or 2, got {distance_power!r}.")
    distance = _ABSOLUTE if distance_power == 1 else _SQUARED
    return _distance(name, student, teacher, power, distance, reduction, threads)


def hcl_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    *,
    levels: Sequence[int] = (4, 2, 1),
    reduction: str = "mean",
    threads: int = 1,
) -> tuple[np.ndarray, MapGradients]:
    """``kdkernels.functional.hcl_loss`` and its gradients."""
    name = "hcl_loss"
    for level in levels:
        arrays.integer(name, "levels", level)
    if not len(levels) <= _MOST_LEVELS or min(levels, default=1) < 1:
        raise ValueError(
            f"{name}: levels must be up to {_MOST_LEVELS} positive integers, got {levels}."
        )
    _check(name, student, teacher, reduction, threads)
    samples, channels, height, width = student.shape
    if teacher.shape != student.shape:
        raise ValueError(
            f"{name}: teacher must have the student's shape {student.shape}, got {teacher.shape}."
        )
    used = [int(level) for level in levels if level < height]
    weights = [0.5**k for k in range(len(used) + 1)]
    weights = [weight / sum(weights) for weight in weights]
    terms = max(samples, 1) * channels if reduction == "mean" else 1
    factor = 1.0 / (terms * height * width)
    given = [_packed(student)]
    alike = given[0].flags.c_contiguous
    given.append(_packed(teacher, not alike))
    return _run(name, "pyramid", given, (student, teacher), factor, (weights, used), threads)


def _distance(name, student, teacher, power, distance, reduction, threads):
    arrays.integer(name, "power", power)
    if power < 1:
        raise ValueError(f"{name}: power must be a positive integer, got {power!r}.")
    _check(name, student, teacher, reduction, threads)
    samples, _, height, width = student.shape
    if teacher.shape != (samples, teacher.shape[1], height, width):
        raise ValueError(
            f"{name}: teacher must have the student's samples and size {student.shape}, "
            f"got {teacher.shape}."
        )
    terms = 1 if reduction == "sum" else max(samples, 1)
    if reduction == "mean" and distance != _NORM:
        terms *= height * width
    given = [_packed(x) for x in (student, teacher)]
    choices = ((int(power), distance),)
    return _run(name, "spatial_attention", given, (student, teacher), 1 / terms, choices, threads)


def _check(name, student, teacher, reduction, threads) -> None:
    choice(name, "reduction", reduction, ("mean", "sum"))
    arrays.threads(name, threads)
    for argument, value in (("student", student), ("teacher", teacher)):
        arrays.floats(name, argument, value)
        if value.ndim != 4 or 0 in value.shape[1:]:
            raise ValueError(
                f"{name}: {argument} must have shape (B, C, H, W) with no empty dimension but the "
                f"batch, got {value.shape}."
            )


def _packed(maps: np.ndarray, last: bool | None = None) -> np.ndarray:
    """Aligned, contiguous or channels-last: the latter if ``last``, by default if they are."""
    maps = arrays.widened(maps)
    turned = maps.transpose(0, 2, 3, 1)
    if last is None:
        last = turned.flags.c_contiguous and not maps.flags.c_contiguous
    if not last:
        return np.require(maps, requirements="CA")
    return np.require(turned, requirements="CA").transpose(0, 3, 1, 2)


def _run(name, operator, given, sides, factor, options, threads):
    grads = [np.empty_like(x) for x in given]
    run = getattr(arrays.native(name), operator)
    loss = run(*given, factor, *options, *grads, threads)
    grads = [g.astype(x.dtype, copy=False) for g, x in zip(grads, sides, strict=True)]
    return np.asarray(loss, arrays.accumulated_in(*sides)), MapGradients(*grads)
