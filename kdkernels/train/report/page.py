# SPDX-License-Identifier: Apache-2.0
"""A page about several runs, in one file that needs no network."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from kdkernels.train import checkpoint
from kdkernels.train.report import html
from kdkernels.train.report.charts import Chart, series, strip
from kdkernels.train.report.runs import Run, differences, read_runs
from kdkernels.train.report.sections import draw, problems, run_section, teachers
from kdkernels.train.report.terminal import ROWS, mean_and_std

# Heading, name in an epoch's record, factor and whether on a logarithmic scale.
CURVES = (
    ("Accuracy, %", "accuracy", 100, False),
    ("Agreement with the teacher, %", "agreement", 100, False),
    ("KL to the teacher, nats", "kl_to_teacher", 1, True),
    ("Calibration error (ECE), %", "ece", 100, False),
)
NOTE = (
    "Mean ± sample standard deviation over seeds; a run of one seed has no deviation. Test "
    "accuracy is that of the epoch of the best validation accuracy; test images were read once, "
    "when that epoch was known. Dots are the seeds' test accuracies. Last epoch and mean of the "
    "last 10 choose nothing. Losses are timed forward and backward within training."
)


def write_page(paths: Iterable[Path], out: Path) -> list[Run]:
    """Write the page about the runs at ``paths`` and return them."""
    runs = read_runs(paths)
    checkpoint.write(out, lambda file: file.write(page(runs).encode()))
    return runs


def page(runs: Sequence[Run]) -> str:
    """The page."""
    styles = [series(index) for index in range(len(runs))]
    data = dict.fromkeys(str(run.config["data"]) for run in runs if "data" in run.config)
    count = f"{len(runs)} run{'s' * (len(runs) > 1)}"
    parts = [
        "<h1>Distillation report</h1>",
        f'<p class="soft">{count} on {escape(", ".join(data))}; written by kdkernels on '
        f"{time.strftime('%Y-%m-%d')}.</p>",
        problems(runs),
        mixed(data),
        *(summary(*group, name) + comparison(*group, name) for name, group in of(runs, styles)),
        *(run_section(run, style) for run, style in zip(runs, styles, strict=True)),
        options(runs),
        environment(runs),
    ]
    style = Path(__file__).with_name("style.css").read_text()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        'content="width=device-width, initial-scale=1"><title>Distillation report</title>'
        f"<style>{style}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def mixed(data: Iterable[str]) -> str:
    """A warning, if the runs are not on the same data."""
    if len(names := {Path(path).name for path in data}) < 2:
        return ""
    return (
        f'<div class="problems">The runs are on different data ({escape(", ".join(sorted(names)))})'
        f": their figures are not to be compared.</div>"
    )


def of(runs: Sequence[Run], styles: Sequence[str]) -> list[tuple[str, tuple[list[Run], list[str]]]]:
    """Runs and their styles by data set, whose name is needed where there are several."""
    groups: dict[str, tuple[list[Run], list[str]]] = {}
    for run, style in zip(runs, styles, strict=True):
        own, theirs = groups.setdefault(Path(str(run.config.get("data", ""))).name, ([], []))
        own.append(run)
        theirs.append(style)
    return [(f", {name or 'unknown data'}" * (len(groups) > 1), x) for name, x in groups.items()]


def summary(runs: Sequence[Run], styles: Sequence[str], where: str = "") -> str:
    """A line for each run, and one for each teacher of all classes."""
    every = [seed.results["test"]["accuracy"] for run in runs for seed in run.finished]
    rows = []
    for run, style in zip(runs, styles, strict=True):
        accuracies = [seed.results["test"]["accuracy"] for seed in run.finished]
        dots = strip(accuracies, min(every), max(every), style, run.label) if accuracies else ""
        seeds = str(len(run.finished))
        if len(run.finished) < len(run.seeds):
            seeds += f" of {len(run.seeds)}"
        means = [html.mean(mean_and_std(run.summary, *row[2:])) for row in ROWS]
        name = f'<span class="key {style}">{escape(run.label)}</span>'
        rows.append((name, seeds, dots, *means))
    header = ("method", "seeds", "test accuracy, %: ", *(f"{g}: {h}" for g, h, *_ in ROWS))
    taught: dict[str, list[str]] = {}
    for run in runs:
        if run.teachers:
            taught.setdefault(teachers(run), []).append(run.label)
    by = "; ".join(
        shown + (f", of {', '.join(labels)}" if len(taught) > 1 else "")
        for shown, labels in taught.items()
    )
    by = f"Teacher: {by}." if by else ""
    of_all = [run.teachers[0] for run in runs if len(run.teachers) == 1]
    for model, accuracy in sorted({(one["model"], one["test"]["accuracy"]) for one in of_all}):
        cells = [f"{100 * accuracy:.2f}", *[""] * (len(ROWS) - 1)]
        rows.append((escape(f"teacher {model}"), "", "", *cells))
    known = {len(x.predictions.classes) for r in runs for x in r.finished if x.predictions}
    if len(known) == 1:
        (count,) = known
        by += f" Guessing is right for {100 / count:.3g} % of images of {count} classes."
    notes = f'<p class="soft">{NOTE}</p><p class="soft">{escape(by)}</p>'
    return f"<h2>Summary{escape(where)}</h2>{html.table(header, rows)}{notes}"


def comparison(runs: Sequence[Run], styles: Sequence[str], where: str = "") -> str:
    """What all methods report of validation, by epoch, all runs in one chart."""
    shown = []
    for title, key, factor, log in CURVES:
        lines = {
            index: [
                [(r["epoch"], factor * r["val"][key]) for r in seed.log if key in r["val"]]
                for seed in run.logged
            ]
            for index, run in enumerate(runs)
        }
        every = [point for several in lines.values() for line in several for point in line]
        if not every:
            continue
        chart = Chart(every, x="epoch", y=title, log=log, size=(520, 260))
        for index, several in lines.items():
            if any(several):
                draw(chart, several, styles[index], runs[index].label)
        shown.append(html.figure(title, chart.svg()))
    names = html.legend(zip(styles, (run.label for run in runs), strict=True))
    note = "On validation images, by epoch: means within the range over seeds."
    figures = html.figures(shown, style="two")
    return f'<h2>Curves{escape(where)}</h2><p class="soft">{note}</p>{names}{figures}'


def options(runs: Sequence[Run]) -> str:
    """What the runs differ in, since a comparison of methods should differ in nothing else."""
    configured = [run for run in runs if run.config]
    if len(configured) < 2:
        return ""
    every = set.intersection(*(set(run.config) for run in configured))
    rows = [
        (f"<code>{escape(key)}</code>", *(escape(html.shown(value)) for value in values))
        for key, values in differences(configured).items()
        if key in every
    ]
    own = [
        ", ".join(
            f"{key} {html.shown(value)}"
            for key, value in run.config.items()
            if key not in every and value is not None
        )
        for run in configured
    ]
    if any(own):
        rows.append(("the method's own", *map(escape, own)))
    note = "All other options are the same in all runs." if rows else "There are none."
    content = html.table(("", *(run.label for run in configured)), rows, style="text")
    return html.folded("Options that differ", f'<p class="soft">{note}</p>{content * bool(rows)}')


def environment(runs: Sequence[Run]) -> str:
    """Where the runs were made; once where it was the same place."""
    places: dict[str, list[str]] = {}
    for run in runs:
        info = run.environment
        if not info:
            continue
        names = [gpu["name"] for gpu in info["gpus"]]
        cpu = f"{info['cpu']['model']} ({info['cpu']['threads']} threads, {info['cpu']['isa']})"
        place = f"{', '.join([*names, cpu])}; torch {info['torch']}; kdkernels {info['kdkernels']}"
        places.setdefault(place, []).append(run.label)
    items = [
        f"<p>{escape(', '.join(labels) + ': ' if len(places) > 1 else '')}{escape(place)}.</p>"
        for place, labels in places.items()
    ]
    return f"<h2>Machine</h2>{''.join(items)}" if items else ""
