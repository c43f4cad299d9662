# SPDX-License-Identifier: Apache-2.0
"""Run folders as they are found: finished, unfinished or damaged."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdkernels.train import checkpoint, predictions
from kdkernels.train.errors import InputError
from kdkernels.train.metrics import summarise
from kdkernels.train.predictions import Predictions
from kdkernels.train.report.html import short


@dataclass
class Seed:
    """One model of a run; ``results`` and ``predictions`` are there once it has finished."""

    number: int
    log: list[dict[str, Any]] = field(default_factory=list)
    results: dict[str, Any] | None = None
    predictions: Predictions | None = None


@dataclass
class Run:
    """A folder of ``kdkernels train``. ``problems`` say what is missing or damaged."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    seeds: list[Seed] = field(default_factory=list)
    teachers: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    label: str = ""

    @property
    def finished(self) -> list[Seed]:
        """The seeds that have results."""
        return [seed for seed in self.seeds if seed.results]

    @property
    def logged(self) -> list[Seed]:
        """The seeds that have an epoch to show."""
        return [seed for seed in self.seeds if seed.log]

    @property
    def summary(self) -> dict[str, dict[str, float | None]]:
        """Mean and deviation over the finished seeds."""
        return summarise([seed.results for seed in self.finished]) if self.finished else {}


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs at ``paths``, or in the folders of these, labelled so that they can be told apart.

    Raises an error if there is nothing to show of any of them.
    """
    folders = [folder for path in paths for folder in _folders(path)]
    runs = [_read(folder) for folder in dict.fromkeys(folders)]
    if not any(run.logged for run in runs):
        found = [f"{run.folder}: {problem}" for run in runs for problem in run.problems]
        raise InputError("; ".join(found) or "no runs given")
    _label(runs)
    return runs


def differences(runs: Iterable[Run]) -> dict[str, list[Any]]:
    """Options that are not the same in all runs, with the value of each (None: it has none)."""
    configs = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [config.get(key) for config in configs] for key in keys}
    return {key: found for key, found in values.items() if any(x != found[0] for x in found)}


def _folders(path: Path) -> list[Path]:
    inside = sorted(config.parent for config in path.glob("*/config.json"))
    return inside if inside and not (path / "config.json").exists() else [path]


def _read(folder: Path) -> Run:
    run = Run(folder)
    if not folder.is_dir():
        run.problems.append("no such folder")
        return run
    try:
        run.config = checkpoint.read_json(folder / "config.json")
        run.config.pop("options", None)  # the method's, among the others with their defaults
    except InputError:
        missing = not (folder / "config.json").exists()
        run.problems.append(
            "not a folder of kdkernels train (config.json is missing)"
            if missing
            else "config.json is damaged"
        )
    if (folder / "results.json").exists():
        try:
            results = checkpoint.read_json(folder / "results.json")
            run.environment = results["environment"]
            names = [name for name in results if name.startswith("teacher")]
            run.teachers = [results[name] for name in names]
        except (InputError, KeyError):
            run.problems.append("results.json is damaged")
    found = {int(path.name[5:]): path for path in folder.glob("seed-*") if _is_seed(path)}
    for number in sorted({*found, *run.config.get("seed", ())}):
        run.seeds.append(_read_seed(folder / f"seed-{number}", number, run))
    return run


def _is_seed(path: Path) -> bool:
    return re.fullmatch(r"seed-\d+", path.name) is not None


def _read_seed(folder: Path, number: int, run: Run) -> Seed:
    seed = Seed(number)
    if (folder / "log.jsonl").exists():
        try:
            seed.log = checkpoint.read_lines(folder / "log.jsonl")
            for record in seed.log:
                record["epoch"], record["val"]["accuracy"], record["train"]["loss"]
        except (ValueError, KeyError, TypeError):
            seed.log = []
            run.problems.append(f"seed {number}: log.jsonl is damaged")
    if not (folder / "results.json").exists():
        epochs = run.config.get("epochs", "?")
        done = f"unfinished after {len(seed.log)} of {epochs} epochs" if seed.log else "not begun"
        run.problems.append(f"seed {number}: {done}")
        return seed
    try:
        results = checkpoint.read_json(folder / "results.json")
        results["parameters"], results["epochs"], results["test"]["accuracy"]
        results["val"]["best_epoch"]
        seed.results = results
    except (InputError, KeyError, TypeError):
        run.problems.append(f"seed {number}: results.json is damaged")
    if (folder / "test.npz").exists():
        try:
            seed.predictions = predictions.load(folder / "test.npz")
        except InputError:
            run.problems.append(f"seed {number}: test.npz is damaged")
    return seed


def _label(runs: list[Run]) -> None:
    """The method's name; where several have it, also what they differ in, or their folder."""
    for run in runs:
        same = [other for other in runs if _method(other) == _method(run)]
        differing = [key for key in differences(same) if key in run.config and key != "seed"]
        own = [f"{key} {short(run.config[key])}" for key in differing]
        run.label = f"{_method(run)} ({', '.join(own)})" if 0 < len(own) < 3 else _method(run)
    labels = [run.label for run in runs]
    for run in runs:
        if labels.count(run.label) > 1:
            run.label = f"{run.label}, {run.folder.name}"


def _method(run: Run) -> str:
    return run.config.get("method", run.folder.name)
