# SPDX-License-Identifier: Apache-2.0
"""The results of ``train_speed.py`` as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median, stdev


def tables(result: dict, loops: Sequence[str], methods: Mapping[str, tuple[str, str]]) -> str:
    """The result as Markdown.

    ``loops`` are names of contenders, the first of them what the others are compared with;
    ``methods`` have two each, with the reference's losses and with fused ones.
    """
    now, settings = result["environment"], result["environment"]["settings"]
    lines = [
        f"{now['device']}, {now['threads']} threads, {now['date'][:10]}, commit "
        f"{(now['commit'] or 'unknown')[:10]}. {settings['student']} taught by "
        f"{settings['teacher']} (accuracy {100 * result['teacher_accuracy']:.1f} %), batch "
        f"{settings['batch_size']}, {settings['images']} images of {settings['data']}, "
        f"{settings['steps']} steps a round.",
        "",
    ]
    if rounds := result["rounds"]["loops"]:
        head = ("loop", "samples/s", "x plain", "loss, % of the step", "loss, ms", "accuracy, %")
        lines += row(head) + row(["---"] * len(head))
        for name in loops:
            runs = [turn[name] for turn in rounds]
            lines += row([
                name, f"{middle(runs, 'samples_per_second'):.0f}",
                ratios(rounds, loops[0], name), f"{100 * middle(runs, 'loss_share'):.2f}",
                f"{middle(runs, 'loss_ms'):.3f}", spread([100 * run["accuracy"] for run in runs]),
            ])  # fmt: skip
        lines.append("")
    for name, cost in result["cache"].items():
        each = 1000 * cost["seconds"] / cost["images"] / cost["views_made"]
        lines.append(
            f"- Making the cache of {name}: {cost['seconds']:.1f} s for {cost['views_made']} "
            f"view(s) of {cost['images']} images, {each:.3f} ms each."
        )
    if rounds := result["rounds"]["methods"]:
        head = (
            "method", "reference, samples/s", "fused", "ratio", "loss, % of the step, reference",
            "fused", "loss, ms, reference", "fused",
        )  # fmt: skip
        lines += ["", *row(head), *row(["---"] * len(head))]
        for method, pair in methods.items():
            if with_both := [turn for turn in rounds if pair[0] in turn]:
                both = [[turn[name] for turn in with_both] for name in pair]
                lines += row([
                    method, *(f"{middle(runs, 'samples_per_second'):.0f}" for runs in both),
                    ratios(with_both, *pair),
                    *(f"{100 * middle(runs, 'loss_share'):.2f}" for runs in both),
                    *(f"{middle(runs, 'loss_ms'):.2f}" for runs in both),
                ])  # fmt: skip
    if whole := result.get("accuracy"):
        lines += ["", *whole_trainings(whole)]
    return "\n".join(lines) + "\n"


def whole_trainings(found: dict) -> list[str]:
    """What students know in the end: the mean over seeds and its standard deviation."""
    protocol, runs = found["protocol"], found["runs"]
    lines = [
        "Whole trainings: {student} taught by {teacher} of accuracy.py, {epochs} epochs of "
        "{images} images, seeds from 0.".format(**protocol),
        "",
    ]
    head = ("loop", "seeds", "samples/s", "accuracy, %", "over the first")
    lines += row(head) + row(["---"] * len(head))
    first = None
    for name, trained in runs.items():
        values = [100 * run["accuracy"] for run in trained]
        first = mean(values) if first is None else first
        lines += row([
            name, str(len(values)), f"{middle(trained, 'samples_per_second'):.0f}",
            spread(values), f"{mean(values) - first:+.2f}",
        ])  # fmt: skip
    return lines


def row(cells: Iterable[str]) -> list[str]:
    """A line of a table."""
    return ["| " + " | ".join(cells) + " |"]


def middle(runs: list[dict], name: str) -> float:
    """The median over rounds."""
    return median(run[name] for run in runs)


def ratios(rounds: list[dict], one: str, other: str) -> str:
    """How many times as fast the other is: median, least and greatest over rounds."""
    each = [turn[other]["samples_per_second"] / turn[one]["samples_per_second"] for turn in rounds]
    return f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.2f} ± {stdev(values) if len(values) > 1 else 0:.2f}"
