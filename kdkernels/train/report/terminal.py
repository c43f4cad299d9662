# SPDX-License-Identifier: Apache-2.0
"""What a terminal shows of a run, and the plot beside its results."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kdkernels.train import checkpoint

console = Console()

# Group, heading, name in a summary, factor and decimals for display.
ROWS = (
    ("test accuracy, %", "best epoch", "test.accuracy", 100, 2),
    ("test accuracy, %", "last epoch", "test.accuracy_of_last_epoch", 100, 2),
    ("validation accuracy, %", "best", "val.best", 100, 2),
    ("validation accuracy, %", "last", "val.last", 100, 2),
    ("validation accuracy, %", "mean of last 10, or all", "val.mean_of_last_10", 100, 2),
    ("teacher", "agreement, %", "test.agreement", 100, 2),
    ("teacher", "KL, nats", "test.kl_to_teacher", 1, 4),
    ("calibration", "ECE, %", "test.ece", 100, 2),
    ("speed", "images/s", "samples_per_second", 1, 0),
    ("speed", "loss, ms a step", "loss_ms", 1, 3),
    ("speed", "loss, % of a step", "loss_share", 100, 1),
)


def drawing() -> bool:
    """Whether there is a terminal to draw on: not in CI, nor where output goes to a file."""
    return console.is_terminal and "CI" not in os.environ


def say(*lines: str) -> None:
    """Print lines as they are, however long."""
    for line in lines:
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def epoch_line(label: str, epochs: int, record: Mapping[str, Any], stage: str = "") -> str:
    """An epoch's record in short, with its ``stage`` of a course that has any."""
    stage = f" ({stage})" if stage else ""
    return (
        f"{label}: epoch {record['epoch']}/{epochs}{stage}, loss {record['train']['loss']:.4g}, "
        f"validation {100 * record['val']['accuracy']:.2f} %, "
        f"{record['samples_per_second']:.0f} images/s"
    )


@contextmanager
def progress(label: str, done: int, total: int) -> Iterator[Callable[[], None]]:
    """A bar of steps where :func:`drawing`; yields the function to call after each."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not drawing(), transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done)
        yield partial(bar.advance, task)


# Beside ROWS in a terminal, where no text around the table has it.
TEACHER = ("teacher", "test accuracy, %", "teacher.accuracy", 100, 2)


def table(
    title: str,
    summaries: Mapping[str, Mapping[str, Any]],
    images: Mapping[str, int] | None = None,
) -> Table:
    """A column for each named summary: mean and sample standard deviation over seeds.

    Numbers end at the first digit in doubt: by the deviation, or, of so many ``images`` of a part,
    by that of drawing them. A row without any is left out.
    """
    shown = Table(title=title)
    shown.add_column("")
    shown.add_column("")
    for name in summaries:
        shown.add_column(name, justify="right")
    before = None
    for group, heading, key, factor, most in (*ROWS[:5], TEACHER, *ROWS[5:]):
        cells = []
        for summary in summaries.values():
            decimals = min(most, _decimals(key, summary.get(key, {}), factor, images or {}))
            cells.append(" ± ".join(mean_and_std(summary, key, factor, decimals)))
        if {*cells} != {"-"}:
            shown.add_row(group if group != before else "", heading, *cells)
            before = group
    return shown


def _decimals(key: str, entry: Mapping[str, Any], factor: float, images: Mapping[str, int]) -> int:
    noise = entry.get("std")
    part = {"val": "validation", "test": "test", "teacher": "test"}.get(key.partition(".")[0])
    if not noise and entry and factor == 100 and part in images:
        share, count = entry["mean"], images[part]
        noise = math.sqrt(max(share * (1 - share), 1 / count) / count)
    return max(math.ceil(-math.log10(factor * noise)), 0) if noise else sys.maxsize


def closing(results: Mapping[str, Any]) -> list[str]:
    """Where the results of a run are, and what may come next."""
    out = results["out"]
    lines = [
        f"specialist {place.removeprefix('teacher-')}: {model['model']}, "
        f"{100 * model['test']['accuracy']:.0f} % of classes {model['classes'][0]}.."
        f"{model['classes'][-1]} on test"
        for place, model in results.items()
        if place.startswith("teacher-")
    ]
    return [
        *lines,
        f"{out}: results.json, curves.png, and in seed-* model.safetensors and log.jsonl",
        f"next: kdkernels report {out}",
    ]


def mean_and_std(
    summary: Mapping[str, Any], key: str, factor: float, decimals: int
) -> tuple[str, ...]:
    """Mean and deviation of an entry, as far as they are there: one seed has no deviation."""
    values = summary.get(key, {}).values()
    return tuple(f"{factor * x:.{decimals}f}" for x in values if x is not None) or ("-",)


def plot(path: Path, runs: Mapping[str, Sequence[Path]]) -> None:
    """Validation accuracy, training loss and the loss's cost for each name.

    Lines are means over a name's run folders, bands reach from the least to the greatest.
    """
    figure = Figure(figsize=(12, 4), layout="constrained")
    accuracies, losses, costs = figure.subplots(1, 3)
    for index, (name, folders) in enumerate(runs.items()):
        logs = [checkpoint.read_lines(folder / "log.jsonl") for folder in folders]
        epochs = [record["epoch"] for record in logs[0]]
        for axes, values in (
            (accuracies, [[100 * record["val"]["accuracy"] for record in log] for log in logs]),
            (losses, [[record["train"]["loss"] for record in log] for log in logs]),
        ):
            axes.plot(epochs, np.mean(values, 0), color=f"C{index}", label=name)
            band = np.min(values, 0), np.max(values, 0)
            axes.fill_between(epochs, *band, color=f"C{index}", alpha=0.2)
        cost = [np.median([record["loss_ms"] for record in log]) for log in logs]
        costs.bar(name, np.mean(cost), color=f"C{index}")
    accuracies.set(xlabel="epoch", ylabel="validation accuracy, %")
    accuracies.legend()
    losses.set(xlabel="epoch", ylabel="training loss", yscale="log")
    costs.set(ylabel="loss forward and backward, ms a step")
    checkpoint.write(path, partial(figure.savefig, format="png", dpi=120))
