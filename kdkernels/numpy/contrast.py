# SPDX-License-Identifier: Apache-2.0
"""Contrast with memory banks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdkernels.numpy import arrays
from kdkernels.numpy.relation import RelationGradients
from kdkernels.scalars import choice, number


def crd_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    student_bank: np.ndarray,
    teacher_bank: np.ndarray,
    index: np.ndarray,
    negatives: np.ndarray,
    normalizer: Sequence[float],
    *,
    temperature: float = 0.07,
    eps: float = 1e-7,
    reduction: str = "mean",
    threads: int = 1,
) -> tuple[np.ndarray, RelationGradients]:
    """``kdkernels.functional.crd_loss`` with ``normalize=False``, and its gradients.

    Embeddings are scored as they are, ``normalizer`` is given, and the banks do not move.
    """
    name = "crd_loss"
    choice(name, "reduction", reduction, ("mean", "sum"))
    temperature, eps = number(name, "temperature", temperature), number(name, "eps", eps, 0.0)
    if temperature <= 0:
        raise ValueError(f"{name}: temperature must be positive, got {temperature}.")
    arrays.threads(name, threads)
    floats = {
        "student": student, "teacher": teacher, "student_bank": student_bank,
        "teacher_bank": teacher_bank,
    }  # fmt: skip
    for argument, value in floats.items():
        arrays.floats(name, argument, value)
        if value.ndim != 2 or value.shape[1] == 0:
            raise ValueError(f"{name}: {argument} must have two dimensions, got {value.shape}.")
    samples, width = student.shape
    for argument, shape in (
        ("teacher", student.shape), ("student_bank", (len(teacher_bank), width)),
        ("teacher_bank", (max(len(teacher_bank), 1), width)),
    ):  # fmt: skip
        if floats[argument].shape != shape:
            raise ValueError(
                f"{name}: {argument} must have shape {shape}, got {floats[argument].shape}."
            )
    for argument, value, dims in (("index", index, 1), ("negatives", negatives, 2)):
        if value.dtype.kind not in "iu" or value.ndim != dims or len(value) != samples or (
            dims == 2 and not value.shape[1]
        ):  # fmt: skip
            raise ValueError(
                f"{name}: {argument} must be integers of the student's {samples} samples, got "
                f"{value.dtype} of shape {value.shape}."
            )
    normalizer = [number(name, "normalizer", float(z)) for z in normalizer]
    dtype = arrays.accumulated_in(*floats.values())
    given = [np.require(x, dtype, "CA") for x in floats.values()]
    narrow = np.int32 if negatives.dtype == np.int32 else np.int64
    chosen = [np.require(index, np.int64, "CA"), np.require(negatives, narrow, "CA")]
    grads = [np.empty_like(x) for x in given[:2]]
    factor = 1 / max(samples, 1) if reduction == "mean" else 1.0
    try:
        loss = arrays.native(name).crd(
            *given, normalizer, *chosen, factor, (temperature, eps), *grads, threads
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    sides = zip(grads, (student, teacher), strict=True)
    return np.asarray(loss, dtype), RelationGradients(
        *(g.astype(x.dtype, copy=False) for g, x in sides)
    )


def sample_negatives(
    labels: np.ndarray,
    index: np.ndarray,
    num_negatives: int,
    *,
    random: np.random.Generator | None = None,
    dtype: type[np.signedinteger] = np.int64,
    threads: int = 1,
) -> np.ndarray:
    """``kdkernels.functional.sample_negatives``, with numbers of ``random``; ascending rows."""
    name = "sample_negatives"
    arrays.threads(name, threads)
    for argument, value in (("labels", labels), ("index", index)):
        if value.dtype.kind not in "iu" or value.ndim != 1:
            raise ValueError(
                f"{name}: {argument} must be integers of shape (n,), got {value.dtype} of shape "
                f"{value.shape}."
            )
    if num_negatives < 1:
        raise ValueError(f"{name}: num_negatives must be at least 1, got {num_negatives}.")
    if dtype not in (np.int64, np.int32):
        raise TypeError(f"{name}: dtype must be numpy.int64 or numpy.int32, got {dtype}.")
    n = len(labels)
    if ((index < 0) | (index >= n)).any():
        raise ValueError(f"{name}: index must be in [0, {n}).")
    random = random or np.random.default_rng()
    shuffle, begin = random.permutation(n), random.integers(0, max(n, 1), len(index))
    drawn = np.empty((len(index), num_negatives), np.int32)
    given = [np.require(x, np.int64, "CA") for x in (labels, index, shuffle, begin)]
    try:
        arrays.native(name).sample_negatives(*given, drawn, threads)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return drawn.astype(dtype, copy=False)
