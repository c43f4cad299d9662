# SPDX-License-Identifier: Apache-2.0
"""Draws the committed results and writes their tables.

python benchmarks/plot.py           the plots, RESULTS.md, and README between its markers
python benchmarks/plot.py --check   only whether both say what the results say

The newest result of each device counts. Every case of a result is in the table, lost or won.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from readme import rewritten

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
TABLES = ROOT / "benchmarks" / "RESULTS.md"

BASELINES = ("eager", "compile")
OURS = ("cpu", "triton", "cuda")
COLOURS = {"eager": "#9aa5b1", "compile": "#5b6b7b", "liger-kernel": "#c08a3e"}
OUR_COLOURS = {"cpu": "#1f7a5c", "triton": "#1f7a5c", "cuda": "#7fbf3f"}


def newest() -> list[Path]:
    """The newest result of each device."""
    by_device: dict[Path, Path] = {}
    for path in sorted(RESULTS.glob("*/*.json")):
        by_device[path.parent] = path
    return list(by_device.values())


def pairs(result: dict) -> list[tuple[dict, dict]]:
    """Each case's rows with upstream gradient 1 and 0.5; a run cut short may end with one alone."""
    by_case: dict[tuple, dict] = {}
    for row in result["rows"]:
        by_case.setdefault((row["loss"], row["shape"], row["dtype"]), {})[row["upstream"]] = row
    return [(rows[1.0], rows[0.5]) for rows in by_case.values() if len(rows) == 2]


def shape_name(row: dict) -> str:
    size = "x".join(map(str, row["size"]))
    return size if row["shape"] == size else f"{row['shape']} {size}"


def label(name: str) -> str:
    return f"kdkernels ({name})" if name in OURS else name


def milliseconds(row: dict, name: str) -> str:
    if name not in row["contenders"]:
        return "-"
    value = row["contenders"][name]["seconds"] * 1e3
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def memory(row: dict, name: str) -> str:
    if name not in row["contenders"]:
        return "-"
    return f"{row['contenders'][name]['extra_bytes'] / row['gradient_bytes']:.2f}"


def table(result: dict) -> str:
    """A line per case and backend of ours."""
    present = {name for row in result["rows"] for name in row["contenders"]}
    others = [n for n in (*BASELINES, "liger-kernel") if n in present]
    ours = [n for n in OURS if n in present]
    header = [
        "loss", "shape", "dtype", *(f"{name}, ms" for name in others), "kdkernels", "ms",
        "x eager", "x best baseline", "same, upstream 0.5", "of a copy's speed",
        "loss error, eager", "ours", "memory, eager", "ours",
    ]  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for unit, half in pairs(result):
        for name in ours:
            line = _line(unit, half, name, others)
            if line:
                lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def _line(unit: dict, half: dict, name: str, others: list[str]) -> list[str] | None:
    found = unit["contenders"].get(name)
    if found is None:
        return None
    eager = unit["contenders"].get("eager")
    speedups = [
        f"{row['contenders'][name]['speedup']:.1f}" if "speedup" in row["contenders"][name] else "-"
        for row in (unit, half)
    ]
    return [
        f"`{unit['loss']}`",
        shape_name(unit),
        unit["dtype"],
        *(milliseconds(unit, other) for other in others),
        name,
        milliseconds(unit, name),
        f"{eager['seconds'] / found['seconds']:.1f}" if eager else "-",
        *speedups,
        f"{found['share_of_copy']:.0%}",
        f"{eager['loss_error']:.0e}" if eager else "-",
        f"{found['loss_error']:.0e}",
        memory(unit, "eager"),
        memory(unit, name),
    ]


def near_zero_table(result: dict) -> str:
    names = list(result["near_zero"][0]["contenders"])
    lines = [f"| loss | true value | {' | '.join(names)} |", "| --- " * (len(names) + 2) + "|"]
    for row in result["near_zero"]:
        errors = [f"{row['contenders'][name]['worst_error']:.0e}" for name in names]
        lines.append(f"| `{row['loss']}` | {row['true']:.0e} | {' | '.join(errors)} |")
    return "\n".join(lines)


def heading(result: dict) -> str:
    environment = result["environment"]
    info = environment["info"]
    if environment["settings"]["device"] == "cpu":
        where = f"{info['cpu']['model']}, {environment['threads']} threads, {info['cpu']['isa']}"
    else:
        where = info["gpus"][0]["name"]
    modified = " (modified)" if environment["dirty"] else ""
    commit = (environment["commit"] or "unknown")[:10] + modified
    return f"{where}; torch {info['torch']}; {environment['date'][:10]}, commit {commit}"


def block(paths: list[Path]) -> str:
    """What stands between README's markers."""
    parts = []
    for path in paths:
        result = json.loads(path.read_text())
        plot = path.with_suffix(".svg").relative_to(ROOT).as_posix()
        cases = pairs(result)
        lost = sum(
            unit["contenders"][name]["speedup"] < 1
            for unit, _ in cases
            for name in OURS
            if name in unit["contenders"]
        )
        parts += [
            f"**{heading(result)}**",
            f"![speed against eager and torch.compile]({plot})",
            f"All {len(cases)} cases, {lost} of them lost, with errors and memory: "
            f"[benchmarks/RESULTS.md](benchmarks/RESULTS.md).",
        ]
    return "\n\n".join(parts)


def tables(paths: list[Path]) -> str:
    """RESULTS.md."""
    parts = ["# Results", "Written by `plot.py`; what is measured is in [README.md](README.md)."]
    for path in paths:
        result = json.loads(path.read_text())
        parts += [
            f"## {heading(result)}",
            table(result),
            "Memory is the peak above the inputs, in sizes of the gradient. Worst relative error "
            "of 64 single rows of 4096 classes, fp32, as the student comes close to the teacher:",
            near_zero_table(result),
        ]
    return "\n\n".join(parts) + "\n"


def panels_of(rows: list[dict]) -> list[tuple]:
    """Title, cases and their names: a panel per loss of many cases, one per shape of the others."""
    by_loss: dict[str, list] = {}
    for row in rows:
        by_loss.setdefault(row["loss"], []).append(row)
    panels, others = [], {}
    for loss, cases in by_loss.items():
        if len(cases) > 2:
            panels.append((loss, cases, lambda row: f"{shape_name(row)} {row['dtype']}"))
        else:
            for row in cases:
                others.setdefault(shape_name(row), []).append(row)
    panels += [(shape, cases, lambda row: row["loss"]) for shape, cases in others.items()]
    return panels


def draw(path: Path) -> None:
    """Speed of every contender over the best baseline."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "kdkernels"  # the same file from the same numbers
    result = json.loads(path.read_text())
    rows = [row for row in result["rows"] if row["upstream"] == 1]
    panels = panels_of(rows)
    figure = Figure(figsize=(10, 3.2 * len(panels)), layout="constrained")
    every = figure.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (title, cases, names_of) in zip(every, panels, strict=True):
        names = [n for n in (*COLOURS, *OUR_COLOURS) if any(n in r["contenders"] for r in cases)]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            at = [
                (x, row["contenders"][name])
                for x, row in enumerate(cases)
                if "speedup" in row["contenders"].get(name, {})
            ]
            speed = [found["speedup"] for _, found in at]
            spread = [
                [s - s * f["seconds"] / f["p80"] for s, (_, f) in zip(speed, at, strict=True)],
                [s * f["seconds"] / f["p20"] - s for s, (_, f) in zip(speed, at, strict=True)],
            ]
            axes.bar(
                [x + (i - (len(names) - 1) / 2) * width for x, _ in at],
                speed, width, label=label(name), color=(COLOURS | OUR_COLOURS)[name],
                yerr=spread, ecolor="#444444", error_kw={"lw": 0.8},
            )  # fmt: skip
        axes.axhline(1, color="#444444", lw=0.8)
        axes.set_xticks(
            range(len(cases)), [names_of(row).replace(" ", "\n") for row in cases], fontsize=8,
            rotation=0 if len(cases) < 9 else 60, ha="center" if len(cases) < 9 else "right",
        )  # fmt: skip
        axes.set_title(f"{title}, forward and backward", fontsize=10, loc="left")
        axes.set_ylabel("x best baseline")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if they differ")
    arguments = parser.parse_args()
    paths = newest()
    readme = README.read_text()
    wanted = rewritten(readme, "benchmark", block(paths)) if paths else readme
    if arguments.check:
        if readme != wanted or TABLES.read_text() != tables(paths):
            print("README.md or RESULTS.md do not show the results: run python benchmarks/plot.py")
            return 1
        return 0
    for path in paths:
        draw(path)
    README.write_text(wanted)
    TABLES.write_text(tables(paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
