# SPDX-License-Identifier: Apache-2.0
"""What the loop asks of a training method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from kdkernels.train.data import Batch
from kdkernels.train.methods.course import Course, Run


class TopK(NamedTuple):
    """What is kept of a teacher's logits where the largest k have to do."""

    values: Tensor  # (B, k) logits
    classes: Tensor  # (B, k) integers
    logsumexp: Tensor  # (B,) of all logits over the method's temperature


class Output(NamedTuple):
    """What a network makes of a batch."""

    logits: Tensor | TopK  # (B, K); TopK from a cache of a method that can do with it
    features: Mapping[str, Tensor] | None = None  # by the path of a tapped module


class Method(nn.Module):
    """A way to train a student: a loss, and the hooks by which it takes part in the loop.

    ``course`` is what goes on around the losses: batches, teachers and the student, step by step.
    Few methods need another than :class:`Course` itself; those go with no other method, since two
    courses do not add up.

    The keyword arguments of a subclass's ``__init__`` are its options on the command line, with
    the help lines of its docstring. Its parameters are trained and checkpointed with the student
    and left out of the exported model.

    ``ce_weight`` is the weight of the cross-entropy in its loss: 0 where another method that it is
    composed with has it already. Without ``needs_teacher``, a teacher is only measured against.

    ``top_k_temperature`` is the one temperature at which it can learn from a teacher's ``TopK``;
    None if it needs all of the logits. One that ``needs_numbers`` looks training images up by
    theirs, which a user's loader does not tell.

    Args:
        backend: which implementation runs the losses, as everywhere in kdkernels.
    """

    ce_weight: float = 1.0
    top_k_temperature: float | None = None
    needs_teacher: bool = True
    needs_numbers: bool = False

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend
        self.course = Course(self.needs_teacher)

    def begin(self, run: Run) -> None:
        """Called first: how long the run is and on what data."""
        self.run = run
        self.course.begin(run)

    def taps(self, student: nn.Module, teachers: Sequence[nn.Module]) -> list[Sequence[str]]:
        """Paths of the modules whose outputs it needs: the student's, then each teacher's.

        ``student`` is what the course made of it.
        """
        return [()] * (1 + len(teachers))

    def setup(self, student_out: Output, teacher_out: Sequence[Output]) -> None:
        """Make what depends on shapes (projectors, a simplifier), from a dry run of two images."""

    def teach(self, batch: Batch, teacher_out: Sequence[Output]) -> Sequence[Output]:
        """What the teachers' outputs become, for this method and those it is composed with."""
        return teacher_out

    def losses(
        self, batch: Batch, student_out: Output, teacher_out: Sequence[Output]
    ) -> dict[str, Tensor]:
        """Named scalar terms of the loss; one ``teacher_out`` per teacher of this step."""
        raise NotImplementedError

    def weights(self, step: int) -> Mapping[str, float]:
        """Weights of the terms at a step; a term not named counts once."""
        return {}

    def measure(self, student: Tensor, labels: Tensor, teacher: Tensor | None) -> dict[str, float]:
        """What it reports of validation logits (n, K) every epoch, beside what all runs report.

        ``teacher`` are those of the first teacher, if it knows all classes.
        """
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the method's own parameters."""
        parameters = list(self.parameters())
        return [{"params": parameters}] if parameters else []
