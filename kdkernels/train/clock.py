# SPDX-License-Identifier: Apache-2.0
"""How long steps take, and how much of that is the loss, measured without disturbing them."""

from __future__ import annotations

import time

import torch
from torch import Tensor


class StepClock:
    """Four marks a step: its start, the loss's start, the loss's end, its end.

    The loss ends when its gradient arrives at the student's logits, inside the one backward pass;
    a hook on the logits sees that moment. So forward and backward of the loss are timed as they
    run in training: no second pass, no cut in the graph, no copy of the gradient. On a GPU marks
    are events on the stream, read once per epoch; nothing waits for them before.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[float | torch.cuda.Event] = []

    def mark(self) -> None:
        """Note the present moment."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def loss_starts(self, logits: Tensor) -> None:
        """Note the loss's start now, and its end when the gradient reaches ``logits``."""
        self.mark()
        logits.register_hook(lambda gradient: self.mark())

    def read(self) -> tuple[float, float]:
        """Seconds of the steps since the last reading, and of their losses."""
        if self.on_gpu:
            torch.cuda.synchronize()
        step = loss = 0.0
        for start, loss_start, loss_end, end in zip(*[iter(self.marks)] * 4, strict=True):
            step += self._seconds(start, end)
            loss += self._seconds(loss_start, loss_end)
        self.marks.clear()
        return step, loss

    def _seconds(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1000 if self.on_gpu else end - start
