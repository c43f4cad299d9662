# SPDX-License-Identifier: Apache-2.0
"""Divergences from a teacher that is stored as its top-k values.

``**rows`` are those of :mod:`kdkernels.numpy`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kdkernels import divergences
from kdkernels.divergences import KINDS, MISSING, TopKChoices, TopKNumbers
from kdkernels.numpy import arrays
from kdkernels.numpy.rows import merged, prepare
from kdkernels.scalars import choice


class TopKGradients(NamedTuple):
    """Of the loss; the logits' and the values' in their dtype, the others float64."""

    student: np.ndarray
    topk_values: np.ndarray
    row_weight: np.ndarray
    temperature: np.ndarray
    teacher_temperature: np.ndarray
    teacher_logsumexp: np.ndarray


def topk_divergence(
    student: np.ndarray,
    topk_values: np.ndarray,
    topk_indices: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    kind: str = "forward_kl",
    beta: float | None = None,
    values: str = "log_probs",
    missing: str = "tail",
    teacher_logsumexp: np.ndarray | None = None,
    **rows,
) -> tuple[np.ndarray, TopKGradients]:
    """``kdkernels.functional.topk_divergence`` and its gradients."""
    name = "topk_divergence"
    native = arrays.native(name)
    options = merged(name, rows)
    choice(name, "kind", kind, ("forward_kl", "reverse_kl", "js", "tv"))
    choice(name, "values", values, ("log_probs", "logits"))
    choice(name, "missing", missing, MISSING)
    kind, _, beta, _ = divergences.resolve(name, kind, None, beta)
    if missing == "zero" and kind == "reverse_kl":
        raise ValueError(f"{name}: reverse KL is infinite with missing='zero'.")
    if missing == "tail" and values == "logits" and teacher_logsumexp is None:
        raise ValueError(f"{name}: missing='tail' needs teacher_logsumexp with values='logits'.")
    if missing != "tail" and teacher_logsumexp is not None:
        raise ValueError(f"{name}: teacher_logsumexp has no use with missing={missing!r}.")
    arrays.logits(name, student, student)
    indices = _indices(name, student, topk_values, topk_indices)
    rows = prepare(name, student, labels, options)
    if teacher_logsumexp is not None:
        teacher_logsumexp = arrays.per_row(
            name, "teacher_logsumexp", teacher_logsumexp, rows.shape, "f"
        )

    wide = arrays.widened(student), arrays.widened(topk_values)
    n = rows.counts.size
    row_loss, row_grads, faults = np.empty(n), np.empty((5, n)), np.empty(n, np.uint8)
    grads = [np.empty(x.shape, x.dtype) for x in wide]
    native.sparse(
        *map(arrays.matrix, wide), indices, TopKNumbers(beta=beta),
        TopKChoices(
            KINDS.index(kind), rows.t2, 0, rows.ignore_index, MISSING.index(missing), True
        ),
        *rows.per_row(), teacher_logsumexp, rows.factor, row_loss, faults,
        *map(arrays.matrix, grads), row_grads, rows.threads,
    )  # fmt: skip
    _refuse(name, faults, student.shape[-1])
    return rows.loss(row_loss, arrays.accumulated_in(student, topk_values)), TopKGradients(
        grads[0].astype(student.dtype, copy=False),
        grads[1].astype(topk_values.dtype, copy=False),
        row_grads[0].reshape(rows.shape),
        *rows.to_temperatures(row_grads[1:3]),
        row_grads[3].reshape(rows.shape),
    )


def _indices(name: str, student, values, indices) -> np.ndarray:
    """As int64 (N, k); their values are left to the kernel to check."""
    arrays.floats(name, "topk_values", values)
    indices = np.asarray(indices)
    if indices.dtype.kind not in "iu":
        raise TypeError(f"{name}: topk_indices must be integers, got {indices.dtype}.")
    for argument, value in (("topk_values", values), ("topk_indices", indices)):
        if value.ndim != student.ndim or value.shape[:-1] != student.shape[:-1]:
            raise ValueError(
                f"{name}: {argument} must have shape {(*student.shape[:-1], 'k')}, "
                f"got {value.shape}."
            )
    if values.shape != indices.shape or values.shape[-1] == 0:
        raise ValueError(
            f"{name}: topk_values and topk_indices must have one shape (..., k) with k >= 1, "
            f"got {values.shape} and {indices.shape}."
        )
    return np.require(arrays.matrix(indices), np.int64, "CA")


def _refuse(name: str, faults: np.ndarray, classes: int) -> None:
    """Raise for the first row that the kernel has refused; as `Fault` in csrc/kd/sparse.h."""
    if not faults.any():
        return
    row = np.flatnonzero(faults)[0]
    if faults[row] == 1:
        raise ValueError(
            f"{name}: topk_indices must be in [0, {classes}) where topk_values is not -inf; "
            f"row {row} has others."
        )
    raise ValueError(
        f"{name}: topk_indices must be distinct in a row where topk_values is not -inf; "
        f"row {row} repeats one."
    )
