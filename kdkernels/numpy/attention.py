# SPDX-License-Identifier: Apache-2.0
"""The learning simplifier's attention of the classes of a row to each other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kdkernels.numpy import arrays


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
    native = arrays.native(name)
    arrays.floats(name, "teacher", teacher)
    if teacher.ndim == 0 or teacher.shape[-1] == 0:
        raise ValueError(f"{name}: teacher must have shape (..., K), K >= 1, got {teacher.shape}.")
    rows, classes = teacher.shape[:-1], teacher.shape[-1]
    dtype, n = scores.dtype, arrays.rows_in(teacher)
    for argument, value, shape in (
        ("scores", scores, (len(scores), classes + 1, classes + 1)),
        ("values", values, (len(scores), classes + 1)),
        ("upstream", upstream, teacher.shape),
    ):
        if value is not None and (value.shape != shape or value.dtype not in arrays.FLOATS[:2]):
            raise ValueError(
                f"{name}: {argument} must be float64 or float32 of shape {shape}, "
                f"got {value.dtype} of shape {value.shape}."
            )
    arrays.threads(name, threads)
    scores, values = (np.ascontiguousarray(x, dtype) for x in (scores, values))
    out, stats = np.empty((n, classes), dtype), np.empty((4, len(scores), n, classes), dtype)
    taus = arrays.temperature(name, "temperature", temperature, rows)
    call = (arrays.matrix(teacher), scores, values, taus, residual, out, stats)
    if upstream is None:
        native.attention(*call, *[None] * 5, threads)
        return out.reshape(teacher.shape), None
    upstream = np.ascontiguousarray(upstream, dtype).reshape(n, classes)
    gradients = AttentionGradients(
        np.empty((n, classes), teacher.dtype), np.empty(n), np.empty_like(scores),
        np.empty_like(values),
    )  # fmt: skip
    native.attention(*call, upstream, *gradients, threads)
    one = np.size(temperature) == 1
    to_rows = gradients.temperature.sum() if one else gradients.temperature
    return out.reshape(teacher.shape), gradients._replace(
        teacher=gradients.teacher.reshape(teacher.shape),
        temperature=np.reshape(to_rows, np.shape(temperature)),
    )
