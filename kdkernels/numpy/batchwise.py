# SPDX-License-Identifier: Apache-2.0
"""Losses that relate the rows of a batch to each other.

MLKD has none here: its selection and weights are torch operations around the kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kdkernels import divergences
from kdkernels.numpy import arrays
from kdkernels.scalars import choice, number


class BatchGradients(NamedTuple):
    """Of the loss; the logits' in their dtype, the temperature's float64."""

    student: np.ndarray
    teacher: np.ndarray
    temperature: np.ndarray


def dist_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    temperature: float | np.ndarray = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    scale: str = "t2",
    mask: np.ndarray | None = None,
    ignore_index: int = -100,
    threads: int = 1,
    compat: str = "paper",
) -> tuple[np.ndarray, BatchGradients]:
    """``kdkernels.functional.dist_loss`` and its gradients; the temperature is one number."""
    name = "dist_loss"
    native = arrays.native(name)
    choice(name, "compat", compat, ("paper", "torchdistill"))
    choice(name, "scale", scale, divergences.SCALES)
    arrays.logits(name, student, teacher)
    arrays.integer(name, "ignore_index", ignore_index)
    arrays.threads(name, threads)
    rows = student.shape[:-1]
    if np.size(temperature) != 1:
        raise NotImplementedError(
            f"{name}: temperature must have one element, got shape {np.shape(temperature)}."
        )
    (tau,) = arrays.temperature(name, "temperature", temperature, rows)
    if mask is not None:
        mask = arrays.per_row(name, "mask", mask, rows, "b")
    if labels is not None:
        labels = arrays.labels(name, labels, student)
        if labels.ndim != 1:
            raise TypeError(f"{name}: labels must be class indices, got probabilities.")
        counts = labels != ignore_index
        mask = counts if mask is None else mask & counts

    wide = arrays.widened(student), arrays.widened(teacher)
    grads = [np.empty(x.shape, x.dtype) for x in wide]
    # DistNumbers and DistChoices of csrc/kd/batchwise.h.
    numbers = float(tau), number(name, "beta", beta), number(name, "gamma", gamma)
    choices = scale == "t2", compat == "torchdistill"
    loss, slope = native.dist(
        *map(arrays.matrix, wide), numbers, choices, mask, *map(arrays.matrix, grads), None, threads
    )
    return np.asarray(loss, arrays.accumulated_in(student, teacher)), BatchGradients(
        grads[0].astype(student.dtype, copy=False),
        grads[1].astype(teacher.dtype, copy=False),
        np.reshape(slope, np.shape(temperature)),
    )
