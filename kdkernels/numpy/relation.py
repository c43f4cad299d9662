# SPDX-License-Identifier: Apache-2.0
"""Losses over relations, of features of one size.

Of embeddings the kernels do everything. Between maps and Gram matrices, and back to the gradients,
are NumPy's matrix products, where torch's are in ``kdkernels.functional``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from kdkernels.numpy import arrays
from kdkernels.scalars import choice, in_dimensions, number

_MOST_COEFFICIENTS = 16  # PolynomialNumbers of csrc/kd/relation.h


class RelationGradients(NamedTuple):
    """Of the loss, in each side's dtype."""

    student: np.ndarray
    teacher: np.ndarray


def rkd_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    squared: bool = False,
    reduction: str = "mean",
    threads: int = 1,
) -> tuple[np.ndarray, RelationGradients]:
    """``kdkernels.functional.rkd_loss`` and its gradients."""
    name = "rkd_loss"
    weights = (
        number(name, "distance_weight", distance_weight),
        number(name, "angle_weight", angle_weight),
    )
    choices = (arrays.flag(name, "squared", squared),)
    rows = _embeddings(name, student, teacher, reduction, threads)
    factor, divisors = 1 / rows, (rows, rows**2)
    if reduction == "sum":
        factor, divisors = float(rows**2), (rows**2, rows**2)
    numbers = [w / n for w, n in zip(weights, divisors, strict=True)]
    return _run(name, "rkd", student, teacher, factor, threads, numbers, choices)


def pkt_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    *,
    eps: float = 1e-7,
    reduction: str = "mean",
    threads: int = 1,
) -> tuple[np.ndarray, RelationGradients]:
    """``kdkernels.functional.pkt_loss`` and its gradients."""
    name = "pkt_loss"
    eps = number(name, "eps", eps)
    if not 0 < eps < 1:
        raise ValueError(f"{name}: eps must be in (0, 1), got {eps}.")
    rows = _embeddings(name, student, teacher, reduction, threads)
    factor = 1 / rows**2 if reduction == "mean" else 1.0
    return _run(name, "pkt", student, teacher, factor, threads, (eps,))


def cc_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    *,
    kernel: str = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
    reduction: str = "mean",
    threads: int = 1,
    compat: str = "paper",
) -> tuple[np.ndarray, RelationGradients]:
    """``kdkernels.functional.cc_loss`` and its gradients."""
    name = "cc_loss"
    choice(name, "compat", compat, ("paper", "torchdistill", "repdistiller"))
    choice(name, "kernel", kernel, ("gaussian", "bilinear"))
    gamma = number(name, "gamma", gamma)
    arrays.integer(name, "order", order)
    if not 0 < order < _MOST_COEFFICIENTS:
        raise ValueError(f"{name}: order must be in [1, {_MOST_COEFFICIENTS}), got {order}.")
    beside = compat == "repdistiller"
    rows = _embeddings(name, student, teacher, reduction, threads, same=beside)
    mean = reduction == "mean"
    if beside:
        factor = 1 / max(rows - 1, 1) if mean else 1.0
        return _run(name, "neighbours", student, teacher, factor, threads)
    series = [math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)]
    numbers = [0.0, 1.0] if kernel == "bilinear" else series
    numbers += [0.0] * (_MOST_COEFFICIENTS - len(numbers))
    factor, choices = 1 / rows**2 if mean else 1.0, (compat == "torchdistill",)
    return _run(name, "polynomial", student, teacher, factor, threads, numbers, choices)


def sp_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    *,
    reduction: str = "mean",
    threads: int = 1,
    compat: str = "paper",
) -> tuple[np.ndarray, RelationGradients]:
    """``kdkernels.functional.sp_loss`` of features (B, ...), and its gradients."""
    name = "sp_loss"
    choice(name, "compat", compat, ("paper", "torchdistill"))
    rows = _check(name, student, teacher, reduction, threads, (0,))
    flat = [x.reshape(1, len(x), math.prod(x.shape[1:])) for x in (student, teacher)]
    factor = 1 / rows**2 if reduction == "mean" else 1.0
    return _matched(name, flat, (student, teacher), factor, 1 if compat != "paper" else 2, threads)


def ickd_loss(
    student: np.ndarray, teacher: np.ndarray, *, reduction: str = "mean", threads: int = 1
) -> tuple[np.ndarray, RelationGradients]:
    """``kdkernels.functional.ickd_loss`` of maps (B, C, H, W), and its gradients."""
    name = "ickd_loss"
    rows = _check(name, student, teacher, reduction, threads, (0, 1), 4)
    factor = 1 / (student.shape[1] * rows**2) if reduction == "mean" else 1.0
    flat = [x.reshape(*x.shape[:2], math.prod(x.shape[2:])) for x in (student, teacher)]
    return _matched(name, flat, (student, teacher), factor, 2, threads)


def nst_loss(
    student: np.ndarray, teacher: np.ndarray, *, reduction: str = "mean", threads: int = 1
) -> tuple[np.ndarray, RelationGradients]:
    """``kdkernels.functional.nst_loss`` by the channels' Gram matrices, and its gradients."""
    name = "nst_loss"
    rows = _check(name, student, teacher, reduction, threads, (0, 2, 3), 4)
    dtype = arrays.accumulated_in(student, teacher)
    flat = [x.reshape(*x.shape[:2], math.prod(x.shape[2:])) for x in (student, teacher)]
    s, t = (np.ascontiguousarray(x, dtype) for x in flat)
    grams = [np.ascontiguousarray(a @ b.swapaxes(1, 2)) for a, b in ((s, s), (s, t), (t, t))]
    slopes = [np.empty_like(gram) for gram in grams]
    factor = 1 / rows if reduction == "mean" else 1.0
    numbers = 1 / s.shape[1], 1 / t.shape[1]
    loss = arrays.native(name).nst_grams(*grams, factor, numbers, *slopes, threads)
    of_student, cross, of_teacher = slopes
    gradients = of_student @ s + cross @ t, of_teacher @ t + cross.swapaxes(1, 2) @ s
    return _finished(loss, gradients, (student, teacher))


def _check(name, student, teacher, reduction, threads, same, dims=None) -> int:
    """Validate features that agree in dimensions ``same``; their samples, at least 1."""
    choice(name, "reduction", reduction, ("mean", "sum"))
    arrays.threads(name, threads)
    shape = {None: "(B, ...)", 2: "(B, D)", 4: "(B, C, H, W)"}[dims]
    for argument, value in (("student", student), ("teacher", teacher)):
        arrays.floats(name, argument, value)
        if value.ndim < 2 or 0 in value.shape[1:] or dims not in (None, value.ndim):
            raise ValueError(
                f"{name}: {argument} must have shape {shape} with no empty dimension but the "
                f"batch, got {value.shape}."
            )
    if any(student.shape[d] != teacher.shape[d] for d in same):
        raise ValueError(
            f"{name}: teacher must have the student's shape {student.shape}{in_dimensions(same)}, "
            f"got {teacher.shape}."
        )
    return max(len(student), 1)


def _embeddings(name, student, teacher, reduction, threads, same=False) -> int:
    return _check(name, student, teacher, reduction, threads, (0, 1) if same else (0,), 2)


def _run(name, operator, student, teacher, factor, threads, *options):
    given = [arrays.matrix(arrays.widened(x)) for x in (student, teacher)]
    grads = [np.empty(x.shape, x.dtype) for x in given]
    run = getattr(arrays.native(name), operator)
    return _finished(run(*given, factor, *options, *grads, threads), grads, (student, teacher))


def _matched(name, given, sides, factor, norm, threads):
    """Of Gram matrices x x' with rows over their norms."""
    dtype = arrays.accumulated_in(*sides)
    given = [np.ascontiguousarray(x, dtype) for x in given]
    grams = [np.ascontiguousarray(x @ x.swapaxes(1, 2)) for x in given]
    slopes = [np.empty_like(gram) for gram in grams]
    choices = norm, False, True  # GramChoices of csrc/kd/relation.h
    loss = arrays.native(name).gram_match(*grams, factor, (1.0, 1.0), choices, *slopes, threads)
    return _finished(loss, [g @ x for g, x in zip(slopes, given, strict=True)], sides)


def _finished(loss, gradients, sides):
    gradients = (
        g.astype(x.dtype, copy=False).reshape(x.shape)
        for g, x in zip(gradients, sides, strict=True)
    )
    return np.asarray(loss, arrays.accumulated_in(*sides)), RelationGradients(*gradients)
