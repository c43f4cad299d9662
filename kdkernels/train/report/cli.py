# SPDX-License-Identifier: Apache-2.0
"""``kdkernels report``: a page about runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kdkernels.train.errors import TrainError
from kdkernels.train.report.page import write_page

PROGRAM = "kdkernels report"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kdkernels report`` and return its exit status."""
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Write an HTML page about runs of kdkernels train: one file, no network.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUNS", help="folders of runs, or folders of these"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="default: %(default)s"
    )
    arguments = parser.parse_args(argv)
    try:
        runs = write_page(arguments.runs, arguments.out)
    except (TrainError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    for run in runs:
        for problem in run.problems:
            print(f"{PROGRAM}: {run.folder}: {problem}", file=sys.stderr)
    print(arguments.out)
    return 0
