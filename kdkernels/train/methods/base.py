# SPDX-License-Identifier: Apache-2.0
"""What the loop asks of a training method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from kdkernels.train.data import Batch, Batches, Dataset, LoaderBatches, LoaderData


class Run(NamedTuple):
    """What a method may know of the run it takes part in."""

    data: Dataset | LoaderData
    steps: int  # of the whole training
    steps_per_epoch: int
    group: Any = None  # of the processes that share it, for losses over the batch


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

    The keyword arguments of a subclass's ``__init__`` are its options on the command line, with
    the help lines of its docstring. Its parameters are trained and checkpointed with the student
    and left out of the exported model.

    ``ce_weight`` is the weight of the cross-entropy in its loss: 0 where another method that it is
    composed with has it already. Without ``needs_teacher``, a teacher is only measured against.
    What is not ``composable`` goes with no other method: what wraps the student, chooses batches,
    schedule or the epochs to export, or has specialists, since those hooks do not add up.

    ``top_k_temperature`` is the one temperature at which it can learn from a teacher's ``TopK``;
    None if it needs all of the logits.

    Args:
        backend: which implementation runs the losses, as everywhere in kdkernels.
    """

    ce_weight: float = 1.0
    top_k_temperature: float | None = None
    needs_teacher: bool = True
    composable: bool = True

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        self.backend = backend

    def begin(self, run: Run) -> None:
        """Called first: how long the run is and on what data."""
        self.run = run

    def specialities(self, classes: int) -> Sequence[range]:
        """Of which classes each of the run's teachers is; by default there is one, of all."""
        return [range(classes)]

    def wrap(self, student: nn.Module) -> nn.Module:
        """What is trained: ``student`` itself, or a module around it that grows, or has more heads.

        It is in the checkpoint; what is exported is the student.
        """
        return student

    def unwrap(self, trained: nn.Module) -> nn.Module:
        """The student in what :meth:`wrap` made, or in a copy of it."""
        return trained

    def taps(self, student: nn.Module, teachers: Sequence[nn.Module]) -> list[Sequence[str]]:
        """Paths of the modules whose outputs it needs: the student's, then each teacher's.

        ``student`` is what :meth:`wrap` made.
        """
        return [()] * (1 + len(teachers))

    def setup(self, student_out: Output, teacher_out: Sequence[Output]) -> None:
        """Make what depends on shapes (projectors, a simplifier), from a dry run of two images."""

    def data(self, batches: Batches | LoaderBatches, step: int, share: int = 0) -> Batch:
        """A share of the batch of a step, a function of these: of some classes only, say."""
        return batches(step, share)

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

    def teachers(self, step: int) -> Sequence[int]:
        """Which of the run's teachers answer at a step, by position; by default the first."""
        return (0,) if self.needs_teacher else ()

    def shown(self, batches: Batches, steps: int) -> dict[int, tuple[Batches, Sequence[int]]]:
        """What each teacher is asked in so many steps: of which batches, and views of their images.

        A teacher cache holds that, and no more.
        """
        epochs = range(math.ceil(steps / batches.per_epoch))
        asked = {index for epoch in epochs for index in self.teachers(epoch * batches.per_epoch)}
        views = sorted({view for epoch in epochs for view in batches.views_of(epoch)})
        return {index: (batches, views) for index in sorted(asked)}

    def progress(self, step: int) -> float:
        """How much of its schedule the learning rate has behind it, from 0 to 1."""
        return step / self.run.steps

    def on_boundary(self, epoch: int, trained: nn.Module) -> bool:
        """Called before the first step of every epoch, with what :meth:`wrap` made.

        It may change (grow, be pruned). Returns whether the optimizer forgets its momenta.
        """
        return False

    def selectable(self, epoch: int) -> bool:
        """Whether the student as it is after an epoch may be the one that is exported."""
        return True

    def measure(self, student: Tensor, labels: Tensor, teacher: Tensor | None) -> dict[str, float]:
        """What it reports of validation logits (n, K) every epoch, beside what all runs report.

        ``teacher`` are those of the first teacher, if it knows all classes.
        """
        return {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups of the method's own parameters."""
        parameters = list(self.parameters())
        return [{"params": parameters}] if parameters else []
