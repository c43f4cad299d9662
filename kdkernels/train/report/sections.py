# SPDX-License-Identifier: Apache-2.0
"""The section of one run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from kdkernels.train.metrics import summarise
from kdkernels.train.predictions import Predictions
from kdkernels.train.report import html
from kdkernels.train.report.charts import Chart, Points, mean_and_range, series
from kdkernels.train.report.runs import Run
from kdkernels.train.report.terminal import ROWS, mean_and_std

# What every method reports of validation; the rest is the method's own.
COMMON = {"accuracy", "ece", "agreement", "kl_to_teacher"}
# Up to so many classes the confusion matrix is shown whole.
MATRIX, PAIRS = 20, 10
# Up to so many are named beside the chart of their accuracies.
NAMED = 12
# Of the calibration chart; what fewer answers are right by chance is no share to show.
BINS, FEW = 15, 10


def run_section(run: Run, style: str) -> str:
    """Everything about one run, in the colour ``style``."""
    parts = [
        f'<h2><span class="key {style}">{escape(run.label)}</span></h2>',
        f'<p class="soft">{facts(run)}</p>',
        problems([run]),
    ]
    if run.finished:
        parts.append(seeds_table(run))
    if run.logged:
        parts += ["<h3>Training</h3>", html.figures(training(run))]
    found = [seed.predictions for seed in run.finished if seed.predictions]
    if found:
        parts += [
            "<h3>Test images</h3>",
            html.figures(classes(found), style="top"),
            examples(found[0]),
        ]
    if run.config:
        parts.append(html.folded("Resolved options", html.settings(run.config)))
    return "".join(parts)


def problems(runs: Sequence[Run]) -> str:
    """What is missing or damaged."""
    found = [(run.folder, problem) for run in runs for problem in run.problems]
    items = "".join(f"<li><code>{escape(str(a))}</code>: {escape(b)}</li>" for a, b in found)
    return f'<div class="problems"><ul>{items}</ul></div>' if found else ""


def facts(run: Run) -> str:
    """The run in a sentence."""
    config, finished = run.config, run.finished
    said = [f"Folder <code>{escape(str(run.folder))}</code>"]
    if config:
        student = f"student {config.get('student')}"
        if finished:
            student += f" ({finished[0].results['parameters']:,} parameters)"
        said.append(escape(student))
    if run.teachers:
        said.append(escape(f"teacher {teachers(run)}"))
    if config:
        said.append(
            escape(
                f"{config.get('data')}, {config.get('epochs')} epochs in batches of "
                f"{config.get('batch_size')}, {config.get('precision')}"
            )
        )
    return "; ".join(said) + "."


def teachers(run: Run) -> str:
    """The run's teachers; several are tested on the classes that each of them teaches."""
    shown = []
    for teacher in run.teachers:
        own = teacher.get("classes")
        of = f" of classes {own[0]}..{own[-1]}" if own else ""
        accuracy = 100 * teacher["test"]["accuracy"]
        shown.append(f"{teacher['model']} ({accuracy:.2f} % on test{of})")
    return ", ".join(shown)


def seeds_table(run: Run) -> str:
    """A line for each finished seed."""
    rows = []
    for seed in run.finished:
        best = f"{seed.results['val']['best_epoch']} of {seed.results['epochs']}"
        own = summarise([seed.results])
        rows.append((str(seed.number), best, *(mean_and_std(own, *row[2:])[0] for row in ROWS)))
    if len(rows) > 1:
        means = (html.mean(mean_and_std(run.summary, *row[2:])) for row in ROWS)
        rows.append(("mean", "", *means))
    header = (f"{group}: {heading}" for group, heading, *_ in ROWS)
    return html.table(("seed", "validation chose", *header), rows)


def training(run: Run) -> list[str]:
    """Loss terms, their gradients, the method's own measures, rates and speed, by epoch."""
    logs = [seed.log for seed in run.logged]
    terms = _lines(logs, "train")
    if len(terms) == 2:  # a lone term is the loss
        terms = {name: lines for name, lines in terms.items() if name != "loss"}
    shown = [_chart("Loss terms", "unweighted", terms, log=True)]
    if norms := _lines(logs, "gradient_norms"):
        note = "weighted, at what the student gives out; how hard each of them pulls"
        shown.append(_chart("Gradient norms of the terms", note, norms, log=True))
    measures = {name: x for name, x in _lines(logs, "val").items() if name not in COMMON}
    groups: dict[str, dict[str, list[Points]]] = {}
    for name, lines in measures.items():
        groups.setdefault(_kind(name), {})[name] = lines
    shown += [_chart(f"The method's {g}", "on validation images", x) for g, x in groups.items()]
    for title, key, factor in (
        ("Images per second", "samples_per_second", 1),
        ("Loss, % of a step", "loss_share", 100),
        ("Learning rate", "lr", 1),
    ):
        lines = [[(record["epoch"], factor * record[key]) for record in log] for log in logs]
        shown.append(_chart(title, "", {title: lines}))
    return shown


def _kind(measure: str) -> str:
    """Of measures that belong in one chart: method.target_entropy, kl_to_target, accuracy_of_1."""
    name = measure.rpartition(".")[2]
    if name.startswith("kl"):
        return "KL, nats"
    numbered = re.sub(r"_\d+$", "", name)
    return numbered.replace("_", " ") if numbered != name else name.rpartition("_")[2]


def _lines(logs: Sequence[Sequence[dict]], part: str) -> dict[str, list[Points]]:
    logs = [[(record["epoch"], record.get(part, {})) for record in log] for log in logs]
    names = dict.fromkeys(name for log in logs for _, values in log for name in values)
    return {
        name: [[(epoch, values[name]) for epoch, values in log if name in values] for log in logs]
        for name in names
    }


def _chart(title: str, note: str, lines: Mapping[str, list[Points]], *, log: bool = False) -> str:
    every = [point for several in lines.values() for line in several for point in line]
    chart = Chart(every, x="epoch", y=title, log=log)
    names = [(series(index), name.replace("_", " ")) for index, name in enumerate(lines)]
    for (style, name), several in zip(names, lines.values(), strict=True):
        draw(chart, several, style, name)
    return html.figure(title, (html.legend(names) if len(lines) > 1 else "") + chart.svg(), note)


def draw(chart: Chart, lines: Sequence[Points], style: str, name: str) -> None:
    """The mean of several lines within their range."""
    mean, between = mean_and_range(lines)
    if len(lines) > 1:
        chart.band(between, style)
    chart.line(mean, style, name)


def classes(found: Sequence[Predictions]) -> list[str]:
    """Calibration, accuracy by class and what is taken for what, over the seeds."""
    names = [str(name) for name in found[0].classes]
    counts = np.zeros((len(names), len(names)), dtype=int)
    for one in found:
        np.add.at(counts, (one.labels, one.student), 1)
    shares = counts.diagonal() / np.maximum(counts.sum(1), 1)
    reference = np.zeros(0)
    if len(found[0].teacher):
        right = found[0].labels[found[0].teacher == found[0].labels]
        of_class = np.bincount(found[0].labels, minlength=len(names))
        reference = np.bincount(right, minlength=len(names)) / np.maximum(of_class, 1)
    shown = [_reliability(found), _class_bars(names, shares, reference)]
    if len(names) <= MATRIX:
        shown.append(_matrix(names, counts))
    else:
        shown.append(_pairs(names, counts))
    return shown


def _reliability(found: Sequence[Predictions]) -> str:
    chart = Chart(
        [(0, 0), (1, 1)], x="confidence", y="share of right answers", ticks="any", limits=(0, 1)
    )
    chart.line([(0, 0), (1, 1)], "diagonal", "calibrated", marks=False)
    parts = [("s0", "student", np.concatenate([one.student for one in found]),
              np.concatenate([one.student_confidence for one in found]))]  # fmt: skip
    labels = np.concatenate([one.labels for one in found])
    if len(found[0].teacher):
        parts.append(("s1", "teacher", found[0].teacher, found[0].teacher_confidence))
    for style, name, chosen, confidence in parts:
        bins = np.clip(np.ceil(confidence * BINS).astype(int), 1, BINS) - 1
        right = chosen == labels[: len(chosen)]
        points = [
            (float(confidence[bins == b].mean()), float(right[bins == b].mean()))
            for b in range(BINS)
            if (bins == b).sum() >= FEW
        ]
        chart.line(points, style, name)
    names = html.legend([(style, name) for style, name, *_ in parts])
    return html.figure("Calibration", names + chart.svg(), "above the diagonal is too modest")


def _class_bars(names: Sequence[str], shares: np.ndarray, reference: np.ndarray) -> str:
    order = np.argsort(-shares, kind="stable")
    chart = Chart(
        [(0, 0), (len(names), 100)], x="classes, best first", y="accuracy, %", ticks="none",
        limits=(0, 100),
    )  # fmt: skip
    for place, index in enumerate(order):
        title = f"{names[index]}: {100 * shares[index]:.1f} %"
        if len(reference):
            title += f", teacher {100 * reference[index]:.1f} %"
        chart.bar(place + 0.1, 0.8, 100 * shares[index], title)
        if len(reference):
            chart.level(place, 1, 100 * reference[index])
    keys = [("s0", "student")] + [("s1", "teacher")] * bool(len(reference))
    few = f"best first: {', '.join(names[index] for index in order)}" * (len(names) <= NAMED)
    return html.figure("Accuracy by class, %", html.legend(keys) + chart.svg(), few)


def _matrix(names: Sequence[str], counts: np.ndarray) -> str:
    rows = []
    for name, row in zip(names, counts, strict=True):
        total = max(row.sum(), 1)  # a class may have no test image
        cells = "".join(
            f'<td style="background:color-mix(in srgb, var(--c0) {100 * n / total:.0f}%, '
            f'var(--fill))">{n or ""}</td>'
            for n in row
        )
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    content = f"<table class='matrix'><tr><th></th>{head}</tr>{''.join(rows)}</table>"
    style = "wide" if len(names) > 10 else "double"
    content = f'<div class="scroll">{content}</div>'
    return html.figure("Confusion", content, "rows are the true classes", style=style)


def _pairs(names: Sequence[str], counts: np.ndarray) -> str:
    wrong = counts * (1 - np.eye(len(names), dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    rows = []
    for index in order:
        true, chosen = np.unravel_index(index, wrong.shape)
        if not wrong[true, chosen]:
            break
        share = 100 * wrong[true, chosen] / counts[true].sum()
        rows.append((escape(names[true]), escape(names[chosen]), f"{share:.1f}"))
    return html.figure(
        "Most often confused", html.table(("class", "taken for", "% of the class"), rows)
    )


def examples(one: Predictions) -> str:
    """Some test images with what student and teacher take them for."""
    shown = []
    if not len(one.examples):
        return ""
    # Some data, the digits for one, use the lowest few of 256 levels.
    brighter = (one.images.astype(float) * (255 / max(one.images.max(), 1))).astype(np.uint8)
    for position, pixels in zip(one.examples, brighter, strict=True):
        true = one.labels[position]
        answers = [_answer("student", one, one.student, one.student_confidence, position)]
        if len(one.teacher):
            answers.append(_answer("teacher", one, one.teacher, one.teacher_confidence, position))
        name = str(one.classes[true])
        shown.append(
            f"<figure>{html.image(pixels, name)}<figcaption><b>{escape(name)}</b><br>"
            f"{'<br>'.join(answers)}</figcaption></figure>"
        )
    note = "Drawn at random, the same for every run on these images."
    return f'<p class="soft">{note}</p><div class="examples">{"".join(shown)}</div>'


def _answer(
    who: str, one: Predictions, chosen: np.ndarray, confidence: np.ndarray, position: int
) -> str:
    right = chosen[position] == one.labels[position]
    style, mark = ("right", "✓") if right else ("wrong", "✗")
    name = escape(str(one.classes[chosen[position]]))
    share = f"{100 * confidence[position]:.0f}\N{NO-BREAK SPACE}%"
    return f'{who} <span class="{style}">{mark} {name}</span> {share}'
