# SPDX-License-Identifier: Apache-2.0
"""An experiment: data, a teacher, and one student for each seed, in one folder.

The folder holds ``config.json``; ``teacher/`` if one was trained and ``seed-N/`` for each seed,
with ``checkpoint.pt``, ``log.jsonl`` and, once finished, ``test.npz``, ``model.safetensors`` and
``results.json``; and over all seeds ``results.json`` and ``curves.png``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

import kdkernels
from kdkernels import backends
from kdkernels.train import checkpoint, report, teacher_cache
from kdkernels.train.claim import check, claimed
from kdkernels.train.config import Config
from kdkernels.train.data import Batches, Dataset, load_data, steps_in_short
from kdkernels.train.devices import make_fabric, on_first, predict_together
from kdkernels.train.errors import InputError
from kdkernels.train.learner import acquaint
from kdkernels.train.logs import require_tensorboard
from kdkernels.train.loop import fit
from kdkernels.train.methods import Method, Run
from kdkernels.train.metrics import accuracy, summarise
from kdkernels.train.models import build_model
from kdkernels.train.options import make_method, resolved_options
from kdkernels.train.state import whole
from kdkernels.train.teachers import Teacher


def run(config: Config, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run an experiment and return what its ``results.json`` holds, and its folder as ``out``.

    ``options`` are those of the method, e.g. ``{"temperature": 4.0}``. What can be checked is
    checked before anything is written.
    """
    options = dict(options or {})
    method = make_method(config.method, config.backend, options)
    if method.needs_teacher and not (config.teacher or config.teacher_checkpoint):
        raise InputError(f"--method {config.method}: expected --teacher or --teacher-checkpoint")
    fabric, config = set_up(config)
    record = config.resolved() | resolved_options(config.method, options)
    # Reading images can take long: first what needs none of them.
    if config.out:
        on_first(fabric, partial(check, Path(config.out), record, resume=config.resume))
    for path in teacher_files(config):
        named("--teacher-checkpoint", checkpoint.require_model_file, path)
    data = load_data(
        config.data,
        val_fraction=config.val_fraction,
        split_seed=config.split_seed,
        image_size=config.image_size,
        cache_dir=Path(config.cache_dir) if config.cache_dir else user_cache(),
    )
    report.say(*data.described(), *steps_in_short(len(data.train), config.batch_size))
    # What each teacher learns: all classes, or those it is a specialist of.
    parts = [data.only(classes) for classes in method.course.specialities(len(data.classes))]
    teachers = given_teachers(config, data.shape, parts)
    rehearse(fabric, method, config, data, parts, [model for _, model in teachers])

    out = Path(config.out or f"runs/{data.name}-{config.method}-{config.student}")
    counts = {part: len(split) for part, split in data.splits.items()}
    results = {"config": record, "environment": kdkernels.info(), "images": counts}
    with claimed(fabric, out, record, options, resume=config.resume):
        report.say(
            f"{out}: {config.precision} on {fabric.world_size} x {fabric.device.type}, losses in "
            f"float32 or better"
        )

        places = ["teacher"] if len(parts) == 1 else [f"teacher-{n + 1}" for n in range(len(parts))]
        if config.teacher:
            teachers = [
                trained_teacher(fabric, part, config, out / place, label)
                for part, place, label in zip(parts, places, labels(config, parts), strict=True)
            ]
        for (name, model), part, place in zip(teachers, parts, places, strict=False):
            answers = predict_together(fabric, Teacher(fabric, model), part, part.test)
            results[place] = {"model": name, "test": {"accuracy": accuracy(*answers)}}
            if len(parts) > 1:
                results[place]["classes"] = part.classes
        models = [model for _, model in teachers]
        runs = []
        for seed in config.seed:
            method = make_method(config.method, config.backend, options)
            runs.append(train(fabric, method, models, data, config, seed, out / f"seed-{seed}"))
        trained = places if config.teacher else ()
        return conclude(fabric, out, results, runs, config, trained) | {"out": str(out)}


def set_up(config: Config) -> tuple[Fabric, Config]:
    """The processes of a run, and its config with the precision they compute in.

    What could only fail much later is refused: a backend that cannot run, a missing package.
    """
    fabric = make_fabric(config)
    report.console.quiet |= not fabric.is_global_zero
    if config.backend != "auto":
        runs, reason = backends.verdict("rowwise", config.backend, fabric.device.type)
        if not runs:
            raise InputError(f"--backend {config.backend}: cannot run here: {reason}")
    if config.tensorboard:
        require_tensorboard()
    return fabric, replace(config, precision=fabric.strategy.precision.precision)


def conclude(
    fabric: Fabric,
    out: Path,
    results: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    config: Config,
    trained: Sequence[str] = (),
) -> dict[str, Any]:
    """Write, over all seeds, results and curves, those of ``trained`` teachers with them."""
    results = {**results, "runs": runs, "summary": summarise(runs)}
    on_first(fabric, partial(checkpoint.write_json, out / "results.json", results))
    folders = {config.method: [out / f"seed-{seed}" for seed in config.seed]}
    folders |= {place: [out / place] for place in trained}
    on_first(fabric, partial(report.plot, out / "curves.png", folders))
    return results


def given_teachers(
    config: Config, shape: tuple[int, int, int], parts: Sequence[Dataset]
) -> list[tuple[str, nn.Module]]:
    """Names and models of ``config.teacher_checkpoint``, one for each of the ``parts``."""
    paths = teacher_files(config)
    if paths and len(paths) != len(parts):
        raise InputError(
            f"--teacher-checkpoint: expected {len(parts)} joined by commas, got {len(paths)}"
        )
    return [
        named("--teacher-checkpoint", checkpoint.load_model, path, shape, len(part.classes))
        for path, part in zip(paths, parts, strict=False)
    ]


def teacher_files(config: Config) -> list[Path]:
    """Those of ``config.teacher_checkpoint``."""
    return [Path(path) for path in (config.teacher_checkpoint or "").split(",") if path]


def named(option: str, make: Callable[..., Any], *arguments: Any) -> Any:
    """What ``make`` makes of the arguments; its errors begin with the option they come from."""
    try:
        return make(*arguments)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


def rehearse(
    fabric: Fabric,
    method: Method,
    config: Config,
    data: Dataset,
    parts: Sequence[Dataset],
    teachers: Sequence[nn.Module],
) -> None:
    """Refuse now, and not after a teacher's training, models that the method cannot use."""
    student = named("--student", build_model, config.student, data.shape, len(data.classes))
    if config.teacher:
        teachers = [
            named("--teacher", build_model, config.teacher, data.shape, len(part.classes))
            for part in parts
        ]
    shares = config.accumulate * fabric.world_size
    Batches(data, batch_size=config.batch_size, augment="none", seed=0, device="cpu", shares=shares)
    steps_per_epoch = max(len(data.train) // config.batch_size, 1)
    steps = min(config.epochs * steps_per_epoch, config.max_steps or math.inf)
    method.begin(Run(data, steps, steps_per_epoch))
    acquaint(fabric, method, method.course.wrap(student), teachers, data)
    teacher_cache.form_of(method, config, len(data.classes))


def train(
    fabric: Fabric,
    method: Method,
    teachers: Sequence[nn.Module],
    data: Dataset,
    config: Config,
    seed: int,
    out: Path,
    label: str = "",
) -> dict[str, Any]:
    """One model of ``config.student`` from one seed, or the results already in ``out``."""
    if on_first(fabric, (out / "results.json").exists):
        return checkpoint.read_json(out / "results.json")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = build_model(config.student, data.shape, len(data.classes))
    results = fit(fabric, method, model, teachers, data, config, seed=seed, out=out, label=label)
    made = config.student, whole(model.state_dict()), data.shape, len(data.classes)
    use = {"names": data.classes, "mean": data.mean.tolist(), "std": data.std.tolist()}
    on_first(fabric, partial(checkpoint.save_model, out / "model.safetensors", *made, **use))
    on_first(fabric, partial(checkpoint.write_json, out / "results.json", results))
    return results


def trained_teacher(
    fabric: Fabric, data: Dataset, config: Config, out: Path, label: str = ""
) -> tuple[str, nn.Module]:
    """The teacher, trained with cross-entropy unless ``out`` already has it."""
    as_student = replace(
        config,
        method="ce",
        student=config.teacher,
        epochs=config.teacher_epochs or config.epochs,
        max_steps=None if config.teacher_epochs else config.max_steps,
        teacher_cache=None,
        cache_views=None,
        cache_dtype="fp32",
        cache_topk=None,
        augment_seed=None,
    )
    method = make_method("ce", config.backend, {})
    train(fabric, method, [], data, as_student, config.teacher_seed, out, label)
    return checkpoint.load_model(out / "model.safetensors", data.shape, len(data.classes))


def labels(config: Config, parts: Sequence[Dataset]) -> list[str]:
    """What the log calls the teachers, each of its part of the classes."""
    if len(parts) == 1:
        return [f"teacher {config.teacher}"]
    return [
        f"teacher {number} of {len(parts)}, {config.teacher} ({part.classes_in_short})"
        for number, part in enumerate(parts, 1)
    ]


def user_cache() -> Path:
    """Where decoded image folders are kept unless told otherwise."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "kdkernels"
