# SPDX-License-Identifier: Apache-2.0
"""What a person sees of runs: a progress bar, a table, a plot, and a page about many of them."""

from kdkernels.train.report.page import write_page
from kdkernels.train.report.terminal import (
    closing,
    console,
    drawing,
    epoch_line,
    plot,
    progress,
    say,
    table,
)

__all__ = [
    "closing",
    "console",
    "drawing",
    "epoch_line",
    "plot",
    "progress",
    "say",
    "table",
    "write_page",
]
