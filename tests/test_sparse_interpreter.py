# SPDX-License-Identifier: Apache-2.0
"""Top-k teachers in Triton's interpreter."""

from pathlib import Path

import pytest
from interpreter import INTERPRETED, assert_passes_interpreted

pytest.importorskip("triton", reason="triton is not installed: nothing to interpret")

FILES = ("test_sparse.py", "test_sparse_edges.py", "test_sparse_calls.py")
# Of their tests, what takes half a minute in all.
TESTS = (
    "dense", "one_more_class", "even_tail", "takes_the_tail", "without_values", "one_class",
    "minus_infinity", "exceed_one", "mixed_dtypes", "(gradcheck and topk_js)",
    "(every_option and t2-batchmean)", "not_checked", "where_rows_do_not_count", "infinite",
)  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_in_a_process_with_the_interpreter():
    files = [str(Path(__file__).with_name(name)) for name in FILES]
    assert_passes_interpreted(*files, chosen=f"triton and ({' or '.join(TESTS)})")
