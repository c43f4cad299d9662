# SPDX-License-Identifier: Apache-2.0
"""``kdkernels bench``: every loss against eager, ``torch.compile`` and other packages.

:func:`run` measures a list of cases and returns plain data; ``benchmarks/run.py`` calls it for the
committed results.
"""

from __future__ import annotations

from kdkernels.bench.cli import main
from kdkernels.bench.rows import DTYPES, Case, Settings, run

__all__ = ["DTYPES", "Case", "Settings", "main", "run"]
