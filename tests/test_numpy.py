# SPDX-License-Identifier: Apache-2.0
"""The NumPy binding: no torch, the torch operator's bits, any array, and no crash on any values.

Runs without torch too, as under the sanitizers (tests/test_sanitizers.py).
"""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdkernels import divergences
from kdkernels import numpy as kdnp

native = pytest.importorskip("kdkernels._native")

INF, NAN = np.inf, np.nan
FLOATS = (np.float64, np.float32, np.float16)


def normal(*shape, seed=0, dtype=np.float32, scale=3.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(dtype)


def equal(a, b):
    """The same bits, NaNs and the signs of zeros included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_imports_no_torch():
    code = (
        "import sys, numpy as np; from kdkernels import numpy as kdnp; x = np.eye(3);"
        "kdnp.divergence(x, x + 1); kdnp.kd_loss(x, x, np.arange(3));"
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_header_agrees_with_python():
    assert native.kinds == len(divergences.KINDS)
    pytest.importorskip("torch")
    ops = pytest.importorskip("kdkernels.ops.rowwise")
    assert native.half_boost == ops.HALF_BOOST


# kd_loss beside the divergences: in torch's signature and in NumPy's it takes the labels.
NAMED = ("kl_div", "reverse_kl_div", "js_div", "tv_distance")
CALLS = (*divergences.DIVERGENCES, "kd_loss", "kd_loss of probabilities")


def arguments(call, shape, dtype):
    rows = shape[:-1]
    arrays = {
        "student": normal(*shape, dtype=dtype),
        "teacher": normal(*shape, seed=1, dtype=dtype),
        "row_weight": normal(*rows, seed=2, dtype=dtype),
        "temperature": np.exp(normal(*rows, seed=3, dtype=dtype, scale=0.3)),
        "teacher_temperature": np.exp(normal(*rows, seed=4, dtype=dtype, scale=0.3)),
    }
    classes = np.random.default_rng(5).integers(0, shape[-1], rows)
    extra = {"mask": normal(*rows, seed=6) > -2, "labels": classes}
    if call == "kd_loss of probabilities":
        extra["labels"] = np.eye(shape[-1], dtype=dtype)[classes]
    return arrays, extra, {"kind": call} if call in divergences.DIVERGENCES else {}


@pytest.mark.parametrize("dtype", FLOATS[:2])
@pytest.mark.parametrize("call", CALLS + NAMED)
def test_same_bits_as_the_torch_operator(call, dtype):
    torch = pytest.importorskip("torch")
    from kdkernels import backends, functional

    if not backends.verdict("rowwise", "cpu", "cpu").ok:
        pytest.skip("_C_cpu is not built")
    function = "divergence" if call in divergences.DIVERGENCES else call.partition(" ")[0]
    for shape, reduction in (((3, 4, 37), "batchmean"), ((2, 1500), "mean"), ((5, 10), "none")):
        arrays, extra, options = arguments(call, shape, dtype)
        options["reduction"] = reduction
        value, gradients = getattr(kdnp, function)(**arrays, **extra, **options)
        tensors = {k: torch.from_numpy(v).requires_grad_() for k, v in arrays.items()}
        extra = {k: torch.from_numpy(v) for k, v in extra.items()}
        wanted = getattr(functional, function)(**tensors, **extra, **options, backend="cpu")
        assert equal(value, wanted.detach().numpy())
        wanted.sum().backward()
        for name, gradient in zip(gradients._fields, gradients, strict=True):
            # Those per row stay float64 here; torch stores them in the logits' dtype.
            assert equal(gradient.astype(dtype), tensors[name].grad.numpy()), name


@pytest.mark.parametrize("dtype", FLOATS[:2])
@pytest.mark.parametrize("shape", [(1000, 100), (37, 3000), (3, 40000)])
def test_same_bits_for_any_number_of_threads(shape, dtype):
    arrays, extra, _ = arguments("kd_loss", shape, dtype)
    one, four = (kdnp.kd_loss(**arrays, **extra, threads=n) for n in (1, 4))
    assert all(equal(a, b) for a, b in zip((one[0], *one[1]), (four[0], *four[1]), strict=True))


def misaligned(x):
    """``x`` as a field of packed records: neither its address nor its strides suit its dtype."""
    records = np.zeros(x.shape, dtype=[("before", "i1"), ("x", x.dtype)])
    records["x"] = x
    return records["x"]


def spread_out(x):
    buffer = np.full(tuple(2 * n + 1 for n in x.shape), NAN, x.dtype)
    view = buffer[tuple(slice(1, 2 * n + 1, 2) for n in x.shape)]
    view[...] = x
    return view


LAYOUTS = {
    "contiguous": lambda x: x.copy(),
    "classes first": lambda x: np.asfortranarray(x),
    "every second": spread_out,
    "backwards": lambda x: x[..., ::-1].copy()[..., ::-1],
    "rows backwards": lambda x: x[::-1].copy()[::-1],
    "misaligned": misaligned,
    "unpickled": lambda x: pickle.loads(pickle.dumps(x)),  # has a dtype object of its own
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, dtype):
    arrays, extra, _ = arguments("kd_loss of probabilities", (3, 4, 37), dtype)
    wanted, gradients = kdnp.kd_loss(**arrays, **extra)
    laid_out = {k: LAYOUTS[layout](v) for k, v in (arrays | extra).items()}
    value, found = kdnp.kd_loss(**laid_out)
    assert all(np.array_equal(v, (arrays | extra)[k]) for k, v in laid_out.items())
    assert equal(value, wanted)
    assert all(equal(a, b) for a, b in zip(found, gradients, strict=True))


def test_repeated_rows_need_no_copy():
    row, teacher = normal(1, 37), normal(64, 37, seed=1)
    value, gradients = kdnp.divergence(np.broadcast_to(row, (64, 37)), teacher)
    wanted, _ = kdnp.divergence(np.repeat(row, 64, axis=0), teacher)
    assert equal(value, wanted) and gradients.student.shape == (64, 37)


def test_shapes_and_dtypes_of_the_results():
    x, half = normal(2, 3, 10), normal(2, 3, 10, dtype=np.float16)
    value, gradients = kdnp.divergence(x, half, reduction="none")
    assert value.shape == (2, 3) and value.dtype == np.float32
    assert gradients.student.dtype == np.float32 and gradients.teacher.dtype == np.float16
    assert gradients.temperature.shape == () and gradients.row_weight.shape == (2, 3)
    value, gradients = kdnp.divergence(x[0, 0], half[0, 0].astype(np.float64))  # one row
    assert value.shape == () and value.dtype == np.float64 and gradients.student.shape == (10,)
    value, gradients = kdnp.divergence(x[:0], half[:0], temperature=np.ones((0, 3)))  # none
    assert value == 0 and gradients.student.shape == gradients.teacher.shape == (0, 3, 10)


def test_a_shared_temperature_gets_the_sum_of_its_gradients():
    x, y = normal(4, 10), normal(4, 10, seed=1)
    shared = kdnp.divergence(x, y, temperature=2.0)
    given = kdnp.divergence(x, y, temperature=2.0, teacher_temperature=2.0)
    step = 1e-4
    wide = (x.astype(np.float64), y.astype(np.float64))
    up, down = (kdnp.divergence(*wide, temperature=2 + s)[0] for s in (step, -step))
    assert equal(shared[0], given[0])
    total = shared[1].temperature + shared[1].teacher_temperature
    assert total == pytest.approx((up - down) / (2 * step), rel=1e-4)


def test_half_precision_rounds_only_the_result():
    arrays, extra, _ = arguments("kd_loss", (6, 200), np.float16)
    value, gradients = kdnp.kd_loss(**arrays, **extra)
    wide = {k: v.astype(np.float32) for k, v in arrays.items()}
    wanted, wide_gradients = kdnp.kd_loss(**wide, **extra)
    assert equal(value, wanted)
    assert equal(gradients.student, wide_gradients.student.astype(np.float16))
    assert equal(gradients.teacher, wide_gradients.teacher.astype(np.float16))


def test_masked_rows_are_not_read():
    x, y, labels = normal(4, 10), normal(4, 10, seed=1), np.array([0, 3, 99, -100])
    wanted, gradients = kdnp.kd_loss(x[:2], y[:2], labels[:2])
    x[2:], y[3] = NAN, INF
    value, found = kdnp.kd_loss(x, y, labels, mask=np.array([True, True, False, True]))
    assert equal(value, wanted)
    assert equal(found.student[:2], gradients.student) and not found.student[2:].any()
    value, found = kdnp.kd_loss(x, y, labels, mask=np.zeros(4, bool))
    assert value == 0 and not any(g.any() for g in found)


S = np.zeros((4, 10), np.float32)
# (change to a valid call, exception, what the message says after the function's name)
BAD_CALLS = {
    "student is no array": ({"student": [[1.0]]}, TypeError, "student must be .* got list"),
    "student dtype": ({"student": S.astype(int)}, TypeError, "student must be .* got int64"),
    "byte order": ({"student": S.astype(">f4")}, TypeError, "student must be .* got >f4"),
    "teacher dtype": ({"teacher": S > 0}, TypeError, "teacher must be .* got bool"),
    "shapes": ({"teacher": S[:3]}, ValueError, r"shape \(4, 10\), got \(3, 10\)"),
    "0-d": (
        {"student": np.array(1.0), "teacher": np.array(1.0)},
        ValueError,
        r"student must have shape \(\.\.\., C\), C >= 1, got \(\)",
    ),
    "no classes": ({"student": S[:, :0], "teacher": S[:, :0]}, ValueError, r"got \(4, 0\)"),
    "scale": ({"scale": "t"}, ValueError, "scale must be one of t2, none, got 't'"),
    "reduction": ({"reduction": "avg"}, ValueError, "reduction must be one of .* got 'avg'"),
    "temperature": ({"temperature": 0.0}, ValueError, "temperature must be positive .* got 0.0"),
    "nan temperature": ({"temperature": NAN}, ValueError, "temperature must be .* got nan"),
    "temperature type": (
        {"temperature": "4"},
        TypeError,
        "temperature must be .* got <U1",
    ),
    "temperatures": (
        {"teacher_temperature": np.array([1.0, 2.0, -3.0, 4.0])},
        ValueError,
        "teacher_temperature must be positive and finite, got -3.0",
    ),
    "temperature shape": (
        {"temperature": np.ones(3)},
        ValueError,
        r"temperature must have one element or the shape of the rows \(4,\), got \(3,\)",
    ),
    "mask dtype": ({"mask": np.ones(4, int)}, TypeError, "mask must be bool, got int64"),
    "mask shape": ({"mask": np.ones(1, bool)}, ValueError, r"mask .* rows \(4,\), got \(1,\)"),
    "weight dtype": ({"row_weight": np.ones(4, int)}, TypeError, "row_weight .* got int64"),
    "weight shape": ({"row_weight": np.ones(3)}, ValueError, r"row_weight .* got \(3,\)"),
    "label range": ({"labels": np.array([0, 1, 10, 2])}, ValueError, r"in \[0, 10\) .* got 10"),
    "negative label": ({"labels": np.array([0, -1, 1, 2])}, ValueError, "labels must .* got -1"),
    "label shape": ({"labels": np.arange(3)}, ValueError, r"labels must .* got int64 .*\(3,\)"),
    "label dtype": ({"labels": np.ones(4)}, ValueError, r"labels must .* got float64 of"),
    "no labels": ({"labels": None}, TypeError, "labels must be an array, got None"),
    "smoothing": (
        {"label_smoothing": 1.5},
        ValueError,
        r"label_smoothing .* 1.0\], got 1.5",
    ),
    "alpha": ({"alpha": "1"}, TypeError, "alpha must be a number, got str"),
    "ignore_index": ({"ignore_index": 0.5}, TypeError, "ignore_index .* integer, got float"),
    "threads": ({"threads": 0}, ValueError, r"threads must be in \[1, 1024\], got 0"),
    "threads type": ({"threads": 2.0}, TypeError, "threads must be an integer, got float"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call(case):
    change, exception, message = BAD_CALLS[case]
    valid = {"student": S, "teacher": S, "labels": np.arange(4)}
    kdnp.kd_loss(**valid)
    with pytest.raises(exception, match=f"^kd_loss: .*{message}"):
        kdnp.kd_loss(**(valid | change))


def test_bad_kind():
    with pytest.raises(ValueError, match=r"^divergence: kind must be one of .* got 'kl'"):
        kdnp.divergence(S, S, kind="kl")
    with pytest.raises(ValueError, match=r"^divergence: kind='tv' takes no alpha, got 0.5"):
        kdnp.divergence(S, S, kind="tv", alpha=0.5)


@np.errstate(invalid="ignore", divide="ignore")
def forward_kl(student, teacher, temperature):
    """Per row, in float64, with the conventions for infinite logits."""
    s, t = (x.astype(np.float64) / temperature for x in (student, teacher))
    log_s, log_t = (x - x.max(-1, keepdims=True) for x in (s, t))  # NaN where there is no maximum
    log_s, log_t = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_s, log_t))
    mass = np.exp(log_t)
    terms = mass * np.where(mass < 1e-307, 0, log_t - log_s)  # underflowed: no mass
    return temperature**2 * terms.sum(-1)


@st.composite
def logits(draw, rows, classes, base=None):
    """A matrix of some dtype, scale and layout, extremes strewn in; near ``base`` if it is given.

    Scales: 0, all equal; 1e-3, near the other side's; 30, log-ratios on both sides of the kernels'
    fp32 range; 1e4, one class takes all.
    """
    dtype = draw(st.sampled_from(FLOATS))
    scale = draw(st.sampled_from((0.0, 1e-3, 1.0, 30.0, 1e4)))
    x = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).normal(size=(rows, classes)) * scale
    x = np.clip(x if base is None else x + base.astype(np.float64), -6e4, 6e4)
    if rows:
        places = st.tuples(st.integers(0, rows - 1), st.integers(0, classes - 1))
        extremes = st.sampled_from((-INF, -INF, -INF, INF, NAN, 1e4, -1e4))
        for place, value in draw(st.lists(st.tuples(places, extremes), max_size=3)):
            x[place] = value
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x.astype(dtype))


@st.composite
def pairs(draw):
    rows = draw(st.integers(0, 5))
    # Below, at and past a vector of every width; past a block, with and without a rest.
    classes = draw(st.one_of(st.integers(1, 40), st.sampled_from((1024, 1025, 2100))))
    teacher = draw(logits(rows, classes))
    near = draw(st.booleans())
    finite = np.where(np.isfinite(teacher), teacher, -INF if near else 0)
    return draw(logits(rows, classes, finite if near else None)), teacher


def sums_to_zero(gradient, terms=0.0):
    """Every row, to the rounding of its dtype and of ``terms``, the size of what it is made of."""
    limits = np.finfo(gradient.dtype)
    size = np.abs(gradient.astype(np.float64)).sum(-1) + terms
    room = {2: 1, 4: 40, 8: 4000}[gradient.itemsize] * limits.eps * size
    with np.errstate(invalid="ignore"):  # inf - inf
        sums = gradient.astype(np.float64).sum(-1)
    finite = np.isfinite(sums) & np.isfinite(room)
    allowed = room + gradient.shape[-1] * limits.smallest_subnormal
    return (np.abs(sums) <= allowed)[finite].all()


@settings(deadline=None, max_examples=200)
@given(pairs(), st.sampled_from((0.5, 1.0, 4.0)), st.data())
def test_forward_kl_of_anything(pair, temperature, data):
    student, teacher = pair
    rows = len(student)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), bool)
    value, gradients = kdnp.divergence(
        student, teacher, temperature=temperature, reduction="none", mask=mask
    )
    wanted = forward_kl(student, teacher, temperature)
    wanted[~mask] = 0
    assert np.array_equal(np.isnan(value), np.isnan(wanted))
    assert np.array_equal(value == INF, wanted == INF)
    assert not (value < 0).any()
    finite = np.isfinite(wanted)
    # The formula itself cancels: its absolute error is that of logarithms of up to 1e5.
    relative = 1e-9 if value.dtype == np.float64 else 1e-5
    assert np.allclose(value[finite], wanted[finite], rtol=relative, atol=1e-9)
    assert not gradients.student[~mask].any() and not gradients.teacher[~mask].any()
    # In float64, where rows beyond fp32's range go too, logarithms are subtracted plainly.
    terms = temperature * (1.0 if value.dtype == np.float64 else 1e-8)
    assert sums_to_zero(gradients.student, terms)
    assert sums_to_zero(gradients.teacher, terms + 2 * value)


@settings(deadline=None, max_examples=200)
@given(pairs(), st.sampled_from(CALLS), st.data())
def test_any_loss_of_anything(pair, call, data):
    student, teacher = pair
    rows, classes = student.shape
    options = {
        "temperature": data.draw(st.sampled_from((0.5, 1.0, 4.0))),
        "teacher_temperature": data.draw(st.sampled_from((None, 0.5, 2.0))),
        "scale": data.draw(st.sampled_from(divergences.SCALES)),
        "threads": data.draw(st.sampled_from((1, 4))),
    }
    with np.errstate(over="ignore"):  # gradients beyond fp16
        if call in divergences.DIVERGENCES:
            value, gradients = kdnp.divergence(
                student, teacher, kind=call, reduction="none", **options
            )
        else:
            labels = np.arange(rows) % classes
            if call != "kd_loss":
                labels = np.eye(classes, dtype=student.dtype)[labels]
            value, gradients = kdnp.kd_loss(
                student, teacher, labels, label_smoothing=0.1, reduction="none", **options
            )
    bad = [np.isnan(x) | (x == INF) for x in (student, teacher)]
    dead = [(x == -INF).all(-1) for x in (student, teacher)]
    nan = bad[0].any(-1) | bad[1].any(-1) | dead[0] | dead[1]
    assert np.array_equal(np.isnan(value), nan)
    assert not (value < 0).any()
    terms = 16 * (1 + value)  # these sum to zero by a subtraction of their mean
    assert sums_to_zero(gradients.student, terms) and sums_to_zero(gradients.teacher, terms)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(0, 5), st.integers(1, 40), st.integers(1, 3)),
    st.sampled_from([np.float64, np.float32]),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([1, 4]),
    st.integers(0, 2**16),
)
def test_class_attention(sizes, dtype, gone, threads, seed):
    """Against the formula, for any number of classes, some of which take no part."""
    rows, classes, heads = sizes
    random = np.random.default_rng(seed)
    teacher = random.normal(size=(rows, 2 * classes))[:, ::2].astype(dtype)
    off = random.random(teacher.shape) < gone
    teacher[off] = -INF
    scores = random.normal(size=(heads, classes + 1, classes + 1)).astype(dtype)
    values = random.normal(size=(heads, classes + 1)).astype(dtype)
    upstream = random.normal(size=teacher.shape).astype(dtype)
    out, gradients = kdnp.class_attention(
        teacher, scores, values, upstream, temperature=2.0, threads=threads
    )
    alone, _ = kdnp.class_attention(teacher, scores, values, temperature=2.0)
    assert np.array_equal(out, alone)
    assert np.array_equal(out == -INF, off)
    assert all(np.isfinite(x).all() for x in gradients)
    assert not gradients.teacher[off].any()
    for z, on, result in zip(teacher.astype(float), ~off, out, strict=True):
        if not on.any():
            continue
        token = np.append(np.eye(classes), z[:, None] / 2, 1)[on]
        wanted = z[on].copy()
        for score, value in zip(scores.astype(float), values.astype(float), strict=True):
            e = token @ score @ token.T
            p = np.exp(e - e.max(-1, keepdims=True))
            wanted += 2 * (p / p.sum(-1, keepdims=True)) @ token @ value
        assert np.allclose(
            result[on], wanted, rtol=1e-4, atol=1e-4 if dtype == np.float32 else 1e-9
        )
