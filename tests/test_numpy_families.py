# SPDX-License-Identifier: Apache-2.0
"""The NumPy binding beyond plain divergences: the torch operators' bits, any array, and errors.

As tests/test_numpy.py, which has the helpers, it runs under the sanitizers too.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from test_numpy import FLOATS, INF, LAYOUTS, NAN, equal, normal

from kdkernels import numpy as kdnp
from kdkernels.numpy import arrays as kdnp_arrays

# (function, options); class_range (m, n) leaves m classes in front.
LABELLED = {
    "kd_loss, standardized": ("kd_loss", {"standardize": True}),
    "kd_loss of a range": ("kd_loss", {"class_range": (2, 9)}),
    "dkd_loss": ("dkd_loss", {"ce_weight": 1.0, "label_smoothing": 0.1}),
    "dkd_loss, standardized": ("dkd_loss", {"standardize": True, "warmup": 0.5}),
    "dkd_loss of a range": ("dkd_loss", {"class_range": (2, 9)}),
    "nkd_loss": ("nkd_loss", {"ce_weight": 1.0}),
    "nkd_loss of a range": ("nkd_loss", {"class_range": (2, 9), "standardize": True}),
    "ats_loss": ("ats_loss", {}),
    "ats_loss of a range": ("ats_loss", {"class_range": (2, 9)}),
    "wsld_loss": ("wsld_loss", {"ce_weight": 0.5}),
    "wsld_loss, standardized": ("wsld_loss", {"standardize": True, "class_range": (2, 9)}),
}
PLAIN = {
    "standardized": ("divergence", {"kind": "js", "standardize": True}),
    "of a range": ("divergence", {"kind": "reverse_kl", "class_range": (2, 9)}),
    "narrow teacher": ("divergence", {"kind": "ab", "class_range": (2, 9)}),
}
TEACHERS = {
    "teachers": ("multi_teacher_kl_div", {}),
    "teachers with labels": ("multi_teacher_kl_div", {"ce_weight": 0.5, "label_smoothing": 0.1}),
    "mixture": ("multi_teacher_kl_div", {"form": "mixture"}),
}
TOPK = {
    "top-k": ("topk_divergence", {}),
    "top-k with logsumexp": ("topk_divergence", {"kind": "reverse_kl", "values": "logits"}),
    "top-k, zero": ("topk_divergence", {"kind": "js", "missing": "zero"}),
    "top-k, renormalized": ("topk_divergence", {"kind": "tv", "missing": "renormalize"}),
}
DIST = {
    "dist": ("dist_loss", {"beta": 0.5}),
    "dist, clamped": ("dist_loss", {"compat": "torchdistill", "scale": "none"}),
}
CASES = LABELLED | PLAIN | TEACHERS | TOPK | DIST
BY_ROW = CASES.keys() - DIST.keys()


def example(case, shape, dtype):
    """What is differentiated to, and the other arguments."""
    _, options = CASES[case]
    rows, classes = shape[:-1], shape[-1]
    first, last = options.get("class_range", (0, classes))
    labels = np.random.default_rng(5).integers(first, last, rows)
    others = options | {"mask": normal(*rows, seed=6) > -2, "labels": labels}
    arrays = {"student": normal(*shape, dtype=dtype)}
    if case in TOPK:
        k = min(5, classes)
        teacher = normal(*shape, seed=1, dtype=dtype)
        indices = np.argsort(-teacher)[..., :k]
        values = np.take_along_axis(teacher, indices, -1)
        total = np.log(np.exp(teacher.astype(float)).sum(-1))
        others["topk_indices"] = indices
        if options.get("values") == "logits":
            arrays["teacher_logsumexp"] = (total + 1).astype(dtype)
        else:
            values = values - total[..., None]
        arrays["topk_values"] = values.astype(dtype)
    elif case in TEACHERS:
        arrays["teachers"] = normal(3, *shape, seed=1, dtype=dtype)
        arrays["weights"] = np.abs(normal(3, *rows, seed=7, dtype=dtype))
    else:
        width = last - first if case == "narrow teacher" else classes
        arrays["teacher"] = normal(*rows, width, seed=1, dtype=dtype)
    if case in DIST:
        return arrays | {"temperature": np.array([2.0], dtype)}, others
    arrays["row_weight"] = normal(*rows, seed=2, dtype=dtype)
    for argument, seed in (("temperature", 3), ("teacher_temperature", 4)):
        arrays[argument] = np.exp(normal(*rows, seed=seed, dtype=dtype, scale=0.3))
    return arrays, others


def call(case, arrays, others, **options):
    return getattr(kdnp, CASES[case][0])(**arrays, **others, **options)


@pytest.mark.parametrize("dtype", FLOATS[:2])
@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_the_torch_operator(case, dtype):
    torch = pytest.importorskip("torch")
    from kdkernels import backends, functional

    if not backends.verdict("rowwise", "cpu", "cpu").ok:
        pytest.skip("_C_cpu is not built")
    for shape, reduction in (((3, 4, 37), "batchmean"), ((60, 1100), "mean"), ((5, 10), "none")):
        arrays, others = example(case, shape, dtype)
        reduced = {"reduction": reduction} if case in BY_ROW else {}
        value, gradients = call(case, arrays, others, **reduced, threads=3)
        tensors = {k: torch.from_numpy(v).requires_grad_() for k, v in arrays.items()}
        fixed = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v
                 for k, v in others.items()}  # fmt: skip
        function = getattr(functional, CASES[case][0])
        wanted = function(**tensors, **fixed, **reduced, backend="cpu")
        assert equal(value, wanted.detach().numpy())
        wanted.sum().backward()
        for name, gradient in gradients._asdict().items():
            if name not in tensors:
                continue
            found, expected = gradient.astype(dtype), tensors[name].grad.numpy()
            if (case, name) == ("mixture", "weights"):  # through their sum, in torch's order
                room = 1e-5 if dtype == np.float32 else 1e-12
                assert np.allclose(found, expected, rtol=room, atol=room)
            else:
                assert equal(found, expected), name


@pytest.mark.parametrize("case", CASES)
def test_same_bits_for_any_number_of_threads(case):
    arrays, others = example(case, (100, 700), np.float32)
    one, three = (call(case, arrays, others, threads=n) for n in (1, 3))
    assert all(equal(a, b) for a, b in zip((one[0], *one[1]), (three[0], *three[1]), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_any_layout(case, layout):
    arrays, others = example(case, (6, 12), np.float32)
    laid_out = {k: LAYOUTS[layout](v) for k, v in arrays.items()}
    wanted, found = call(case, arrays, others), call(case, laid_out, others)
    assert equal(wanted[0], found[0])
    assert all(equal(a, b) for a, b in zip(wanted[1], found[1], strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_own_half_gradients(case, monkeypatch):
    """The functions widen fp16, so as to round once; the kernels' factors are torch's business."""
    arrays, others = example(case, (6, 1100), np.float16)
    wide = call(case, arrays, others)
    monkeypatch.setattr(kdnp_arrays, "widened", lambda x: x)
    half = call(case, arrays, others)
    assert equal(wide[0], half[0])
    assert all(np.isfinite(x).all() for x in half[1])
    assert (half[1].student != 0).mean() > 0.5 * (wide[1].student != 0).mean()


@pytest.mark.parametrize("case", CASES)
def test_masked_rows_are_not_read(case):
    arrays, others = example(case, (6, 12), np.float32)
    others["mask"] = np.arange(6) < 4
    wanted, gradients = call(case, arrays, others)
    arrays["student"][4:], others["labels"][4:] = NAN, 99
    if case in TOPK:
        others["topk_indices"][4:] = -7
    value, found = call(case, arrays, others)
    assert equal(value, wanted)
    assert equal(found.student, gradients.student) and not found.student[4:].any()


@pytest.mark.parametrize("case", CASES)
def test_every_result_is_written(case, monkeypatch):
    """Whatever lay in the memory that results are written to, and in rows that do not count."""
    arrays, others = example(case, (6, 40), np.float32)
    wanted = call(case, arrays, others)
    monkeypatch.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, 77, dtype))
    found = call(case, arrays, others)
    assert equal(wanted[0], found[0])
    assert all(equal(a, b) for a, b in zip(wanted[1], found[1], strict=True))


def test_parts_make_up_the_loss():
    arrays, others = example("dkd_loss", (6, 12), np.float64)
    others |= {"ce_weight": 0.0}
    for reduction in ("batchmean", "none"):
        parts, gradients = kdnp.dkd_loss(
            **arrays, **others, reduction=reduction, alpha=2.0, beta=3.0, return_parts=True
        )
        loss, wanted = kdnp.dkd_loss(**arrays, **others, reduction=reduction, alpha=2.0, beta=3.0)
        assert equal(parts.loss, loss) and equal(gradients.student, wanted.student)
        assert np.allclose(2 * parts.target + 3 * parts.non_target, loss)
    parts, _ = kdnp.nkd_loss(**arrays, **others, gamma=3.0, return_parts=True)
    assert np.allclose(parts.target + 3 * parts.non_target, parts.loss)


def test_weights_by_teacher_get_the_sum_over_rows():
    arrays, others = example("mixture", (6, 12), np.float64)
    weights = arrays.pop("weights")[:, 0]
    _, gradients = kdnp.multi_teacher_kl_div(**arrays, **others, weights=weights)
    step = 1e-6 * np.array([1, 0, 0])
    up, down = (
        kdnp.multi_teacher_kl_div(**arrays, **others, weights=weights + s)[0] for s in (step, -step)
    )
    assert gradients.weights.shape == (3,)
    assert gradients.weights[0] == pytest.approx((up - down) / 2e-6, rel=1e-5)


def test_no_rows():
    for case in CASES:
        arrays, others = example(case, (4, 12), np.float32)
        empty = {k: v[:, :0] if k in ("teachers", "weights") else v if v.size == 1 else v[:0]
                 for k, v in arrays.items()}  # fmt: skip
        none = {k: v[:0] if isinstance(v, np.ndarray) else v for k, v in others.items()}
        value, gradients = call(case, empty, none)
        assert value == 0 and gradients.student.shape == (0, 12)


S, L = np.zeros((4, 10), np.float32), np.arange(4)
I = np.tile(np.arange(3), (4, 1))  # noqa: E741
WEIGHTS = np.ones(2)
# (function, what is changed in a valid call, exception, what the message says after the name)
BAD_CALLS = [
    ("kd_loss", {"temperatur": 1.0}, TypeError, "unexpected keyword argument 'temperatur'"),
    ("kd_loss", {"inplace": True}, TypeError, "unexpected keyword argument 'inplace'; .* threads"),
    ("topk_divergence", {"standardize": True}, TypeError, "argument 'standardize'"),
    ("divergence", {"standardize": 1}, TypeError, "standardize must be a bool, got int"),
    ("divergence", {"class_range": 3}, TypeError, r"class_range must be a pair \(m, n\), got 3"),
    ("divergence", {"class_range": (0, 1.5)}, TypeError, "class_range must be an integer"),
    ("divergence", {"class_range": (3, 11)}, ValueError, r"m < n <= 10, got \(3, 11\)"),
    ("divergence", {"class_range": (3, 3)}, ValueError, r"m < n <= 10, got \(3, 3\)"),
    ("divergence", {"teacher": S[:, :3], "class_range": (0, 4)}, ValueError, ", or 4 classes"),
    ("nkd_loss", {"teacher": S[:, :4], "class_range": (0, 4)}, ValueError, "teacher must have"),
    ("dkd_loss", {"class_range": (1, 4)}, ValueError, r"labels must be in class_range \[1, 4\)"),
    ("dkd_loss", {"labels": None}, TypeError, "labels must be an array, got None"),
    ("dkd_loss", {"return_parts": 1}, TypeError, "return_parts must be a bool"),
    ("dkd_loss", {"warmup": INF}, ValueError, "warmup must be finite, got inf"),
    ("ats_loss", {"standardize": True}, NotImplementedError, "standardize=True"),
    ("ats_loss", {"target_temperature": 0.0}, ValueError, "must be positive, got 0.0"),
    ("multi_teacher_kl_div", {"teachers": []}, TypeError, "teachers must be an array"),
    ("multi_teacher_kl_div", {"teachers": [S, S.astype(float)]}, TypeError, "one dtype"),
    ("multi_teacher_kl_div", {"teachers": S}, ValueError, r"student's shape \(4, 10\), got \(10,"),
    ("multi_teacher_kl_div", {"weights": np.ones(3)}, ValueError, r"weights .* got \(3,\)"),
    ("multi_teacher_kl_div", {"weights": [1.0, 1.0]}, TypeError, "weights must be .* got list"),
    ("multi_teacher_kl_div", {"weights": WEIGHTS * INF}, ValueError, "weights must be finite"),
    ("multi_teacher_kl_div", {"weights": -WEIGHTS, "form": "mixture"}, ValueError, "negative"),
    ("multi_teacher_kl_div", {"ce_weight": 1.0, "labels": None}, TypeError, "labels must be"),
    ("topk_divergence", {"kind": "ab"}, ValueError, "kind must be one of"),
    ("topk_divergence", {"kind": "reverse_kl", "missing": "zero"}, ValueError, "infinite"),
    ("topk_divergence", {"values": "logits"}, ValueError, "needs teacher_logsumexp"),
    ("topk_divergence", {"topk_indices": I[:, :2]}, ValueError, "must have one shape"),
    ("topk_divergence", {"topk_indices": I * 1.0}, TypeError, "must be integers, got float64"),
    ("topk_divergence", {"topk_indices": I[:2]}, ValueError, "topk_indices must have shape"),
    ("topk_divergence", {"topk_indices": I + 8}, ValueError, r"in \[0, 10\) .* row 0 has others"),
    ("topk_divergence", {"topk_indices": I * 0}, ValueError, "distinct .* row 0 repeats one"),
    ("topk_divergence", {"topk_values": I}, TypeError, "topk_values must be .* got int64"),
    ("dist_loss", {"compat": "mlkd"}, ValueError, "compat must be one of"),
    ("dist_loss", {"temperature": np.ones(4)}, NotImplementedError, r"one element, got shape"),
    ("dist_loss", {"temperature": -1.0}, ValueError, "temperature must be positive"),
    ("dist_loss", {"labels": S}, TypeError, "labels must be class indices"),
    ("dist_loss", {"beta": "1"}, TypeError, "beta must be a number"),
    ("dist_loss", {"threads": 0}, ValueError, "threads must be in"),
    ("class_attention", {"teacher": S[:, :0]}, ValueError, r"K >= 1, got \(4, 0\)"),
]  # fmt: skip


@pytest.mark.parametrize("function, change, exception, message", BAD_CALLS)
def test_bad_call(function, change, exception, message):
    everything = {
        "student": S, "teacher": S, "teachers": [S, S], "labels": L, "topk_indices": I,
        "topk_values": np.full((4, 3), -2.0), "scores": np.zeros((1, 11, 11)),
        "values": np.zeros((1, 11)) if function == "class_attention" else "log_probs",
    }  # fmt: skip
    run = getattr(kdnp, function)
    takes = inspect.signature(run).parameters
    valid = {k: v for k, v in everything.items() if k in takes}
    run(**valid)
    with pytest.raises(exception, match=f"^{function}: .*{message}"):
        run(**(valid | change))
