# SPDX-License-Identifier: Apache-2.0
"""How long steps take, and how much of that is the loss, measured without disturbing them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class StepClock:
    """Notes when steps start and end, and within them, once or several times, when losses do.

    A loss ends when its gradient arrives at the student's logits, inside the one backward pass;
    a hook on the logits sees that moment. So forward and backward of the loss are timed as they
    run in training: no second pass, no cut in the graph, no copy of the gradient. On a GPU marks
    are events on the stream, read every so often; nothing waits for them before.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.steps: list[float | torch.cuda.Event] = []
        self.losses: list[float | torch.cuda.Event] = []

    def step_starts(self) -> None:
        """Note the present moment."""
        self.steps.append(self._now())

    def step_ends(self) -> None:
        """Note the present moment."""
        self.steps.append(self._now())

    def loss_starts(self, logits: Tensor) -> None:
        """Note the loss's start now, and its end when the gradient reaches ``logits``."""
        self.losses.append(self._now())
        logits.register_hook(lambda gradient: self.losses.append(self._now()))

    @contextmanager
    def loss_paused(self) -> Iterator[None]:
        """What is done meanwhile is not the loss's."""
        self.losses.append(self._now())
        yield
        self.losses.append(self._now())

    def read(self) -> tuple[float, float]:
        """Seconds of the steps since the last reading, and of their losses."""
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds = self._total(self.steps), self._total(self.losses)
        self.steps.clear()
        self.losses.clear()
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _total(self, marks: list[float | torch.cuda.Event]) -> float:
        pairs = zip(marks[::2], marks[1::2], strict=True)
        if self.on_gpu:
            return sum(start.elapsed_time(end) for start, end in pairs) / 1000
        return sum(end - start for start, end in pairs)
