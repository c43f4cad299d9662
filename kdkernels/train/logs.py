# SPDX-License-Identifier: Apache-2.0
"""What a run writes about its epochs: JSON Lines, and TensorBoard's event files if asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from kdkernels.train import checkpoint, report
from kdkernels.train.errors import InputError
from kdkernels.train.metrics import numbers


def require_tensorboard() -> None:
    """Refuse what could only fail after the first epoch."""
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "--tensorboard: needs the tensorboard package (pip install 'kdkernels[tensorboard]')"
        )


class Log:
    """``log.jsonl`` of a run, which is always whole, and ``tensorboard/`` beside it.

    Without a terminal to draw progress on, also a line of each epoch, which begins with ``label``.
    ``history`` are the epochs a resumed run has behind it: TensorBoard drops what it was told of
    later ones before.
    """

    def __init__(
        self,
        out: Path,
        history: list[dict[str, Any]],
        *,
        label: str,
        epochs: int,
        tensorboard: bool,
    ) -> None:
        self.path, self.board = out / "log.jsonl", None
        self.label, self.epochs = label, epochs
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            seen = history[-1]["step"] + 1 if history else None
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=seen)

    def write(self, history: list[dict[str, Any]], stage: str = "") -> None:
        """Note the last epoch of ``history``, a ``stage`` of its course."""
        checkpoint.write_lines(self.path, history)
        if not report.drawing():
            report.say(report.epoch_line(self.label, self.epochs, history[-1], stage))
        if self.board:
            record = dict(history[-1])
            step = record.pop("step")
            for name, value in numbers(record):
                self.board.add_scalar(name.replace(".", "/", 1), value, step)
            self.board.flush()

    def close(self) -> None:
        """Nothing more comes."""
        if self.board:
            self.board.close()
