# SPDX-License-Identifier: Apache-2.0
"""The steps of MLKD in the NumPy binding, which has no function around them.

As tests/test_numpy.py, which has the helpers, it runs under the sanitizers too.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_numpy import FLOATS, equal, native, normal, pairs
from test_numpy_anything import row_options, unsound

from kdkernels.numpy import arrays as kdnp_arrays


def mlkd(student, teacher, mask, temperatures, weight, samples, classes, threads):
    """The results of the steps."""
    wide = kdnp_arrays.matrix(student), kdnp_arrays.matrix(teacher)
    soft, kl = native.mlkd_softmax(*wide, temperatures, mask, threads)
    samples, classes = (x if x is None else x.astype(soft.dtype) for x in (samples, classes))
    loss, *relations = native.mlkd_relate(soft, (0.3, 0.7), samples, classes, threads)
    gradients = []
    for side, x in enumerate((student, teacher)):
        grad, factor = np.empty(x.shape, x.dtype), np.empty(len(x))
        half = x.dtype == np.float16
        native.mlkd_gradient(
            grad, soft, relations[side], weight.astype(soft.dtype), temperatures, side == 1, mask,
            factor if half else None, threads,
        )  # fmt: skip
        gradients.append((grad, factor if half else None))
    return soft, kl, loss, relations, gradients


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("shape", [(60, 1100), (300, 40)])
def test_steps_of_mlkd_have_the_torch_operators_bits(dtype, shape, some):
    torch = pytest.importorskip("torch")
    from kdkernels import backends

    if not backends.verdict("batchwise.mlkd_softmax", "cpu", "cpu").ok:
        pytest.skip("_C_cpu is not built")
    rows, classes = shape
    student, teacher = normal(*shape, dtype=dtype), normal(*shape, seed=1, dtype=dtype)
    mask, weight = normal(rows, seed=2) > -2, np.abs(normal(rows, seed=3))
    chosen = (np.arange(rows) % 3 > 0, np.arange(classes) % 2 > 0) if some else (None, None)
    taus, ops = [4.0, 1.0], torch.ops.kdkernels

    def tensors(*arrays):
        return [None if x is None else torch.from_numpy(x) for x in arrays]

    for threads in (1, 3):
        soft, kl, loss, relations, gradients = mlkd(
            student, teacher, mask, taus, weight, *chosen, threads
        )
        wanted = ops.mlkd_softmax(*tensors(student, teacher), taus, torch.from_numpy(mask))
        assert equal(soft, wanted[0].numpy()) and equal(kl, wanted[1].numpy())
        picked = tensors(*(x if x is None else x.astype(soft.dtype) for x in chosen))
        value, *same = ops.mlkd_relate(wanted[0], [0.3, 0.7], 3, None, *picked)
        assert equal(np.asarray(loss, soft.dtype), value.numpy())
        assert all(equal(a, b.numpy()) for a, b in zip(relations, same, strict=True))
        for side, (grad, factor) in enumerate(gradients):
            expected, row_factor = ops.mlkd_gradient(
                torch.from_numpy((student, teacher)[side]),
                *tensors(soft, relations[side], weight.astype(soft.dtype)), taus, side == 1,
                torch.from_numpy(mask),
            )  # fmt: skip
            assert equal(grad, expected.numpy())
            assert factor is None or equal(factor.astype(soft.dtype), row_factor.numpy())


@settings(deadline=None, max_examples=80)
@given(pairs(), st.integers(1, 3), st.booleans(), st.data())
def test_steps_of_mlkd_on_anything(pair, count, some, data):
    student, teacher = pair
    rows = len(student)
    mask = data.draw(row_options(rows))["mask"]
    chosen = (np.arange(n) % 2 if some else None for n in student.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        soft, kl, loss, _, gradients = mlkd(
            student, teacher, mask, [4.0, 0.5, 1.0][:count], np.ones(rows), *chosen,
            data.draw(st.sampled_from((1, 4))),
        )  # fmt: skip
    sound = ~unsound(student, teacher)
    assert not np.isnan(kl[sound | ~mask]).any() and not np.isnan(soft[:, :, sound]).any()
    if sound.all():
        assert np.isfinite(loss) and loss >= 0
    for grad, _ in gradients:
        assert not grad[~mask].any()
        assert not sound.all() or not np.isnan(grad).any()
