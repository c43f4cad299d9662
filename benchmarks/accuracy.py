# SPDX-License-Identifier: Apache-2.0
"""Accuracy of the methods under one protocol: python benchmarks/accuracy.py DATA [--work DIR]

DATA is a folder, or a tar of one, of 32x32 images in 100 classes: for the results kept here, every
other class of Tiny-ImageNet at CIFAR-100's size.

The protocol was written down before its first run, and nothing in it was tuned for
accuracy; how strongly ``skd`` keeps its target to the teacher was chosen by how often it did so in
first runs:

- The teacher is a resnet20 trained with cross-entropy on nine tenths of all training images, for 6
  epochs; education's specialists are such networks too, each trained on its classes of the same
  images. They are kept beside the results and trained again only if they are missing there.
- Students are resnet8 and learn from 100 of these images a class, for 12 epochs, with the same
  images, augmentation (crop and flip) and number of steps for every method.
- Everybody trains with the literature's batches of 64, learning rate of 0.05 and weight decay of
  5e-4, on a cosine, in bfloat16 with losses in float32. Methods keep their presets; what a preset
  counts in epochs of the literature's 240 is scaled to 12.
- Seeds 0, 1 and 2, all of them in the table. 20 of the images a class that no one trained on choose
  the epoch; the test images are read once, at the end of each run.

A run that is killed goes on where it was when the script is started again, and what is finished is
not run again, so the budget can be spent in pieces. After every method its results and the table
are written anew; methods not given or not run keep theirs. The accuracies are far below the
literature's, which trains for 240 epochs on five times the images: what can be compared is the
methods with each other.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import accuracy_table
import numpy as np

from kdkernels.train import Config, run
from kdkernels.train.data import Dataset, Split, load_data, split_off
from kdkernels.train.devices import make_fabric
from kdkernels.train.experiment import trained_teacher
from kdkernels.train.options import make_method

SEEDS = (0, 1, 2)
TEACHER, TEACHER_EPOCHS = "resnet20", 6
STUDENT, EPOCHS = "resnet8", 12
TRAIN_PER_CLASS, VAL_PER_CLASS = 100, 20
RECIPE = {
    "batch_size": 64, "lr": 0.05, "weight_decay": 5e-4, "schedule": "cosine",
    "precision": "bf16-mixed", "accelerator": "cpu", "checkpoint_every": 100,
}  # fmt: skip
# Name in the table: method and its options.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ce": ("ce", {}),
    "kd": ("kd", {}),
    "skd": ("skd", {}),
    "skd-batch": ("skd", {"tokens": "batch"}),
    "dkd": ("dkd", {"warmup": 1}),  # 20 of 240 epochs
    "education": ("education", {}),
}


def main() -> None:
    """Run what has not been run yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder or tar of the images")
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"), help="for the runs")
    parser.add_argument("--results", type=Path, default=accuracy_table.RESULTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    data = full_data(arguments)
    students = student_data(arguments, data)
    for name in arguments.methods:
        method, options = METHODS[name]
        parts = make_method(method, "auto", options).course.specialities(len(data.classes))
        teachers = [teacher_checkpoint(arguments, data, part) for part in parts]
        config = Config(
            method=method,
            data=str(students),
            student=STUDENT,
            teacher_checkpoint=",".join(map(str, teachers)),
            teacher_cache=str(arguments.work / "teacher-cache") if len(teachers) == 1 else None,
            epochs=EPOCHS,
            seed=SEEDS,
            cache_dir=str(arguments.work / "cache"),
            **in_folder(arguments, name),
        )
        accuracy_table.keep(arguments.results, name, run(config, options), list(METHODS))
        print(f"{name}: done", flush=True)


def full_data(arguments: argparse.Namespace) -> Dataset:
    """The teachers' images."""
    return load_data(
        arguments.data,
        val_fraction=Config.val_fraction,
        split_seed=Config.split_seed,
        image_size=None,
        cache_dir=arguments.work / "cache",
    )


def teacher_checkpoint(arguments: argparse.Namespace, data: Dataset, classes: range) -> Path:
    """The kept teacher of these classes, trained first if there is none."""
    name = TEACHER if len(classes) == len(data.classes) else f"{TEACHER}-{classes[0]}-{classes[-1]}"
    kept = arguments.results / f"{name}.safetensors"
    if not kept.exists():
        out = arguments.work / name
        config = Config(method="ce", teacher=TEACHER, teacher_epochs=TEACHER_EPOCHS, **RECIPE)
        trained_teacher(make_fabric(config), data.only(classes), config, out)
        arguments.results.mkdir(parents=True, exist_ok=True)
        shutil.copy(out / "model.safetensors", kept)
    return kept


def student_data(arguments: argparse.Namespace, data: Dataset) -> Path:
    """The students' images as arrays: part of the teachers' training and validation images."""
    folder = arguments.work / "data"
    if not folder.exists():
        parts = {
            "train": thinned(data, data.train, TRAIN_PER_CLASS),
            "val": thinned(data, data.val, VAL_PER_CLASS),
            "test": data.test,
        }
        partial = folder.with_name("data.partial")
        partial.mkdir(exist_ok=True)
        for part, split in parts.items():
            images, labels = split.take(slice(None))
            np.save(partial / f"{part}_images.npy", images)
            np.save(partial / f"{part}_labels.npy", labels)
        partial.rename(folder)
    return folder


def thinned(data: Dataset, split: Split, per_class: int) -> Split:
    """So many images of each class, the same in every call."""
    return split_off(split, per_class * len(data.classes) / len(split), Config.split_seed)[1]


def in_folder(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """The recipe, in that folder, gone on with if it was begun."""
    out = arguments.work / name
    return RECIPE | {"out": str(out), "resume": (out / "config.json").exists()}


if __name__ == "__main__":
    main()
