# SPDX-License-Identifier: Apache-2.0
"""How fast the trainer is: against a plain loop, and with fused against reference losses.

python benchmarks/train_speed.py [--device cuda] [--rounds 3] [--part loops | methods | accuracy]

A round trains every contender from the same weights, the round's own, for the same few steps, one
after the other, every other round in reverse; ratios are taken within a round, and their median
over rounds counts. Rounds are added to the result of the day, which must have been made
with the same settings at the same commit. Methods run at the precision the trainer chooses by
itself, unless told otherwise.

So few steps teach nothing. That contenders learn alike is shown apart, by whole trainings of a
small student (``PROTOCOL``, written down before it was run) with seeds 0, 1 and 2.

Writes benchmarks/results/train_speed/<device>/<date>.json, and a table beside it.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import plain_loop
import torch
import train_speed_data
import train_speed_table
from torch import nn

from kdkernels.bench import Settings
from kdkernels.bench.rows import environment
from kdkernels.train import checkpoint
from kdkernels.train.config import Config
from kdkernels.train.data import Dataset, split_off
from kdkernels.train.devices import make_fabric, native_precision
from kdkernels.train.loop import fit
from kdkernels.train.metrics import accuracy, predict
from kdkernels.train.models import build_model
from kdkernels.train.options import make_method

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared/data/tiny-imagenet-even100-32px.tar.xz"
# Methods over maps have large outputs to keep; so many images will do for their steps.
MAPS, FEW = ("at", "fitnet"), 4096
# Name in the table: method and its options.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "kd": ("kd", {}),
    "dkd": ("dkd", {}),
    "skd": ("skd", {}),
    "skd, batch": ("skd", {"tokens": "batch"}),
    "at": ("at", {}),
    "fitnet": ("fitnet", {}),
    "crd": ("crd", {}),
}
# Whole trainings: the student, its teacher (of accuracy.py), epochs of so many images.
PROTOCOL = {"student": "resnet8", "teacher": "resnet20", "epochs": 5, "images": 10000}
PROTOCOL_TEACHER = ROOT / "benchmarks/results/accuracy/tiny-imagenet-even100/resnet20.safetensors"
SEEDS = (0, 1, 2)
CACHED_VIEWS = 2  # of each image, where the teacher is cached; else one of its own in every epoch


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
PARTS = ("loops", "methods", "accuracy")


def pair(method: str, precision: str) -> tuple[Contender, Contender]:
    """A method with the reference's losses, and with fused ones."""
    one, other = (
        Contender("kdkernels", precision, backend, cached=True, method=method)
        for backend in ("reference", "auto")
    )
    return one, other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--part", default="all", choices=("all", *PARTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--precision", default="auto", choices=("auto", "32-true", "bf16-mixed"), help="of methods"
    )
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
    parts = PARTS if arguments.part == "all" else (arguments.part,)
    if "loops" in parts:
        bench.run("loops", LOOPS)
    if "methods" in parts:
        precision = arguments.precision
        if precision == "auto":
            precision = native_precision(bench.device)
        pairs = [pair(method, precision) for method in arguments.methods]
        bench.run("methods", [contender for both in pairs for contender in both])
    if "accuracy" in parts:
        bench.compare_accuracy()


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
        self.whole = train_speed_data.load(arguments.data, self.work)
        self.data = train_speed_data.shortened(self.whole)
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
            if any(before["environment"][name] != now[name] for name in same):
                raise SystemExit(
                    f"{self.path}: is of other settings or of another commit; move it away, or "
                    "give another --output"
                )
            self.result = before

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

    def fit(
        self, config: Config, student: nn.Module, teachers: list, data: Dataset, seed: int
    ) -> dict[str, Any]:
        """The trainer's results."""
        name, options = METHODS.get(config.method, (config.method, {}))
        config = replace(config, method=name)
        fabric = make_fabric(config)
        method = make_method(name, config.backend, options)
        with tempfile.TemporaryDirectory() as out:
            return fit(fabric, method, student, teachers, data, config, seed=seed, out=Path(out))

    def run(self, part: str, contenders: list[Contender]) -> None:
        """Rounds over these contenders, forwards and backwards in turn."""
        done = self.result["rounds"][part]
        for _ in range(self.rounds):
            seed = len(done)
            turn = {
                contender.name: self.measure(contender, seed)
                for contender in contenders[:: -1 if seed % 2 else 1]
            }
            done.append(turn)
            self.keep()

    def measure(self, contender: Contender, seed: int) -> dict[str, float]:
        """One short training from weights of its round."""
        data = self.data
        if contender.method in MAPS:
            data = replace(data, train=replace(data.train, rows=data.train.rows[:FEW]))
        return self.train(contender, self.config, self.teacher, data, seed)

    def compare_accuracy(self) -> None:
        """The whole trainings that are not done yet, in the plain loop and in the trainer."""
        data, teacher, steps = self.whole, self.teacher, self.config.max_steps
        if data.name != train_speed_data.STAND_IN:
            teacher = checkpoint.load_model(PROTOCOL_TEACHER, data.shape, len(data.classes))[1]
            few = split_off(data.train, PROTOCOL["images"] / len(data.train), 0)[1]
            data = replace(data, train=few, val=self.data.val)
            steps = PROTOCOL["epochs"] * (len(few) // self.config.batch_size)
        config = replace(
            self.config, student=PROTOCOL["student"], epochs=PROTOCOL["epochs"], max_steps=steps
        )
        kept = self.result.setdefault("accuracy", {"protocol": PROTOCOL, "runs": {}})["runs"]
        for seed in SEEDS:
            for contender in (LOOPS[0], *LOOPS[2:]):
                runs = kept.setdefault(contender.name, [])
                if len(runs) <= seed:
                    recipe = replace(config, cache_views=CACHED_VIEWS if contender.cached else None)
                    runs.append(self.train(contender, recipe, teacher, data, seed))
                    self.keep()

    def train(
        self, contender: Contender, config: Config, teacher: nn.Module, data: Dataset, seed: int
    ) -> dict[str, float]:
        """One training by ``config``, from weights of that seed."""
        config = replace(
            config, method=contender.method, precision=contender.precision,
            backend=contender.backend,
            teacher_cache=str(self.work / "cache") if contender.cached else None,
        )  # fmt: skip
        torch.manual_seed(seed)
        student = build_model(config.student, data.shape, len(data.classes))
        teacher = copy.deepcopy(teacher)
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
                name = f"{contender.name} of {config.student}"
                self.result["cache"][name] = cost | {"images": len(data.train)}
        print(contender.name, {name: round(value, 4) for name, value in found.items()}, flush=True)
        return found

    def keep(self) -> None:
        """Write the result so far, and its table."""
        self.path.write_text(json.dumps(self.result, indent=1) + "\n")
        pairs = {
            f"{method}, {precision}": tuple(contender.name for contender in pair(method, precision))
            for precision in ("32-true", "bf16-mixed")
            for method in METHODS
        }
        text = train_speed_table.tables(self.result, [loop.name for loop in LOOPS], pairs)
        self.path.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
