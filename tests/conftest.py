# SPDX-License-Identifier: Apache-2.0
"""Backends to run over, and a header that says what is missing here."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from kdkernels import backends
from kdkernels.testing import LOSSES

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
OPTIONAL = ("triton", "trl", "timm", "liger_kernel")


def pytest_configure():
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # workers that share cores spend them waiting for each other


def pytest_report_header():
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    lines = [f"kdkernels: not installed: {', '.join(missing) or 'nothing'}"]
    for device in DEVICES:
        for backend in ("cpu", "triton", "cuda"):
            ok, reason = backends.verdict("rowwise", backend, device)
            lines.append(f"kdkernels: {backend} on {device}: {'yes' if ok else 'no'} ({reason})")
    return lines


def pytest_terminal_summary(terminalreporter):
    """What nvcc made of the CUDA kernels: from any worker, whether or not a test failed."""
    reports = [x for outcome in ("passed", "failed") for x in terminalreporter.getreports(outcome)]
    kernels = [text for x in reports for name, text in x.user_properties if name == "kernel"]
    if kernels:
        terminalreporter.section("CUDA kernels")
        for text in sorted(kernels):
            terminalreporter.write_line(text)


def pytest_generate_tests(metafunc):
    """Tests that take ``backend`` and ``device`` run on every pair that works here for the losses.

    These are the module's ``ENTRIES``, of one family, or else the rowwise functions. Where tests
    take ``any_loss`` as well, they run over the registry, with ``loss`` over those that have the
    rowwise functions' arguments, or ``ENTRIES``; ``kernel`` in the place of ``backend`` leaves out
    the reference.
    """
    names = metafunc.fixturenames
    for name in ("loss", "any_loss"):
        if name in names:
            entries = [x for x in LOSSES.values() if name == "any_loss" or x.by_row]
            entries = getattr(metafunc.module, "ENTRIES", entries)
            metafunc.parametrize(name, [pytest.param(x, id=x.name) for x in entries])
    for name in ("backend", "kernel"):
        if not {name, "device"} <= set(names):
            continue
        speaker = getattr(metafunc.module, "ENTRIES", [LOSSES["kl_div"]])[0]
        places = [
            pytest.param(
                backend,
                device,
                id=backend if device == "cpu" else f"{backend}-{device}",
                marks=[pytest.mark.gpu] if device == "cuda" else [],
            )
            for device in DEVICES
            for backend in speaker.backends(device)
            if name == "backend" or backend != "reference"
        ]
        metafunc.parametrize((name, "device"), places)


@pytest.fixture(autouse=True)
def seed():
    """The same masks and directions in every run and order."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """Networks as small as the tests' are slower on several, and processes must agree on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def prefer():
    """``kdkernels.backends.set_backend`` for one test."""
    before = backends.get_backend()
    yield backends.set_backend
    backends.set_backend(before)


@pytest.fixture(params=["one tile", "swept"])
def tiles(request, monkeypatch):
    """Rows that fit a tile, several to a program, and rows that take several tiles."""
    from kdkernels.triton import layout

    if request.param == "swept":
        monkeypatch.setattr(layout, "TILES", {})
        monkeypatch.setattr(layout, "SWEEP", layout.Tile(4, 16, 4))
    return request.param
