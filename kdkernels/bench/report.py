# SPDX-License-Identifier: Apache-2.0
"""Results for reading: a table by `rich` where it is installed, plain text otherwise."""

from __future__ import annotations

import importlib.util
import sys
from itertools import compress

from kdkernels.bench.contenders import BACKENDS

COLUMNS = (
    "", "ms", "p20", "p80", "x", "GB/s", "copy", "loss error", "grad error", "memory", "launches",
    "host us",
)  # fmt: skip
LEGEND = """
x: times as fast as the best formulation in plain torch; copy: the share of its time that a copy of
inputs and gradient takes; errors: relative, to fp64; memory: extra, in sizes of the gradient"""


def title(row: dict) -> str:
    size = "x".join(map(str, row["size"]))
    name = "" if row["shape"] == size else f" ({row['shape']})"
    return f"{row['loss']} {size}{name} {row['dtype']}, upstream gradient {row['upstream']:g}"


def lines(row: dict) -> list[tuple[str, ...]]:
    """One line per contender, in the order of :data:`COLUMNS`."""

    def cell(values, key, form):
        return form.format(values[key]) if values.get(key) is not None else ""

    result = []
    for name, values in row["contenders"].items():
        milliseconds = {key: values[key] * 1e3 for key in ("seconds", "p20", "p80")}
        extra = values.get("extra_bytes")
        result.append(
            (
                name + (" (no graph)" if "not_captured" in values else ""),
                f"{milliseconds['seconds']:.4g}",
                f"{milliseconds['p20']:.4g}",
                f"{milliseconds['p80']:.4g}",
                cell(values, "speedup", "{:.2f}"),
                cell(values, "gb_per_s", "{:.1f}"),
                cell(values, "share_of_copy", "{:.0%}"),
                cell(values, "loss_error", "{:.1e}"),
                cell(values, "grad_error", "{:.1e}"),
                "" if extra is None else f"{extra / row['gradient_bytes']:.2f}",
                cell(values, "launches", "{}"),
                f"{values['host_seconds'] * 1e6:.1f}" if "host_seconds" in values else "",
            )
        )
    return result


def show(row: dict) -> None:
    """Print one row's contenders, and who is missing and why."""
    _table(title(row), COLUMNS, lines(row))
    for name, reason in row["skipped"].items():
        print(f"  {name}: skipped, {reason}")


def show_legend() -> None:
    print(LEGEND)


def show_near_zero(rows: list[dict]) -> None:
    """Print the error rows near zero."""
    if not rows:
        return
    names = list(rows[0]["contenders"])
    body = []
    for row in rows:
        found = [row["contenders"][name] for name in names]
        errors = [
            f"{each['worst_error']:.1e}"
            + (f" ({each['negative_rows']} negative)" if each["negative_rows"] else "")
            for each in found
        ]
        body.append((row["loss"], f"{row['true']:.1e}", *errors))
    classes, count = rows[0]["classes"], rows[0]["rows"]
    heading = f"worst relative error of {count} rows of {classes} classes, fp32"
    _table(heading, ("", "true value", *names), body)


def _table(heading: str, columns, body) -> None:
    filled = [any(texts) for texts in zip(*body, strict=True)]
    columns, *body = (list(compress(line, filled)) for line in (columns, *body))
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        _rich_table(heading, columns, body)
        return
    print(f"\n{heading}")
    widths = [max(map(len, texts)) for texts in zip(columns, *body, strict=True)]
    for first, *others in (columns, *body):
        numbers = (f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True))
        print("  ".join((f"  {first:<{widths[0]}}", *numbers)))


def _rich_table(heading: str, columns, body) -> None:
    from rich import box, console, table

    result = table.Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD)
    for i, column in enumerate(columns):
        result.add_column(column, justify="right" if i else "left", no_wrap=True)
    for line in body:
        result.add_row(*line, style="bold" if line[0] in BACKENDS else None)
    console.Console().print(result)
