# SPDX-License-Identifier: Apache-2.0
"""What a classifier's logits are worth: accuracy, calibration, closeness to the teacher."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdkernels import functional as KF
from kdkernels.train.data import Dataset, LoaderData, LoaderSplit, Split, normaliser


def predict(
    model: nn.Module,
    data: Dataset | LoaderData,
    split: Split | LoaderSplit,
    device: torch.device,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Logits (n, K) and labels (n,) of a split; the model's mode is left as it was.

    ``model`` gives logits, or an ``Output`` with them.
    """
    training = model.training
    model.eval()
    logits, labels = [], []
    # A loader draws a seed for every pass: training shall not depend on how often this is called.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for images, right in _inputs(data, split, device, chunk):
            out = model(images)
            logits.append(getattr(out, "logits", out))
            labels.append(right)
    model.train(training)
    return torch.cat(logits).float(), torch.cat(labels)


def _inputs(
    data: Dataset | LoaderData, split: Split | LoaderSplit, device: torch.device, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Network input and labels, some at a time."""
    if isinstance(split, LoaderSplit):
        yield from split.peek(device)
        return
    normalise = normaliser(data, device)
    for start in range(0, len(split), chunk):
        images, labels = map(torch.from_numpy, split.take(slice(start, start + chunk)))
        yield normalise(images.to(device)), labels.to(device)


def measure(logits: Tensor, labels: Tensor, teacher: Tensor | None) -> dict[str, float]:
    """Accuracy and ECE, and with the teacher's logits agreement and KL(teacher || student)."""
    metrics = {"accuracy": accuracy(logits, labels), "ece": calibration_error(logits, labels)}
    if teacher is not None:
        metrics["agreement"] = accuracy(logits, teacher.argmax(-1))
        metrics["kl_to_teacher"] = KF.kl_div(logits, teacher).item()
    return metrics


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    return (logits.argmax(-1) == labels).float().mean().item()


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error (arXiv 1706.04599): equal-width bins of the top probability.

    The mean over samples of |accuracy - confidence| of the bin a sample falls in.
    """
    logits, labels = logits.cpu().double(), labels.cpu()
    confidence, predicted = logits.softmax(-1).max(-1)
    correct = (predicted == labels).double()
    # Bins are open below and closed above: a confidence of 1 belongs to the last.
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.double)
    gaps.index_add_(0, index, correct - confidence)
    return (gaps.abs().sum() / len(labels)).item()


def summarise(runs: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Mean and sample standard deviation over runs (None for one) of every number but the seed.

    Nested names are joined by dots, as in ``"test.accuracy"``; what not all runs have is left out.
    """
    flat = [dict(numbers(run)) for run in runs]
    names = [name for name in flat[0] if name != "seed" and all(name in run for run in flat)]
    summary = {}
    for name in names:
        values = [run[name] for run in flat]
        std = statistics.stdev(values) if len(values) > 1 else None
        summary[name] = {"mean": statistics.fmean(values), "std": std}
    return summary


def numbers(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a record and in those within it, by names joined by dots."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value
