# SPDX-License-Identifier: Apache-2.0
"""The moving average of a student's weights, which often classifies better than the last ones."""

from __future__ import annotations

import copy

import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from kdkernels.train.teachers import Teacher


class Average:
    """Exponential moving average of weights and buffers, answering to images as ``network``.

    After n updates the decay is min(decay, (1 + n) / (10 + n)): weights from before the student
    learned anything are soon forgotten, however short the training.
    """

    def __init__(self, fabric: Fabric, student: nn.Module, decay: float) -> None:
        self.decay = decay
        self.student = copy.deepcopy(student)
        self.network = Teacher(fabric, self.student)

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Take in the weights after ``step``, counted from 0."""
        averages, latest = [], []
        now = student.state_dict()
        for name, average in self.student.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                latest.append(now[name])
            else:
                average.copy_(now[name])
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(averages, latest, step)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages, as a student's ``state_dict``."""
        return self.student.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.student.load_state_dict(state)
