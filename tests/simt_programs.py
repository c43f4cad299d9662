# SPDX-License-Identifier: Apache-2.0
"""Programs in tests/simt, built for the simulator of csrc/testing/simt or for a GPU."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIMULATOR = sorted((ROOT / "csrc/testing/simt").glob("*.cpp"))
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-DKD_SIMT", "-x", "c++"]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build_simulated(*sources: Path, flags: list[str] = FLAGS) -> Path:
    """An executable of ``sources`` under the simulator, built anew if what it includes changes."""
    compiler = shutil.which("g++") or pytest.skip("no g++")
    return _cached([compiler, *flags], [*sources, *SIMULATOR])


def build_for_gpu(*sources: Path) -> Path:
    compiler = shutil.which("nvcc") or pytest.skip("no nvcc")
    return _cached([compiler, "-std=c++17", "-O3", "-arch=native"], list(sources))


def _cached(command: list[str], sources: list[Path]) -> Path:
    """Workers of one test run, and later runs, share what has been built."""
    plain = [str(path) for path in sources]
    listed = subprocess.run([*command, "-MM", *plain], capture_output=True, text=True, check=True)
    names = {name for name in listed.stdout.replace("\\\n", " ").split() if not name.endswith(":")}
    content = hashlib.sha256(repr(command).encode())
    for name in sorted(names):
        content.update(Path(name).read_bytes())
    program = ROOT / "build/simt" / f"{sources[0].stem}-{content.hexdigest()[:16]}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        unfinished = program.with_suffix(f".{os.getpid()}")
        result = subprocess.run(
            [*command, *plain, "-o", unfinished], capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        unfinished.rename(program)
    return program
