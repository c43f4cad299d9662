# SPDX-License-Identifier: Apache-2.0
"""Kernels that stand between others, in the NumPy binding: products, rows of attention, scaling.

They have entries for these tests alone. As tests/test_numpy.py, which has the helpers, it runs
under the sanitizers too.
"""

from __future__ import annotations

import numpy as np
import pytest
from test_numpy import FLOATS, INF, LAYOUTS, equal, native, normal

TIGHT = {np.float64: 1e-12, np.float32: 2e-5}
wide = pytest.mark.parametrize("dtype", FLOATS[:2])


def close(a, b, dtype):
    np.testing.assert_allclose(
        a, b, rtol=TIGHT[dtype], atol=TIGHT[dtype] * np.abs(b).max(initial=0)
    )


@wide
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 5, 40), (20, 70, 33), (7, 3, 64), (0, 4, 4)])
def test_products(shape, dtype):
    rows, depth, columns = shape
    a, b, c = (normal(*s, seed=i, dtype=dtype) for i, s in enumerate(
        ((rows, depth), (depth, columns), (rows, columns))))  # fmt: skip
    factor = normal(rows, seed=4, dtype=np.float64)
    for given in (a, np.asfortranarray(a)):
        found = np.empty_like(c)
        native.product(given, b, found, None, False, 1)
        close(found, a @ b, dtype)
        for threads in (1, 3):
            found = c.copy()
            native.product(given, b, found, factor, True, threads)
            close(found, c + factor.astype(dtype)[:, None] * (a @ b), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x not in ("misaligned", "read-only")])
def test_scaling(layout, dtype):
    for shape in ((5, 37), (2, 3000), (0, 3)):
        grad, factor = normal(*shape, dtype=dtype), normal(shape[0], seed=1, dtype=np.float64)
        for given in (factor, factor[:1] if len(factor) else np.ones(1)):
            found = LAYOUTS[layout](grad)
            native.scale_rows(found, given, 3)
            wider = np.float64 if dtype == np.float64 else np.float32
            expected = (grad.astype(wider) * given.astype(wider)[:, None]).astype(dtype)
            assert equal(np.ascontiguousarray(found), expected)


SOFTEN, SOFTMAX, ARRIVE, SCORE, TEACHER = range(5)  # RowStep of csrc/kd/row_attention.h


@wide
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (3, 1500)])
def test_rows_that_attend_to_rows(shape, residual, dtype):
    """One head whose queries, keys and values are the softened rows themselves."""
    rows, classes = shape
    teacher, upstream = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
    if classes > 2:
        teacher[0, 2] = -INF
    tau = np.exp(normal(rows, seed=2, dtype=np.float64, scale=0.3))
    like = lambda x: np.empty(x, dtype)  # noqa: E731
    arrays = {"teacher": teacher, "temperature": tau, "soft": like(shape), "out": like(shape)}

    def step(which, threads=2, **given):
        native.row_attention(which, arrays | given, residual, threads)

    step(SOFTEN)
    off, t = teacher == -INF, tau.astype(dtype)[:, None]
    soft = np.where(off, 0, teacher / t)
    close(arrays["soft"], soft, dtype)
    assert equal(arrays["out"], np.where(residual | off, teacher, 0).astype(dtype))

    soft = arrays["soft"]
    scores = np.ascontiguousarray(soft @ soft.T)
    attended = np.exp(scores - scores.max(1, keepdims=True))
    attended /= attended.sum(1, keepdims=True)
    step(SOFTMAX, scores=scores)
    close(scores, attended, dtype)
    attended = np.ascontiguousarray(scores @ soft)

    arriving = like(shape)
    step(ARRIVE, upstream=upstream, arriving=arriving)
    assert equal(arriving, np.where(off, 0, upstream * t).astype(dtype))
    to_scores = np.ascontiguousarray(arriving @ soft.T)
    mean = (scores * to_scores).sum(1, keepdims=True)
    expected = scores * (to_scores - mean)
    step(SCORE, scores=scores, to_scores=to_scores)
    close(to_scores, expected, dtype)

    to_soft, grad, slope = normal(*shape, seed=3, dtype=dtype), like(shape), np.empty(rows)
    step(
        TEACHER, upstream=upstream, to_soft=to_soft, attended=attended, to_attended=arriving,
        grad_teacher=grad, grad_temperature=slope,
    )  # fmt: skip
    direct = upstream if residual else 0
    close(grad, np.where(off, 0, to_soft / t + direct), dtype)
    product = lambda a, b: (a.astype(np.float64) * b).sum(1)  # noqa: E731
    of_rows = product(attended, arriving) - product(soft, np.where(off, 0, to_soft))
    close(slope, of_rows / tau, dtype)
