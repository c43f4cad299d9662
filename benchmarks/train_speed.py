# SPDX-License-Identifier: Apache-2.0
"""How fast the trainer is: against a plain loop, and with fused against reference losses.

python benchmarks/train_speed.py [--device cuda] [--rounds 3] [--part loops | methods]

A round trains every contender from the same weights, the round's own, for the same few steps, one
after the other; ratios are taken within a round, and their median over rounds counts. Rounds are
added to the result of the day if that was made with the same settings. Writes
benchmarks/results/train_speed/<device>/<date>.json, and a table beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import plain_loop
import torch
from torch import nn

from kdkernels.bench import Settings
from kdkernels.bench.rows import environment
from kdkernels.train import checkpoint
from kdkernels.train.config import Config
from kdkernels.train.data import Dataset, Split, load_data
from kdkernels.train.devices import make_fabric
from kdkernels.train.experiment import make_method
from kdkernels.train.loop import fit
from kdkernels.train.metrics import accuracy, predict
from kdkernels.train.models import build_model

DATA = Path("../shared/data/tiny-imagenet-even100-32px.tar.xz")
VAL, TEST = 256, 1000  # images: enough to see that contenders learn alike
# Methods over maps have large outputs to keep; so many images will do for their steps.
MAPS, FEW = ("at", "fitnet"), 4096
METHODS = {
    "kd": {}, "dkd": {}, "skd": {}, "skd, batch": {"tokens": "batch"}, "at": {}, "fitnet": {},
    "crd": {},
}  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """One way to train; ``loop`` is "plain" or "kdkernels"."""

    loop: str
    precision: str = "32-true"
    backend: str = "auto"
    cached: bool = False
    method: str = "kd"

    @property
    def name(self) -> str:
        """For the record."""
        parts = [self.loop, self.method, self.precision, self.backend]
        return " ".join(parts + ["cached"] * self.cached)


LOOPS = (
    Contender("plain", backend="reference"),
    Contender("kdkernels", backend="reference"),
    Contender("kdkernels"),
    Contender("kdkernels", cached=True),
    Contender("kdkernels", "bf16-mixed"),
    Contender("kdkernels", "bf16-mixed", cached=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--part", default="all", choices=("all", "loops", "methods"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--teacher", default="resnet56")
    parser.add_argument("--teacher-steps", type=int, default=400, help="it is trained for")
    parser.add_argument("--data", type=Path, default=DATA, help="a stand-in is made if missing")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/train_speed"), help="kept for later"
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/train_speed"
    )
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True  # as the suites have it
    bench = Bench(arguments)
    if arguments.part != "methods":
        bench.run("loops", LOOPS)
    if arguments.part != "loops":
        bench.run(
            "methods",
            [
                Contender("kdkernels", backend=backend, cached=True, method=method)
                for method in arguments.methods
                for backend in ("reference", "auto")
            ],
        )


class Bench:
    """Data, a teacher, and the result that rounds are added to."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.work, self.rounds = arguments.work, arguments.rounds
        self.work.mkdir(parents=True, exist_ok=True)
        self.device = torch.device(arguments.device)
        self.config = Config(
            student=arguments.student, batch_size=arguments.batch_size, epochs=1,
            max_steps=arguments.steps, cache_views=1, accelerator=arguments.device, lr=0.05,
        )  # fmt: skip
        self.data = self.load(arguments.data)
        self.teacher = self.train_teacher(arguments.teacher, arguments.teacher_steps)
        settings = {
            name: getattr(arguments, name)
            for name in ("steps", "batch_size", "student", "teacher", "teacher_steps")
        } | {"data": self.data.name, "images": len(self.data.train)}
        now = environment(Settings(device=arguments.device)) | {"settings": settings}
        folder = arguments.output / now["device"]
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{now['date'][:10]}.json"
        logits, labels = predict(
            self.teacher.to(self.device), self.data, self.data.test, self.device
        )
        self.result = {
            "environment": now,
            "teacher_accuracy": accuracy(logits, labels),
            "cache": {},
            "rounds": {"loops": [], "methods": []},
        }
        if self.path.exists():
            before = json.loads(self.path.read_text())
            same = ("settings", "commit", "threads")
            if all(before["environment"][name] == now[name] for name in same):
                self.result = before

    def load(self, path: Path) -> Dataset:
        """The data, with so many images for validation and test as are worth the time."""
        if path.exists():
            data = load_data(
                str(path), val_fraction=0.1, split_seed=0, image_size=None, cache_dir=self.work
            )
        else:
            data = stand_in()
        rng = np.random.default_rng(0)
        val, test = (
            replace(split, rows=rng.permutation(split.rows)[:count])
            for split, count in ((data.val, VAL), (data.test, TEST))
        )
        return replace(data, val=val, test=test)

    def train_teacher(self, name: str, steps: int) -> nn.Module:
        """A teacher that has learned for some steps, from the folder for later if it is there."""
        shape, classes = self.data.shape, len(self.data.classes)
        path = self.work / f"{self.data.name}-{name}-{steps}.safetensors"
        if not path.exists():
            config = replace(
                self.config, method="ce", student=name, max_steps=steps, cache_views=None
            )
            torch.manual_seed(0)
            teacher = build_model(name, shape, classes)
            self.fit(config, teacher, [], self.data, 0)
            checkpoint.save_model(path, name, teacher.state_dict(), shape, classes)
        return checkpoint.load_model(path, shape, classes)[1]

    def fit(self, config: Config, student: nn.Module, teachers: list, data: Dataset, seed: int):
        """The trainer's results."""
        name, options = config.method.split(", ")[0], METHODS.get(config.method, {})
        config = replace(config, method=name)
        fabric = make_fabric(config)
        method = make_method(name, config.backend, options)
        with tempfile.TemporaryDirectory() as out:
            return fit(fabric, method, student, teachers, data, config, seed=seed, out=Path(out))

    def run(self, part: str, contenders: list[Contender]) -> None:
        """Rounds over these contenders, the first of them in turn."""
        done = self.result["rounds"][part]
        for _ in range(self.rounds):
            seed = len(done)
            first = seed % len(contenders)
            turn = {
                contender.name: self.measure(contender, seed)
                for contender in (*contenders[first:], *contenders[:first])
            }
            done.append(turn)
            self.keep()

    def measure(self, contender: Contender, seed: int) -> dict[str, float]:
        """One short training from weights of its round."""
        config = replace(
            self.config, method=contender.method, precision=contender.precision,
            backend=contender.backend,
            teacher_cache=str(self.work / "cache") if contender.cached else None,
        )  # fmt: skip
        data = self.data
        if contender.method in MAPS:
            data = replace(data, train=replace(data.train, rows=data.train.rows[:FEW]))
        torch.manual_seed(seed)
        student = build_model(config.student, data.shape, len(data.classes))
        teacher = copy.deepcopy(self.teacher)
        if contender.loop == "plain":
            found = plain_loop.train(student, teacher, data, config, self.device)._asdict()
            found["accuracy"] = accuracy(*predict(student, data, data.test, self.device))
        else:
            results = self.fit(config, student, [teacher], data, seed)
            found = {
                name: results[name] for name in ("samples_per_second", "loss_share", "loss_ms")
            }
            found["accuracy"] = results["test"]["accuracy_of_last_epoch"]
            cost = results.get("teacher_cache")
            if cost and cost["views_made"]:
                self.result["cache"][contender.name] = cost | {"images": len(data.train)}
        print(contender.name, {name: round(value, 4) for name, value in found.items()}, flush=True)
        return found

    def keep(self) -> None:
        """Write the result so far, and its table."""
        self.path.write_text(json.dumps(self.result, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(tables(self.result))


def stand_in(count: int = 6400, classes: int = 100) -> Dataset:
    """Blurred noise of its own for every class, with noise of each image's own."""
    rng = np.random.default_rng(0)
    labels = np.arange(count + VAL + TEST) % classes
    prototypes = rng.integers(0, 256, (classes, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    noise = rng.normal(0, 40, (len(labels), 32, 32, 3))
    images = (prototypes[labels] + noise).clip(0, 255).astype(np.uint8)
    parts = np.split(np.arange(len(labels)), [count, count + VAL])
    splits = [Split(images, labels, rows) for rows in parts]
    names = tuple(map(str, range(classes)))
    return Dataset.build("stand-in", names, "stand-in", "crop-flip", *splits)


def tables(result: dict) -> str:
    """The result as Markdown."""
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
        for contender in LOOPS:
            runs = [turn[contender.name] for turn in rounds]
            lines += row([
                contender.name, f"{middle(runs, 'samples_per_second'):.0f}",
                ratios(rounds, LOOPS[0].name, contender.name),
                f"{100 * middle(runs, 'loss_share'):.2f}", f"{middle(runs, 'loss_ms'):.3f}",
                spread([100 * run["accuracy"] for run in runs]),
            ])  # fmt: skip
        lines.append("")
    for name, cost in result["cache"].items():
        each = 1000 * cost["seconds"] / cost["images"] / cost["views_made"]
        lines.append(
            f"- Making the cache of {name}: {cost['seconds']:.1f} s for a view of "
            f"{cost['images']} images, {each:.3f} ms each."
        )
    if rounds := result["rounds"]["methods"]:
        head = (
            "method", "reference, samples/s", "fused", "ratio", "loss, % of the step, reference",
            "fused", "loss, ms, reference", "fused",
        )  # fmt: skip
        lines += ["", *row(head), *row(["---"] * len(head))]
        for method in METHODS:
            pair = [
                Contender("kdkernels", backend=backend, cached=True, method=method).name
                for backend in ("reference", "auto")
            ]
            if with_both := [turn for turn in rounds if pair[0] in turn]:
                both = [[turn[name] for turn in with_both] for name in pair]
                lines += row([
                    method, *(f"{middle(runs, 'samples_per_second'):.0f}" for runs in both),
                    ratios(with_both, *pair),
                    *(f"{100 * middle(runs, 'loss_share'):.2f}" for runs in both),
                    *(f"{middle(runs, 'loss_ms'):.2f}" for runs in both),
                ])  # fmt: skip
    return "\n".join(lines) + "\n"


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


if __name__ == "__main__":
    main()
