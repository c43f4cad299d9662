# SPDX-License-Identifier: Apache-2.0
"""Compiling for tests, once: workers of a run and later runs share what is in build/.

Programs in tests/simt are built for the simulator of csrc/testing/simt or for a GPU.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIMULATOR = sorted((ROOT / "csrc/testing/simt").glob("*.cpp"))
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-DKD_SIMT", "-x", "c++"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build_simulated(*sources: Path, flags: list[str] = FLAGS) -> Path:
    """An executable of ``sources`` under the simulator."""
    return _build([tool("g++"), *flags], *sources, *SIMULATOR)


def build_for_gpu(*sources: Path) -> Path:
    return _build([tool("nvcc"), "-std=c++17", "-O3", "-arch=native"], *sources)


def tool(name: str) -> str:
    return shutil.which(name) or pytest.skip(f"no {name}")


def _build(command: list[str], *sources: Path) -> Path:
    return cached(command, sources, "", lambda out: run([*command, *sources, "-o", out]))


def cached(command: list[str], sources, suffix: str, make: Callable[[Path], object]) -> Path:
    """What ``make`` writes, made anew if the command, or what the sources include, changes."""
    listed = run([*command, "-MM", *sources])
    content = hashlib.sha256(repr((command, _version(command[0]))).encode())
    rules = listed.stdout.replace("\\\n", " ").splitlines()
    for name in sorted({name for rule in rules for name in rule.partition(":")[2].split()}):
        content.update(Path(name).read_bytes())
    path = ROOT / "build/tests" / f"{sources[0].stem}-{content.hexdigest()[:16]}{suffix}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        make(unfinished)
        unfinished.rename(path)
    return path


def run(command: list) -> subprocess.CompletedProcess:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@functools.cache
def _version(compiler: str) -> str:
    return run([compiler, "--version"]).stdout
