# SPDX-License-Identifier: Apache-2.0
"""Distil your own modules on your own images: a few lines of Python."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn

from kdkernels.train import distill


def classifier(width: int) -> nn.Module:
    """Any module from images to logits does."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * width, 10),
    )  # fmt: skip


def main(epochs: int = 20) -> None:
    """Train a teacher, then a student with its help."""
    digits = load_digits()
    data = digits.images.astype("uint8"), digits.target

    torch.manual_seed(0)  # distill()'s own seed is of the batches; initial weights are yours
    teacher, student = classifier(32), classifier(4)
    distill(teacher, None, data, method="ce", epochs=epochs, augment="crop")
    results = distill(
        student, teacher, data, method="skd", options={"temperature": 4.0},
        epochs=epochs, augment="crop", ema=0.99,
    )  # fmt: skip
    print(f"test accuracy {100 * results['test']['accuracy']:.1f} %")


if __name__ == "__main__":
    main()
