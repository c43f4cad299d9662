# SPDX-License-Identifier: Apache-2.0
"""Keeps the accuracies of ``accuracy.py``: results.json, their table and their plot.

python benchmarks/accuracy_table.py           the table and the plot from results.json
python benchmarks/accuracy_table.py --check   only whether README has that table
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from readme import rewritten

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "accuracy" / "tiny-imagenet-even100"
README = ROOT / "README.md"
COLUMNS = (
    ("best epoch, test", ("test", "accuracy"), 100, 2),
    ("last epoch, test", ("test", "accuracy_of_last_epoch"), 100, 2),
    ("last 10 epochs, validation", ("val", "mean_of_last_10"), 100, 2),
    ("agreement with teacher", ("test", "agreement"), 100, 1),
    ("KL to teacher", ("test", "kl_to_teacher"), 1, 3),
    ("ECE", ("test", "ece"), 100, 1),
)


def keep(folder: Path, name: str, results: dict[str, Any], order: list[str]) -> None:
    """Put the results of a method among those kept, without what is only of that machine."""
    path = folder / "results.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    environment = results["environment"]
    places = ("data", "teacher_checkpoint")
    kept[name] = {
        "config": {key: value for key, value in results["config"].items() if key not in places},
        "teachers": [results[key] for key in results if key.startswith("teacher")],
        "runs": results["runs"],
        "environment": {
            "kdkernels": environment["kdkernels"],
            "torch": environment["torch"],
            "cpu": environment["cpu"]["model"],
            "isa": environment["cpu"]["isa"],
        },
    }
    ordered = {name: kept[name] for name in dict.fromkeys((*order, *kept)) if name in kept}
    path.write_text(json.dumps(ordered, indent=1) + "\n")


def table(kept: dict[str, Any]) -> str:
    """A line for each method."""
    header = ["method", *(heading for heading, *_ in COLUMNS), "over `ce`"]
    lines = ["| " + " | ".join(header) + " |", "| --- " + "| ---: " * (len(header) - 1) + "|"]
    for name, method in kept.items():
        cells = []
        for _, (part, key), factor, digits in COLUMNS:
            found = [factor * run[part][key] for run in method["runs"] if key in run[part]]
            cells.append(mean_and_std(found, digits) if found else "")
        lines.append(f"| `{name}` | {' | '.join([*cells, over(method, kept['ce'])])} |")
    return "\n".join(lines)


def over(method: dict[str, Any], baseline: dict[str, Any]) -> str:
    """The gain in test accuracy, seed by seed."""
    by_seed = {run["seed"]: run["test"]["accuracy"] for run in baseline["runs"]}
    gains = [100 * (run["test"]["accuracy"] - by_seed[run["seed"]]) for run in method["runs"]]
    return "" if method is baseline else mean_and_std(gains, 2, sign="+")


def mean_and_std(values: list[float], digits: int, sign: str = "") -> str:
    return f"{statistics.fmean(values):{sign}.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def block(kept: dict[str, Any]) -> str:
    """What stands between README's markers."""
    first = next(iter(kept.values()))
    teacher, run, config = first["teachers"][0], first["runs"][0], first["config"]
    seeds = ", ".join(str(run["seed"]) for run in first["runs"])
    plot = (RESULTS / "accuracy.svg").relative_to(ROOT).as_posix()
    return (
        f"Students {config['student']} ({run['parameters']:,} parameters) of a "
        f"{teacher['model']} with {100 * teacher['test']['accuracy']:.1f} % on test; per cent, "
        f"mean ± deviation over seeds {seeds} ([every seed]({plot})):\n\n{table(kept)}"
    )


def draw(kept: dict[str, Any], path: Path) -> None:
    """Test accuracy of every seed and validation accuracy of the last epochs."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "kdkernels"  # the same file from the same numbers
    figure = Figure(figsize=(7, 0.8 + 0.38 * len(kept)), layout="constrained")
    axes = figure.subplots()
    for place, method in enumerate(kept.values()):
        found = [100 * run["test"]["accuracy"] for run in method["runs"]]
        axes.plot(found, [place] * len(found), "o", color="#1f7a5c", alpha=0.7)
        axes.plot(statistics.fmean(found), place, "|", color="#1d2329", ms=16, mew=1.6)
    axes.set_yticks(range(len(kept)), kept)
    axes.set_ylim(len(kept) - 0.4, -0.6)
    axes.set_xlabel("test accuracy, %: three seeds and their mean")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#d9dee3")
    axes.set_axisbelow(True)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if they differ")
    arguments = parser.parse_args()
    kept = json.loads((RESULTS / "results.json").read_text())
    readme = README.read_text()
    wanted = rewritten(readme, "accuracy", block(kept))
    if arguments.check:
        if readme != wanted:
            print("README.md does not show the results: run python benchmarks/accuracy_table.py")
        return int(readme != wanted)
    draw(kept, RESULTS / "accuracy.svg")
    README.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
