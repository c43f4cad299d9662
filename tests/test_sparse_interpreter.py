# SPDX-License-Identifier: Apache-2.0
"""Top-k teachers in Triton's interpreter, which must be chosen before the kernels are decorated."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdkernels import ops

pytest.importorskip("triton", reason="triton is not installed: nothing to interpret")

FILES = ("test_sparse.py", "test_sparse_edges.py", "test_sparse_calls.py")
# Of their tests, what takes half a minute in all.
TESTS = (
    "dense", "one_more_class", "even_tail", "takes_the_tail", "without_values", "one_class",
    "minus_infinity", "exceed_one", "mixed_dtypes", "(gradcheck and topk_js)",
    "(every_option and t2-batchmean)", "not_checked", "where_rows_do_not_count", "infinite",
)  # fmt: skip


@pytest.mark.skipif(ops.triton_interpreted(), reason="this is that process")
def test_in_a_process_with_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["--disable-warnings", "-k", f"triton and ({' or '.join(TESTS)})"]
    command += [str(Path(__file__).with_name(name)) for name in FILES]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]
