# SPDX-License-Identifier: Apache-2.0
"""What is refused, and that the message names function, argument, expected and got."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from kdkernels import backends, diagnostics, modules
from kdkernels import functional as kd
from kdkernels.testing import LOSSES

NAN, INF = float("nan"), float("inf")
S = torch.zeros(4, 10)

# (change to a valid call, exception, what the message says after the function's name)
BAD_CALLS = {
    "student is no tensor": ({"student": [1.0]}, TypeError, "student must be a tensor, got list"),
    "teacher is no tensor": ({"teacher": None}, TypeError, "teacher must be a tensor, got NoneTy"),
    "student dtype": ({"student": S.int()}, TypeError, "student must be float64.*got torch.int32"),
    "teacher dtype": ({"teacher": S.bool()}, TypeError, "teacher must be float64.*got torch.bool"),
    "shapes differ": (
        {"teacher": torch.zeros(4, 9)},
        ValueError,
        r"teacher must have the student's shape \(4, 10\), got \(4, 9\)",
    ),
    "0-d logits": (
        {"student": S.sum(), "teacher": S.sum(), "labels": None},
        ValueError,
        r"student must have shape \(\.\.\., C\) with C >= 1, got \(\)",
    ),
    "no classes": (
        {"student": S[:, :0], "teacher": S[:, :0]},
        ValueError,
        r"student must have shape .* got \(4, 0\)",
    ),
    "devices differ": (
        {"teacher": S.to("meta")},
        ValueError,
        "teacher must be on the student's device cpu, got meta",
    ),
    "zero temperature": (
        {"temperature": 0.0},
        ValueError,
        "temperature must be positive and finite, got 0.0",
    ),
    "negative temperature": ({"temperature": -1}, ValueError, "temperature must be .* got -1"),
    "nan temperature": ({"temperature": NAN}, ValueError, "temperature must be .* got nan"),
    "infinite temperature": ({"temperature": INF}, ValueError, "temperature must be .* got inf"),
    "temperature type": (
        {"temperature": "4"},
        TypeError,
        "temperature must be a number or a tensor, got str",
    ),
    "temperature shape": (
        {"temperature": torch.ones(4, 1)},
        ValueError,
        r"temperature must have one element or the shape of the rows \(4,\), got \(4, 1\)",
    ),
    "temperature dtype": (
        {"temperature": torch.ones(4, dtype=torch.int64)},
        TypeError,
        "temperature must be floating-point, got torch.int64",
    ),
    "temperature values": (
        {"temperature": torch.tensor([1.0, -2.0, 1.0, 1.0])},
        ValueError,
        "temperature must be positive and finite, got -2.0",
    ),
    "infinite among the temperatures": (
        {"temperature": torch.tensor([1.0, 2.0, INF, 1.0])},
        ValueError,
        "temperature must be positive and finite, got inf",
    ),
    "bool temperature": (
        {"temperature": True},
        TypeError,
        "temperature must be a number or a tensor, got bool",
    ),
    "teacher temperature": (
        {"teacher_temperature": 0.0},
        ValueError,
        "teacher_temperature must be positive and finite, got 0.0",
    ),
    "scale": ({"scale": "T2"}, ValueError, "scale must be one of t2, none, got 'T2'"),
    "reduction": (
        {"reduction": "average"},
        ValueError,
        "reduction must be one of none, sum, batchmean, mean, got 'average'",
    ),
    "mask shape": (
        {"mask": torch.ones(4, 10, dtype=torch.bool)},
        ValueError,
        r"mask must have the shape of the rows \(4,\), got \(4, 10\)",
    ),
    "mask dtype": ({"mask": torch.ones(4)}, TypeError, "mask must be bool, got torch.float32"),
    "mask type": ({"mask": [True]}, TypeError, "mask must be a tensor, got list"),
    "weight shape": ({"row_weight": torch.ones(3)}, ValueError, r"row_weight must .* got \(3,\)"),
    "weight dtype": (
        {"row_weight": torch.ones(4).long()},
        TypeError,
        "row_weight must be floating-point, got torch.int64",
    ),
    "label too large": (
        {"labels": torch.tensor([0, 10, 0, 0])},
        ValueError,
        r"labels must be in \[0, 10\) or ignore_index \(-100\), got 10",
    ),
    "label negative": (
        {"labels": torch.tensor([0, -1, -100, 0])},
        ValueError,
        r"labels must be in \[0, 10\) or ignore_index \(-100\), got -1",
    ),
    "label shape": (
        {"labels": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        r"labels must be integers of shape \(4,\) or prob.* got torch.int64 of shape \(3,\)",
    ),
    "label type": ({"labels": 3}, TypeError, "labels must be a tensor, got int"),
    "label gradient": (
        {"labels": torch.full((4, 10), 0.1, requires_grad=True)},
        NotImplementedError,
        "labels must not require a gradient",
    ),
    "backend": (
        {"backend": "metal"},
        ValueError,
        "backend must be one of auto, reference, cpu, triton, cuda, got 'metal'",
    ),
}

FUNCTIONS = {
    "kl_div": {},
    "reverse_kl_div": {},
    "js_div": {},
    "tv_distance": {},
    "divergence": {"kind": "jeffreys"},
    "kd_loss": {},
}


@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_calls(name, case):
    change, error, message = BAD_CALLS[case]
    labels = torch.zeros(4, dtype=torch.int64)
    valid = {"student": S, "teacher": S, "labels": labels, "backend": "reference"}
    if name == "kd_loss" and change.get("labels", valid) is None:
        change = change | {"labels": labels}
    where = name
    with pytest.raises(error, match=rf"^{where}: {message}"):
        getattr(kd, name)(**valid | FUNCTIONS[name] | change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "kl"}, "kind must be one of forward_kl, .* got 'kl'"),
        ({"kind": "js", "beta": 1.5}, r"beta must be in \[0.0, 1.0\], got 1.5"),
        ({"kind": "js", "alpha": 0.5}, "kind='js' takes no alpha, got 0.5"),
        ({"kind": "tv", "beta": 0.5}, "kind='tv' takes no beta, got 0.5"),
        (
            {"kind": "skew_forward", "alpha": -0.1},
            r"alpha must be in \[0, 1\) for kind='skew_forward', got -0.1",
        ),
        ({"kind": "renyi", "alpha": 0.0}, "alpha must be positive for kind='renyi', got 0.0"),
        ({"kind": "alpha", "alpha": NAN}, "alpha must be finite, got nan"),
        ({"kind": "ab", "alpha": 0.0}, "must be non-zero for kind='ab', got alpha=0.0, beta=0.7"),
        ({"kind": "ab", "alpha": 1.0, "beta": -1.0}, "non-zero .* got alpha=1.0, beta=-1.0"),
    ],
    ids=str,
)
def test_bad_divergences(arguments, message):
    with pytest.raises(ValueError, match=rf"^divergence: .*{message}"):
        kd.divergence(S, S, **arguments)
    with pytest.raises(ValueError, match=rf"^divergence: .*{message}"):
        modules.DivergenceLoss(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labels": None}, TypeError, "labels must be a tensor, got None"),
        ({"alpha": 0.5, "ce_weight": 1.0, "kd_weight": 1.0}, ValueError, "either alpha, or both"),
        ({"ce_weight": 1.0}, ValueError, "either alpha, or both .* kd_weight=None"),
        ({"alpha": "1"}, TypeError, "alpha must be a number, got str"),
        ({"alpha": 2}, ValueError, r"alpha must be in \[0.0, 1.0\], got 2"),
        ({"kd_weight": INF, "ce_weight": 1.0}, ValueError, "kd_weight must be finite, got inf"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0.0, 1.0\], got"),
        ({"compat": "timm"}, ValueError, "compat must be one of paper, .* got 'timm'"),
    ],
    ids=str,
)
def test_bad_kd_loss(arguments, error, message):
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(error, match=rf"^kd_loss: .*{message}"):
        kd.kd_loss(S, S, **{"labels": labels} | arguments)


def test_bad_modules():
    with pytest.raises(TypeError, match=r"^KDLoss: .*'temprature'; expected .* temperature, alpha"):
        modules.KDLoss(temprature=4.0)
    with pytest.raises(TypeError, match=r"^SoftKLDivLoss: too many positional arguments"):
        modules.SoftKLDivLoss(4.0)
    with pytest.raises(TypeError, match=r"^DivergenceLoss: .*'kind'"):
        modules.DivergenceLoss()
    with pytest.raises(ValueError, match=r"^js_div: beta must be in"):
        modules.JSDivLoss(beta=2.0)
    with pytest.raises(ValueError, match=r"^TVDistanceLoss: backend must be one of"):
        modules.TVDistanceLoss(backend="metal")


def test_numpy_numbers_are_numbers():
    expected = kd.js_div(S, S + 1, temperature=2.0, beta=0.3, backend="reference")
    number = np.float64
    actual = kd.js_div(S, S + 1, temperature=number(2), beta=number(0.3), backend="reference")
    assert torch.equal(actual, expected)


def test_labels_of_any_integer_type(backend, device):
    inputs = LOSSES["kd_loss"].inputs(4, 10, device=device)
    expected = kd.kd_loss(**inputs, backend=backend)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        cast = inputs | {"labels": inputs["labels"].to(dtype)}
        assert torch.equal(kd.kd_loss(**cast, backend=backend), expected)


def test_demanded_backend_says_why_it_cannot_run():
    for backend in ("cpu", "triton", "cuda"):
        ok, reason = backends.verdict("rowwise", backend, "cpu")
        if ok:
            kd.kl_div(S, S, backend=backend)
        else:
            with pytest.raises(
                RuntimeError, match=f"backend '{backend}' cannot run here: {re.escape(reason)}"
            ):
                kd.kl_div(S, S, backend=backend)
    assert not backends.verdict("rowwise", "cuda", "cpu").ok


def test_preference_is_used_where_it_can_be(prefer):
    prefer("reference")
    assert backends.select("rowwise", "cpu", "auto", "kl_div") == "reference"
    best = "cpu" if backends.verdict("rowwise", "cpu", "cpu").ok else "reference"
    prefer("cuda")  # not for CPU tensors: auto decides
    assert backends.select("rowwise", "cpu", "auto", "kl_div") == best
    prefer("auto")
    assert backends.select("rowwise", "cpu", "auto", "kl_div") == best
    with pytest.raises(ValueError, match=r"^set_backend: backend must be one of .* got 'metal'"):
        prefer("metal")


def test_fallback_warns_once(prefer, monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(
        backends, "verdict", lambda *_: backends.Verdict(False, "not built, says the test")
    )
    prefer("auto")
    with pytest.warns(UserWarning, match=r"no fused rowwise kernel.*not built, says the test"):
        kd.kl_div(S, S)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backends._choices.clear()
        kd.kl_div(S, S)
    prefer("auto")  # forgets what was chosen under the test's verdicts


def test_asking_for_the_reference_does_not_warn(prefer, monkeypatch):
    monkeypatch.setattr(backends, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd.kl_div(S, S, backend="reference")
        prefer("reference")
        kd.kl_div(S, S)


def test_environment_sets_the_preference(monkeypatch):
    code = (
        "from kdkernels import backends; print(backends.select('rowwise', 'cpu', 'auto', 'kl_div'))"
    )
    environment = os.environ | {"KDKERNELS_BACKEND": "reference"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "reference", done.stderr

    monkeypatch.setattr(backends, "_preference", "metal")  # as if it had been in the environment
    with pytest.raises(ValueError, match=r"^KDKERNELS_BACKEND: backend must be one of .* 'metal'"):
        backends.get_backend()


def test_every_module_can_be_made():
    """With its defaults; those that learn need sizes, which their own tests give."""
    made = 0
    for name in modules.__all__:
        try:
            module = getattr(modules, name)()
        except TypeError as error:  # sizes, or a kind, that have no default
            assert "missing" in str(error) or "unexpected" in str(error), name
        else:
            assert isinstance(module, torch.nn.Module)
            made += 1
    assert made >= 15


def test_self_check_runs():
    """``kdkernels check``: nothing it tries is wrong here."""
    found = diagnostics.check("cpu")
    assert found.keys() == LOSSES.keys()
    for name, by_backend in found.items():
        assert "reference" in by_backend and not any(by_backend.values()), (name, by_backend)


@pytest.mark.parametrize(
    "call",
    [
        lambda group: kd.dist_loss(S, S, group=group),
        lambda group: kd.mlkd_loss(S, S, group=group),
    ],
)
def test_groups_are_process_groups(call):
    with pytest.raises(TypeError, match=r"_loss: group must be a torch.distributed.Proc.* 'world'"):
        call("world")


def test_bad_mixtures_do_not_print_every_weight():
    weights = torch.ones(2, 4)
    weights[1, 3] = -0.5
    with pytest.raises(ValueError, match=r"not be negative.*smallest weight of -0.5 .*sum of 0.5"):
        kd.multi_teacher_kl_div(S, torch.stack([S, S]), weights=weights, form="mixture")


def test_more_values_than_classes():
    with pytest.raises(
        ValueError, match=r"topk_values must have at most .* classes \(10\), got 11"
    ):
        kd.topk_divergence(S, torch.zeros(4, 11), torch.zeros(4, 11, dtype=torch.int64))


def test_unsigned_indices():
    values = torch.full((4, 2), -1.0)
    indices = torch.tensor([[1, 2]] * 4)
    expected = kd.topk_divergence(S, values, indices)
    assert torch.equal(kd.topk_divergence(S, values, indices.to(torch.uint16)), expected)


def test_simplifier_sizes():
    with pytest.raises(
        ValueError, match=r"LearningSimplifier: num_heads must divide dim \(32\), g"
    ):
        modules.LearningSimplifier(10, 32, num_heads=5)
    with pytest.raises(
        ValueError, match=r"teacher_logits must have shape \(\.\.\., 7\), got \(4, 10"
    ):
        modules.LearningSimplifier(7)(S)


def test_student_friendly_loss_of_some_rows():
    loss = modules.StudentFriendlyKDLoss(10)
    inputs = LOSSES["kd_loss"].inputs(4, 10)
    mask = torch.tensor([True, False, True, True])
    some = {name: x[mask] for name, x in inputs.items()}
    torch.testing.assert_close(loss(**inputs, mask=mask), loss(**some))


@pytest.mark.parametrize("name", modules.__all__)
def test_help_of_modules_explains_their_arguments(name):
    """In the text, not in the signature alone."""
    module = getattr(modules, name)
    said = set(re.findall(r"\w+", module.__doc__))
    assert set(inspect.signature(module).parameters) <= said
