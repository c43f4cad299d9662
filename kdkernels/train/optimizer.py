# SPDX-License-Identifier: Apache-2.0
"""The optimizer, and its learning rate as a function of how far training is."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from kdkernels.train.config import Config
from kdkernels.train.methods import Method

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adamw": torch.optim.AdamW,
}
# The multistep schedule: a tenth of the learning rate after each of these shares of the steps.
MILESTONES = (5 / 8, 6 / 8, 7 / 8)
# The one-cycle schedule, with torch's proportions: where it starts and ends, as shares of the
# learning rate, and how much of it goes upwards.
CYCLE_START, CYCLE_END, CYCLE_RISE = 1 / 25, 1 / 25e4, 0.3


def make_optimizer(student: nn.Module, method: Method, config: Config) -> torch.optim.Optimizer:
    """The optimizer of the student's parameters and the method's own groups.

    A group of the method has ``lr_scale`` times the student's learning rate.
    """
    groups = [{"params": list(student.parameters())}, *method.parameter_groups()]
    groups = [scaled(group, config.lr) for group in groups]
    optimizer = OPTIMIZERS[config.optimizer](groups, weight_decay=config.weight_decay)
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def scaled(group: dict[str, Any], lr: float) -> dict[str, Any]:
    """A parameter group at ``lr`` times its ``lr_scale``."""
    own = {name: value for name, value in group.items() if name != "lr_scale"}
    return own | {"lr": lr * group.get("lr_scale", 1.0)}


def set_lr(optimizer: torch.optim.Optimizer, schedule: str, progress: float) -> None:
    """Give every group its learning rate after ``progress`` (0 to 1) of the steps."""
    factor = lr_factor(schedule, progress)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def lr_factor(schedule: str, progress: float) -> float:
    """Share of ``--lr`` after ``progress`` (0 to 1) of the steps."""
    if schedule == "multistep":
        return 0.1 ** sum(progress >= milestone for milestone in MILESTONES)
    if schedule == "cosine":
        return _cosine(1.0, 0.0, progress)
    if progress < CYCLE_RISE:
        return _cosine(CYCLE_START, 1.0, progress / CYCLE_RISE)
    return _cosine(1.0, CYCLE_END, (progress - CYCLE_RISE) / (1 - CYCLE_RISE))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
