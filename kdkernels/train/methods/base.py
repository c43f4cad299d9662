# SPDX-License-Identifier: Apache-2.0
"""What the loop asks of a training method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kdkernels.train.data import Batch


@dataclass(frozen=True)
class Output:
    """What a network makes of a batch."""

    logits: Tensor  # (B, K)


class Method(nn.Module):
    """A way to train a student: a loss, and the hooks by which it takes part in the loop.

    The keyword arguments of a subclass's ``__init__`` are its options on the command line, with
    the help lines of its docstring. Its parameters are trained and checkpointed with the student
    and left out of the exported model.

    Args:
        backend: which implementation runs the losses, as everywhere in kdkernels.
    """

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend

    def losses(
        self, batch: Batch, student_out: Output, teacher_out: Sequence[Output]
    ) -> dict[str, Tensor]:
        """Named scalar terms of the loss; one ``teacher_out`` per teacher of this step."""
        raise NotImplementedError

    def weights(self, step: int) -> Mapping[str, float]:
        """Weights of the terms at a step; a term not named counts once."""
        return {}

    def teachers(self, step: int) -> Sequence[int]:
        """Which of the run's teachers answer at a step, by position; none by default."""
        return ()

    def on_boundary(self, epoch: int) -> None:
        """Called before the first step of every epoch."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the method's own parameters."""
        parameters = list(self.parameters())
        return [{"params": parameters}] if parameters else []
