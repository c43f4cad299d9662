# SPDX-License-Identifier: Apache-2.0
"""What every loss over rows of logits is given, validated, and the loss from that of each row."""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import numpy as np

from kdkernels import divergences
from kdkernels.numpy import arrays
from kdkernels.scalars import choice

DEFAULTS = {
    "temperature": 1.0,
    "teacher_temperature": None,
    "scale": "t2",
    "reduction": "batchmean",
    "mask": None,
    "ignore_index": -100,
    "row_weight": None,
    "threads": 1,
}


class Rows(NamedTuple):
    """Arguments of one call over N rows."""

    shape: tuple[int, ...]  # of the rows
    counts: np.ndarray  # (N,) bool
    labels: np.ndarray | None  # (N,) int64, or probabilities (N, C)
    row_weight: np.ndarray | None  # (N,)
    temperature: np.ndarray  # (1,) or (N,)
    teacher_temperature: np.ndarray
    given: tuple  # both as the caller gave them
    t2: bool
    reduction: str
    ignore_index: int
    factor: float  # of the reduction
    threads: int

    def per_row(self):
        """What of the kernels' arguments lies side by side in every family."""
        return self.labels, self.counts, self.row_weight, self.temperature, self.teacher_temperature

    def loss(self, row_loss: np.ndarray, dtype) -> np.ndarray:
        if self.reduction == "none":
            return row_loss.reshape(self.shape).astype(dtype)
        # In the order of the rows, as the torch operator sums; `sum` would compensate.
        total = functools.reduce(operator.add, row_loss.tolist(), 0.0)
        return np.asarray(total * self.factor, dtype)

    def to_temperatures(self, row_grads: np.ndarray) -> list[np.ndarray]:
        """The gradients (2, N) to both temperatures, in the shapes these were given in."""
        return [
            np.reshape(grad if np.ndim(value) and np.size(value) == grad.size else grad.sum(),
                       np.shape(value))
            for grad, value in zip(row_grads, self.given, strict=True)
        ]  # fmt: skip


def merged(name: str, given: dict, **defaults) -> dict:
    """``given`` over the defaults; no other names."""
    options = DEFAULTS | defaults
    unknown = [key for key in given if key not in options]
    if unknown:
        raise TypeError(
            f"{name}: unexpected keyword argument {unknown[0]!r}; beside its own it takes "
            f"{', '.join(options)}."
        )
    return options | given


def prepare(name: str, student: np.ndarray, labels, options: dict, width: int = 0) -> Rows:
    """Validate the arguments shared by the losses over rows; ``student`` has been.

    ``width``: the classes that a mean is taken over, 0: all.
    """
    choice(name, "scale", options["scale"], divergences.SCALES)
    reduction = choice(name, "reduction", options["reduction"], divergences.REDUCTIONS)
    ignore_index = options["ignore_index"]
    arrays.integer(name, "ignore_index", ignore_index)
    arrays.threads(name, options["threads"])
    rows, classes = student.shape[:-1], student.shape[-1]
    given = options["temperature"], options["teacher_temperature"]
    if given[1] is None:
        given = given[0], given[0]
    counts = np.ones(arrays.rows_in(student), dtype=bool)
    if options["mask"] is not None:
        counts &= arrays.per_row(name, "mask", options["mask"], rows, "b")
    if labels is not None:
        labels = arrays.labels(name, labels, student)
        if labels.ndim == 1:
            counts &= labels != ignore_index
            bad = labels[counts & ((labels < 0) | (labels >= classes))]
            if bad.size:
                raise ValueError(
                    f"{name}: labels must be in [0, {classes}) or ignore_index ({ignore_index}), "
                    f"got {bad[0]}."
                )
    row_weight = options["row_weight"]
    if row_weight is not None:
        row_weight = arrays.per_row(name, "row_weight", row_weight, rows, "f")
    factor = 1.0
    if reduction in ("batchmean", "mean"):
        factor /= max(int(counts.sum()), 1) * (classes if reduction == "mean" else 1)
        if reduction == "mean" and width:
            factor *= classes / width
    return Rows(
        rows, counts, labels, row_weight,
        arrays.temperature(name, "temperature", given[0], rows),
        arrays.temperature(name, "teacher_temperature", given[1], rows),
        given, options["scale"] == "t2", reduction, ignore_index, factor, options["threads"],
    )  # fmt: skip
