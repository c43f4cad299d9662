# SPDX-License-Identifier: Apache-2.0
"""Distil a small network on handwritten digits and see what the fused loss costs: ``make demo``.

The protocol was fixed on validation images, with other seeds than those shown: a convolutional
teacher, a student of one hidden layer, the same images, augmentation and steps with and without the
teacher, temperature 4 and alpha 0.9. The epoch of the best validation accuracy is tested, once.
Every seed counts, however it falls.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from kdkernels.train import Config, report, run
from kdkernels.train.metrics import summarise

SEEDS = (0, 1, 2)
TEACHER, STUDENT = "convnet32", "mlp32"
EPOCHS = 60
VARIANTS = {
    "ce": {"method": "ce"},
    "kd, fused": {"method": "kd", "backend": "auto"},
    "kd, reference": {"method": "kd", "backend": "reference"},
}


def main() -> None:
    """Train the teacher and nine students; print a table, write curves."""
    started = time.perf_counter()
    # Images of 8x8 pixels leave threads nothing to share but waiting for each other.
    torch.set_num_threads(1)
    out = Path("demo", time.strftime("%Y%m%d-%H%M%S"))
    say = report.console.print

    say(f"Teacher: {TEACHER}, {EPOCHS} epochs on scikit-learn's digits")
    teacher = train(out / "teacher", method="ce", student=TEACHER, epochs=EPOCHS)
    say(f"  test accuracy {100 * teacher['test']['accuracy']:.2f} %")

    runs = {name: [] for name in VARIANTS}
    folders = {name: [] for name in VARIANTS}
    for seed in SEEDS:
        # The variants take turns, so that a busy machine slows all of them alike.
        for name, variant in VARIANTS.items():
            say(f"Student: {STUDENT}, {EPOCHS} epochs, {name}, seed {seed}")
            folder = out / name.replace(", ", "-") / str(seed)
            checkpoint = str(out / "teacher" / "seed-0" / "model.safetensors")
            settings = variant | {"student": STUDENT, "epochs": EPOCHS, "seed": (seed,)}
            runs[name].append(train(folder, teacher_checkpoint=checkpoint, **settings))
            folders[name].append(folder / f"seed-{seed}")

    summaries = {name: summarise(results) for name, results in runs.items()}
    report.plot_curves(out / "curves.png", folders)
    say(report.table(f"Students ({STUDENT}) on digits, mean ± deviation of 3 seeds", summaries))
    fused, reference = (
        summaries[name]["loss_ms"]["mean"] for name in ("kd, fused", "kd, reference")
    )
    say(
        f"A step's loss, forward and backward: {fused:.3f} ms fused, {reference:.3f} ms in plain "
        f"torch ({reference / fused:.2f} times as long).\n"
        f"Curves: {out / 'curves.png'}; all took {time.perf_counter() - started:.0f} s."
    )


def train(out: Path, **settings) -> dict:
    """Results of the one run that ``settings`` describe."""
    return run(Config(data="digits", val_fraction=0.2, out=str(out), **settings))["runs"][0]


if __name__ == "__main__":
    main()
