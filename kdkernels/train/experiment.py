# SPDX-License-Identifier: Apache-2.0
"""An experiment: data, a teacher, and one student for each seed, in one folder.

The folder holds ``config.json``, ``teacher/`` if one was trained, ``seed-N/`` for each seed (with
``checkpoint.pt``, ``log.jsonl``, ``model.safetensors``, ``results.json``), and over all seeds
``results.json`` and ``curves.png``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

import kdkernels
from kdkernels.train import checkpoint, report
from kdkernels.train.config import Config
from kdkernels.train.data import Dataset, load_data
from kdkernels.train.errors import InputError
from kdkernels.train.loop import fit
from kdkernels.train.methods import METHODS, Method
from kdkernels.train.metrics import accuracy, predict, spread
from kdkernels.train.models import build_model


def run(config: Config, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run an experiment and return what its ``results.json`` holds.

    ``options`` are those of the method, e.g. ``{"temperature": 4.0}``. All that can be checked is
    checked before anything is written.
    """
    options = dict(options or {})
    make_method(config, options)
    fabric = make_fabric(config)
    data = load_data(
        config.data,
        val_fraction=config.val_fraction,
        split_seed=config.split_seed,
        image_size=config.image_size,
        cache_dir=Path(config.cache_dir),
    )
    build_model(config.student, data.shape, len(data.classes))
    if config.teacher:
        build_model(config.teacher, data.shape, len(data.classes))
    loaded = None
    if config.teacher_checkpoint:
        path = Path(config.teacher_checkpoint)
        loaded = checkpoint.load_model(path, data.shape, len(data.classes))

    out = Path(config.out or f"runs/{data.name}-{config.method}-{config.student}")
    claim(out, config.resolved() | {"options": options}, config.resume)

    teacher_name, teacher = loaded or train_teacher(fabric, data, config, out / "teacher")
    teachers = [freeze(fabric, teacher)] if teacher is not None else []
    runs = []
    for seed in config.seed:
        runs.append(
            train_model(
                fabric,
                make_method(config, options),
                config.student,
                teachers,
                data,
                config,
                epochs=config.epochs,
                seed=seed,
                out=out / f"seed-{seed}",
                label=f"{config.method} {config.student} seed {seed}",
            )
        )

    results = {
        "method": config.method,
        "student": {"model": config.student, "parameters": count_parameters(student)},
        "config": config.resolved() | {"options": options},
        "environment": kdkernels.info(),
        "runs": runs,
        "summary": summarise(runs),
    }
    if teachers:
        test_accuracy = accuracy(*predict(teachers[0], data, data.test, fabric.device))
        results["teacher"] = {"model": teacher_name, "test_accuracy": test_accuracy}
    checkpoint.write_json(out / "results.json", results)
    report.plot_curves(out)
    return results
