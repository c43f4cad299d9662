# SPDX-License-Identifier: Apache-2.0
"""tests/test_numpy*.py over kernels with AddressSanitizer and UBSan, at every ISA level."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kdkernels

pytestmark = pytest.mark.slow  # the build alone takes over a minute

ROOT = Path(__file__).parents[1]
# Without torch, whose libraries would be instrumented in vain; the tests that need it are skipped.
_RUN = """
import sys
sys.modules["torch"] = None
from kdkernels import _native
print(_native.__file__, _native.isa(), flush=True)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def _libraries() -> list[str]:
    """What has to be loaded before everything else; libstdc++ for ASan to see what throws."""
    compiler = shutil.which("g++") or pytest.skip("no g++")
    paths = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(os.path.isabs(path) for path in paths):
        pytest.skip("g++ has no libasan")
    return paths


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """A copy of the package with an instrumented ``_native``, and the environment to run it in."""
    libraries = _libraries()
    pytest.importorskip("pybind11")
    if not (ROOT / "setup.py").exists():
        pytest.skip("not in a source tree")
    folder = tmp_path_factory.mktemp("sanitized")
    environment = os.environ | {
        "KDKERNELS_BUILD": "1",
        "KDKERNELS_SANITIZE": "address,undefined",
    }
    result = subprocess.run(
        [
            sys.executable, "setup.py", "-q", "build_ext",
            "--build-lib", str(folder), "--build-temp", str(folder / "objects"),
        ],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    shutil.copytree(
        Path(kdkernels.__file__).parent,
        folder / "kdkernels",
        ignore=shutil.ignore_patterns("*.so", "*.json", "__pycache__"),
        dirs_exist_ok=True,
    )
    return folder, os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
    }


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_numpy_binding_is_clean(level, sanitized):
    folder, environment = sanitized
    result = subprocess.run(
        [
            sys.executable, "-c", _RUN, "-q", "-p", "no:cacheprovider", "--noconftest",
            "-o", "filterwarnings=", *map(str, sorted((ROOT / "tests").glob("test_numpy*.py"))),
        ],
        cwd=folder, env=environment | {"KDKERNELS_CPU_CAPABILITY": level},
        capture_output=True, text=True,
    )  # fmt: skip
    report = result.stdout + result.stderr
    used, _, isa = report.partition("\n")[0].rpartition(" ")
    if isa != level:
        pytest.skip(f"this machine has {isa}")
    assert used.startswith(str(folder))
    assert result.returncode == 0, report
