# SPDX-License-Identifier: Apache-2.0
"""Numbers that the reference suites' own code computed in float64, through the public functions.

``KDKERNELS_GOLDEN`` names the folder (default ``../shared/golden`` from the repository's root); any
other of the same form must pass too, so everything but the meaning of a case's loss comes from its
manifest. A case whose loss has no adapter yet is an expected failure, named by its owner.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden import ADAPTERS

from kdkernels import backends

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / os.environ.get("KDKERNELS_GOLDEN", "../shared/golden")
# Owners whose every case must pass.
DONE = ("foundation", "logit losses", "feature losses", "trainer")


def _cases():
    manifest = FOLDER / "manifest.json"
    if not manifest.exists():
        missing = pytest.mark.skip(reason=f"no golden vectors at {FOLDER} (KDKERNELS_GOLDEN)")
        yield pytest.param(None, "reference", marks=missing, id="missing")
        return
    here = [b for b in ("reference", "cpu") if backends.verdict("rowwise", b, "cpu").ok]
    for case in json.loads(manifest.read_text()):
        if (case["loss"], case["suite_short"]) in ADAPTERS or case["owner"] in DONE:
            for backend in here:
                yield pytest.param(case, backend, id=f"{case['case']}-{backend}")
        else:
            later = pytest.mark.xfail(strict=True, reason=case["owner"], raises=KeyError)
            yield pytest.param(case, "reference", marks=later, id=case["case"])


def _assert_equal(value, expected, what):
    expected = torch.from_numpy(np.asarray(expected))
    assert value.shape == expected.shape, f"{what}: {tuple(value.shape)}, {tuple(expected.shape)}"
    tolerance = max(1e-10 * expected.abs().max().item(), 1e-12)
    error = (value.detach() - expected).abs().max().item()
    assert error <= tolerance, f"{what}: error {error:.3g}, allowed {tolerance:.3g}"


@pytest.mark.parametrize(("case", "backend"), list(_cases()))
def test_golden(case, backend, prefer):
    call = ADAPTERS[case["loss"], case["suite_short"]]
    prefer(backend)
    arrays = dict(np.load(FOLDER / case["file"]))
    inputs = {name: torch.from_numpy(arrays[f"in_{name}"]) for name in case["inputs"]}
    wanted = {n: inputs[n].requires_grad_() for n in case["grad_wrt"] + case["no_grad_flow"]}
    values = call(SimpleNamespace(**inputs), SimpleNamespace(**case["hyper"]))
    values = values if isinstance(values, dict) else {"loss": values}
    for name in values.keys() & arrays.keys():  # not every case has a loss's parts
        value = values[name]
        _assert_equal(value, arrays[name], name)
        if name.startswith("out_"):  # has no gradient in the file
            continue
        part = name.removeprefix("loss").replace("_", "__", 1)  # as in grad_logits_student__ce
        for n, gradient in zip(
            wanted,
            torch.autograd.grad(value, list(wanted.values()), allow_unused=True),
            strict=True,
        ):
            if f"grad_{n}{part}" in arrays:
                _assert_equal(gradient, arrays[f"grad_{n}{part}"], f"grad_{n}{part}")
            elif n in case["no_grad_flow"]:
                assert gradient is None, f"{n}: no gradient expected"
