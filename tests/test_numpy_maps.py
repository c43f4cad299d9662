# SPDX-License-Identifier: Apache-2.0
"""Losses over maps on NumPy arrays: torch's bits, any array; as tests/test_numpy.py, sanitized."""

from __future__ import annotations

import numpy as np
import pytest
from test_numpy import FLOATS, equal, normal

from kdkernels import numpy as kdnp

SHAPES = [(2, 3, 4, 4), (2, 5, 7, 7), (1, 2, 130, 131), (3, 70), (0, 3, 2, 2), (1, 1, 1)]
NAMES = ("fitnet_loss", "masked_mse", "ofd_loss", "ofd_loss, no margin", "ab_loss", "vid_loss")


def example(name, shape, dtype):
    """The maps, and a margin, a variance or a mask."""
    maps = [normal(*shape, seed=seed, dtype=dtype) for seed in (0, 1)]
    wide = np.float64 if dtype == np.float64 else np.float32
    numbers = 0.1 + np.abs(normal(shape[1], seed=2)).astype(wide)
    if name == "ofd_loss":
        return [*maps, -numbers]
    if name == "vid_loss":
        return [*maps, numbers]
    if name == "masked_mse":
        return [*maps, normal(*shape[:1], 1, *shape[2:], seed=3).astype(wide)]
    return maps


def call(name, given, **options):
    return getattr(kdnp, name.partition(",")[0])(*given, **options)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_bits_of_the_torch_operator(name, shape, dtype):
    torch = pytest.importorskip("torch")
    from kdkernels import backends
    from kdkernels import functional as kd

    if not backends.verdict("maps.elementwise", "cpu", "cpu").ok:
        pytest.skip("_C_cpu is not built")
    given = example(name, shape, dtype)
    loss, gradients = call(name, given, threads=3)
    tensors = [torch.from_numpy(x) for x in given]
    for x in tensors[: 1 if name == "ab_loss" else 2]:
        x.requires_grad_()
    if name in ("ofd_loss", "vid_loss"):
        tensors[2].requires_grad_()
    if name == "vid_loss":
        tensors.insert(2, None)
    value = getattr(kd, name.partition(",")[0])(*tensors, backend="cpu")
    # Of VID a part is torch's.
    tight = {"rtol": 2e-3, "atol": 1e-7} if name == "vid_loss" else {"rtol": 0, "atol": 0}
    np.testing.assert_allclose(loss, value.item(), **tight)
    leaves = [x for x in tensors if x is not None and x.requires_grad]
    for leaf, gradient in zip(leaves, torch.autograd.grad(value, leaves), strict=True):
        ours = gradients[[x is leaf for x in tensors if x is not None].index(True)]
        if leaf.shape != gradients.student.shape:
            ours = ours.astype(given[2].dtype)
        np.testing.assert_allclose(ours, gradient.numpy(), **tight)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 33, 40, 41)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_layout_and_any_number_of_threads(name, shape, dtype):
    given = example(name, shape, dtype)
    expected = call(name, given)
    strided = [np.repeat(x, 2, axis=-1)[..., ::2] for x in given[:2]] + given[2:]
    turned = [np.asfortranarray(x) for x in given]
    for other, threads in ((given, 5), (strided, 1), (turned, 2)):
        found = call(name, other, threads=threads)
        assert equal(found[0], expected[0])
        for a, b in zip(found[1], expected[1], strict=True):
            assert (a is None and b is None) or equal(a, b)


def test_errors():
    maps = [normal(2, 3, 4, 4, seed=seed) for seed in (0, 1)]
    for make, error, message in (
        (lambda: kdnp.fitnet_loss(maps[0], maps[1][:1]), ValueError, "must have one shape"),
        (lambda: kdnp.fitnet_loss(maps[0], None), TypeError, "teacher must be"),
        (lambda: kdnp.fitnet_loss(*maps, reduction="none"), ValueError, "reduction must be"),
        (lambda: kdnp.fitnet_loss(*maps, threads=0), ValueError, "threads must be"),
        (lambda: kdnp.ofd_loss(*maps, np.ones(2)), ValueError, "margin must be"),
        (lambda: kdnp.masked_mse(*maps, np.ones((2, 3))), ValueError, "mask must be"),
        (lambda: kdnp.ab_loss(*maps, margin=-1.0), ValueError, "margin must be"),
        (lambda: kdnp.ab_loss(*maps, compat="none"), ValueError, "compat must be"),
    ):
        with pytest.raises(error, match=message):
            make()
