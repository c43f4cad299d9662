# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, which has to be chosen before any kernel is decorated."""

from __future__ import annotations

import os
import subprocess
import sys

from kdkernels import ops

INTERPRETED = ops.triton_interpreted()


def assert_passes_interpreted(*files: str, chosen: str = "") -> None:
    """Run ``files`` in a process that has it: all tests, or those that pytest's -k is to choose."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    command += ["--disable-warnings", "-k", chosen, *files]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]
