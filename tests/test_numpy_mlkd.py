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


def mlkd(student, teacher, mask, temperatures, weight, chosen, threads):
    """The steps of MLKD around NumPy's matrix products, and what each was given."""
    wide = kdnp_arrays.matrix(student), kdnp_arrays.matrix(teacher)
    soft, kl = native.mlkd_softmax(*wide, temperatures, mask, threads)
    p, d = soft[:, 0], soft[:, 1]
    turned = d.swapaxes(-1, -2)
    products = [p @ turned, d @ turned, p @ p.swapaxes(-1, -2)]
    near = (None, None, None) if chosen is None else (*products[:2], chosen.astype(soft.dtype))
    grams = native.mlkd_grams(*products, (0.3, 0.7), *near, threads)
    gradients = []
    for side, x in enumerate((student, teacher)):
        relations = np.ascontiguousarray(grams[1 + side][0] @ p + grams[1 + side][1] @ d)
        grad, factor = np.empty(x.shape, x.dtype), np.empty(len(x))
        half = x.dtype == np.float16
        native.mlkd_gradient(
            grad, soft, relations, kl, weight.astype(soft.dtype), temperatures, side == 1, mask,
            factor if half else None, threads,
        )  # fmt: skip
        gradients.append((relations, grad, factor if half else None))
    return soft, kl, products, near, grams, gradients


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("chosen", [None, np.arange(60) % 3 > 0])
def test_steps_of_mlkd_have_the_torch_operators_bits(dtype, chosen):
    torch = pytest.importorskip("torch")
    from kdkernels import backends

    if not backends.verdict("batchwise.mlkd_softmax", "cpu", "cpu").ok:
        pytest.skip("_C_cpu is not built")
    student, teacher = normal(60, 1100, dtype=dtype), normal(60, 1100, seed=1, dtype=dtype)
    mask, weight = normal(60, seed=2) > -2, np.abs(normal(60, seed=3))
    taus, ops = [4.0, 1.0], torch.ops.kdkernels

    def tensors(*arrays):
        return [None if x is None else torch.from_numpy(x) for x in arrays]

    for threads in (1, 3):
        soft, kl, products, near, grams, gradients = mlkd(
            student, teacher, mask, taus, weight, chosen, threads
        )
        wanted = ops.mlkd_softmax(*tensors(student, teacher), taus, torch.from_numpy(mask))
        assert equal(soft, wanted[0].numpy()) and equal(kl, wanted[1].numpy())
        loss, *matrices = ops.mlkd_grams(*tensors(*products), [0.3, 0.7], 3, None, *tensors(*near))
        assert equal(np.asarray(grams[0], soft.dtype), loss.numpy())
        for found, expected in zip(grams[1:], matrices, strict=True):
            assert found is None or equal(found, expected.numpy())
        for side, (relations, grad, factor) in enumerate(gradients):
            expected, row_factor = ops.mlkd_gradient(
                torch.from_numpy((student, teacher)[side]),
                *tensors(soft, relations, kl, weight.astype(soft.dtype)), taus, side == 1,
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
    chosen = np.arange(rows) % 2 if some else None
    with np.errstate(over="ignore", invalid="ignore"):
        soft, kl, _, _, grams, gradients = mlkd(
            student, teacher, mask, [4.0, 0.5, 1.0][:count], np.ones(rows), chosen,
            data.draw(st.sampled_from((1, 4))),
        )  # fmt: skip
    sound = ~unsound(student, teacher)
    assert not np.isnan(kl[sound | ~mask]).any() and not np.isnan(soft[:, :, sound]).any()
    if sound.all():
        assert np.isfinite(grams[0]) and grams[0] >= 0
    for _, grad, _ in gradients:
        assert not grad[~mask].any()
        assert not sound.all() or not np.isnan(grad).any()
