# SPDX-License-Identifier: Apache-2.0
"""Relations, contrast and positions of maps on NumPy arrays: torch's results, any arrays.

As tests/test_numpy.py, which has the helpers, it runs under the sanitizers too.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_numpy import FLOATS, equal, logits, misaligned, normal

from kdkernels import numpy as kdnp


def maps(first, second):
    return lambda dtype: [normal(*s, seed=i, dtype=dtype, scale=1.0)
                          for i, s in enumerate((first, second))]  # fmt: skip


def unit_rows(n, width, seed):
    x = normal(n, width, seed=seed, dtype=np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def contrast(samples, width, count, n):
    def make(dtype):
        wide = np.float64 if dtype == np.float64 else np.float32
        embeddings = [unit_rows(samples, width, seed).astype(dtype) for seed in (0, 1)]
        banks = [unit_rows(n, width, seed).astype(wide) for seed in (2, 3)]
        random = np.random.default_rng(4)
        index, negatives = random.integers(0, n, samples), random.integers(0, n, (samples, count))
        return [*embeddings, *banks, index, negatives, (0.9 * n, 1.2 * n)]

    return make


EMBEDDINGS = (
    maps((9, 33), (9, 50)),
    maps((70, 5), (70, 3)),
    maps((1, 4), (1, 4)),
    maps((0, 4), (0, 2)),
)
ALIKE = maps((9, 33), (9, 33)), maps((3, 2100), (3, 2100)), maps((1, 4), (1, 4))
PLANES = (
    maps((2, 5, 7, 7), (2, 5, 7, 7)),
    maps((1, 3, 1, 1), (1, 3, 1, 1)),
    maps((3, 70, 5, 9), (3, 70, 5, 9)),
)
UNLIKE = (
    maps((2, 5, 7, 6), (2, 9, 7, 6)),
    maps((1, 40, 2, 2), (1, 3, 2, 2)),
    maps((0, 3, 4, 4), (0, 2, 4, 4)),
)
CONTRASTS = (
    contrast(5, 16, 40, 30),
    contrast(3, 7, 2, 900),
    contrast(2, 600, 300, 20),
    contrast(0, 4, 3, 9),
)
BATCHES = UNLIKE[0], UNLIKE[2], *EMBEDDINGS[:2]  # of one sample the loss is a constant
# Function, its options, inputs, and whether it is one operator in torch, so has the same bits.
CALLS = [
    ("rkd_loss", {}, EMBEDDINGS, True),
    ("rkd_loss", {"angle_weight": 0.0, "squared": True}, EMBEDDINGS, True),
    ("rkd_loss", {"distance_weight": 0.0, "reduction": "sum"}, EMBEDDINGS, True),
    ("pkt_loss", {}, EMBEDDINGS, True),
    ("cc_loss", {}, EMBEDDINGS, True),
    ("cc_loss", {"kernel": "bilinear", "compat": "torchdistill"}, EMBEDDINGS, True),
    ("cc_loss", {"compat": "repdistiller", "reduction": "sum"}, ALIKE, True),
    ("sp_loss", {}, BATCHES, False),
    ("sp_loss", {"compat": "torchdistill"}, BATCHES, False),
    ("ickd_loss", {}, PLANES, False),
    ("nst_loss", {}, UNLIKE, False),
    ("attention_transfer", {}, UNLIKE, True),
    ("attention_transfer", {"power": 3, "compat": "torchdistill"}, PLANES, True),
    ("ft_loss", {"reduction": "sum"}, UNLIKE, True),
    ("ft_loss", {"distance_power": 2, "power": 1}, UNLIKE, True),
    ("hcl_loss", {}, PLANES, True),
    ("hcl_loss", {"levels": [3, 5, 1], "reduction": "sum"}, PLANES, True),
    ("crd_loss", {}, CONTRASTS, True),
]  # fmt: skip
every = pytest.mark.parametrize(
    ("function", "options", "make", "same"),
    [
        pytest.param(function, options, make, same, id=f"{function}-{i}-{k}")
        for i, (function, options, makes, same) in enumerate(CALLS)
        for k, make in enumerate(makes)
    ],
)
dtypes = pytest.mark.parametrize("dtype", FLOATS)


def results(function, given, options, threads=1):
    with np.errstate(over="ignore"):  # gradients beyond fp16
        loss, gradients = getattr(kdnp, function)(*given, **options, threads=threads)
    return loss, *gradients[:2]


@dtypes
@every
def test_what_torch_computes(function, options, make, same, dtype):
    torch = pytest.importorskip("torch")
    from kdkernels import backends, functional

    if not backends.verdict("relation.rkd", "cpu", "cpu").ok:
        pytest.skip("_C_cpu is not built")
    given = make(dtype)
    found = results(function, given, options, threads=3)
    tensors = [torch.as_tensor(x) for x in given]
    for x in tensors[:2]:
        x.requires_grad_()
    if function == "crd_loss":
        options = options | {"normalize": False}
    loss = getattr(functional, function)(*tensors, **options, backend="cpu")
    wanted = [loss.detach(), *torch.autograd.grad(loss, tensors[:2])]
    for a, b in zip(found, wanted, strict=True):
        if same:
            assert equal(a, b.numpy())
        else:  # its products are torch's
            tight = {np.float64: 1e-12, np.float32: 1e-5, np.float16: 2e-3}[a.dtype.type]
            scale = np.abs(b.numpy()).max(initial=0)
            np.testing.assert_allclose(a, b.numpy(), rtol=tight, atol=tight * scale)


@dtypes
@every
def test_any_layout_and_any_number_of_threads(function, options, make, same, dtype):
    given = make(dtype)
    expected = results(function, given, options)
    rest = given[2:]
    for layout, threads in (
        (lambda x: x, 5),
        (lambda x: np.repeat(x, 2, axis=-1)[..., ::2], 1),
        (misaligned, 2),
    ):
        found = results(function, [*map(layout, given[:2]), *rest], options, threads)
        assert all(equal(a, b) for a, b in zip(found, expected, strict=True))


@dtypes
@pytest.mark.parametrize("make", [*PLANES, maps((2, 64, 9, 8), (2, 64, 9, 8))])
@pytest.mark.parametrize("function", ["attention_transfer", "hcl_loss"])
def test_channels_last_where_they_lie(function, make, dtype):
    given = make(dtype)
    expected = results(function, given, {})
    last = [np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for x in given]
    found = results(function, last, {})
    tight = {np.float64: 1e-12, np.float32: 1e-5, np.float16: 2e-3}[dtype]
    for a, b, x in zip(found, expected, (given[0].reshape(-1)[0], *last), strict=True):
        np.testing.assert_allclose(a, b, rtol=tight, atol=1e-7)
        assert a.strides == x.strides or not a.ndim or 1 in x.shape


@settings(deadline=None, max_examples=120)
@given(st.integers(0, 9), st.integers(1, 40), st.sampled_from(CALLS[:7]), st.data())
def test_any_relation_of_anything(rows, width, call, data):
    function, options, _, _ = call
    other = width if "repdistiller" in options.values() else data.draw(st.integers(1, 40))
    student, teacher = (data.draw(logits(rows, n)) for n in (width, other))
    with np.errstate(all="ignore"):
        loss, *gradients = results(function, (student, teacher), options)
    sound = np.isfinite(student).all() and np.isfinite(teacher).all()
    sound = sound and max(np.abs(x).max(initial=0) for x in (student, teacher)) < 1e4
    assert not sound or np.isfinite(loss)
    assert not sound or all(not np.isnan(x).any() for x in gradients)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9), st.data())
def test_any_maps(samples, channels, height, width, data):
    kinds = ("attention_transfer", "ft_loss", "hcl_loss", "sp_loss", "ickd_loss", "nst_loss")
    function, last = data.draw(st.sampled_from(kinds)), data.draw(st.booleans())
    options = {}
    if function == "hcl_loss":
        options["levels"] = data.draw(st.lists(st.integers(1, 9), max_size=4))
    sides = []
    for _ in range(2):
        flat = data.draw(logits(samples * channels, height * width))
        shape = (samples, height, width, channels) if last else (samples, channels, height, width)
        side = flat.reshape(shape)
        sides.append(side.transpose(0, 3, 1, 2) if last else side)
    with np.errstate(all="ignore"):
        loss, *gradients = results(function, sides, options, data.draw(st.sampled_from((1, 4))))
    if all(np.isfinite(x).all() and np.abs(x).max(initial=0) < 1e4 for x in sides):
        assert np.isfinite(loss)
        assert not any(np.isnan(x).any() for x in gradients)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 5), st.integers(1, 40), st.integers(1, 30), st.integers(1, 50), st.data())
def test_contrast_of_anything(samples, width, count, n, data):
    given = contrast(samples, width, count, n)(data.draw(st.sampled_from(FLOATS)))
    given[0] = data.draw(logits(samples, width)).astype(given[0].dtype)
    negatives = np.sort(given[5], axis=1) if data.draw(st.booleans()) else given[5]
    given[5] = negatives.astype(data.draw(st.sampled_from((np.int64, np.int32))))
    wrong = data.draw(st.sampled_from((-1, n))) if data.draw(st.booleans()) and samples else None
    if wrong is not None:
        chosen = given[data.draw(st.sampled_from((4, 5)))]
        chosen.reshape(-1)[data.draw(st.integers(0, chosen.size - 1))] = wrong
        with pytest.raises(ValueError, match="crd_loss: index and negatives must be in"):
            results("crd_loss", given, {})
        return
    with np.errstate(all="ignore"):
        loss, *gradients = results("crd_loss", given, {}, data.draw(st.sampled_from((1, 4))))
    if np.isfinite(given[0]).all():
        assert np.isfinite(loss) and not any(np.isnan(x).any() for x in gradients)


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.integers(-3, 3), min_size=1, max_size=150), st.integers(0, 5),
    st.integers(1, 400), st.sampled_from((np.int64, np.int32)), st.sampled_from((1, 4)),
)  # fmt: skip
def test_negatives_of_anything(labels, samples, count, dtype, threads):
    labels, random = np.array(labels), np.random.default_rng(0)
    index = random.integers(0, len(labels), samples)
    if samples and len(set(labels)) == 1:
        with pytest.raises(ValueError, match="labels must be of more than one class"):
            kdnp.sample_negatives(labels, index, count, random=random)
        return
    drawn = kdnp.sample_negatives(labels, index, count, random=random, dtype=dtype, threads=threads)
    assert drawn.dtype == dtype
    for row, own in zip(drawn, labels[index], strict=True):
        others = np.flatnonzero(labels != own)
        often = np.bincount(row, minlength=len(labels))
        assert often.sum() == often[others].sum() == count and (np.diff(row) >= 0).all()
        assert np.ptp(often[others]) <= 1


def test_errors():
    x, planes = normal(4, 3), normal(2, 3, 4, 4)
    bank, index = normal(9, 3), np.zeros(4, int)
    negatives = np.zeros((4, 2), int)
    crd = (x, x, bank, bank, index, negatives, (1.0, 1.0))

    def changed(i, value):
        return (*crd[:i], value, *crd[i + 1 :])

    for call, error, message in (
        (lambda: kdnp.rkd_loss(x, x[:2]), ValueError, r"rkd_loss: .* \(4, 3\) in dimension 0, got"),
        (lambda: kdnp.rkd_loss(planes, planes), ValueError, r"student must have shape \(B, D\)"),
        (lambda: kdnp.rkd_loss(x, x, squared=1), TypeError, "squared must be a bool"),
        (lambda: kdnp.pkt_loss(x, x, eps=0.0), ValueError, "eps must be in"),
        (lambda: kdnp.cc_loss(x, x, order=16), ValueError, "order must be in"),
        (lambda: kdnp.cc_loss(x, x[:, :2], compat="repdistiller"), ValueError, "teacher must have"),
        (lambda: kdnp.sp_loss(x, x, reduction="none"), ValueError, "reduction must be"),
        (lambda: kdnp.ickd_loss(planes, planes[:, :2]), ValueError, "teacher must have"),
        (lambda: kdnp.nst_loss(planes, planes[..., :2]), ValueError, "teacher must have"),
        (lambda: kdnp.nst_loss(planes, None), TypeError, "teacher must be a float64"),
        (lambda: kdnp.attention_transfer(planes, planes, power=0), ValueError, "power must be"),
        (lambda: kdnp.ft_loss(planes, planes, distance_power=3), ValueError, "distance_power must"),
        (lambda: kdnp.ft_loss(x, x), ValueError, r"must have shape \(B, C, H, W\)"),
        (lambda: kdnp.hcl_loss(planes, planes, levels=[0]), ValueError, "levels must be"),
        (lambda: kdnp.hcl_loss(planes, planes[:, :1]), ValueError, "teacher must have"),
        (lambda: kdnp.crd_loss(*crd, temperature=0.0), ValueError, "temperature must be positive"),
        (lambda: kdnp.crd_loss(*changed(2, bank[:3])), ValueError, "student_bank must have shape"),
        (lambda: kdnp.crd_loss(*changed(4, index[:3])), ValueError, "index must be integers"),
        (lambda: kdnp.crd_loss(*changed(5, negatives + 9)), ValueError, "must be in"),
        (lambda: kdnp.crd_loss(*crd, threads=0), ValueError, "threads must be"),
        (lambda: kdnp.sample_negatives(bank, index, 2), ValueError, "labels must be integers"),
        (lambda: kdnp.sample_negatives(index, index + 4, 2), ValueError, "index must be in"),
        (lambda: kdnp.sample_negatives(index, index, 0), ValueError, "num_negatives must be at"),
        (lambda: kdnp.sample_negatives(index, index, 2, dtype=float), TypeError, "dtype must be"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()
