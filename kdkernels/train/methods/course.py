# SPDX-License-Identifier: Apache-2.0
"""What a run goes through from step to step, whatever its losses are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from kdkernels.train.data import Batch, Batches, Dataset, LoaderBatches, LoaderData


class Run(NamedTuple):
    """What a method may know of the run it takes part in."""

    data: Dataset | LoaderData
    steps: int  # of the whole training
    steps_per_epoch: int
    group: Any = None  # of the processes that share it, for losses over the batch


class Course:
    """Which batch comes at a step, who teaches it, and what the student is by then.

    This one is most methods': all classes from the start, the first teacher if the student is
    ``taught``, and the student itself, of whose epochs the best one is exported. One that differs
    overrides what it needs of this class, all of it functions of the step: nothing here is
    checkpointed but what :meth:`wrap` makes.
    """

    def __init__(self, taught: bool = True) -> None:
        self.taught = taught

    def begin(self, run: Run) -> None:
        """Called first but for :meth:`specialities`: how long the run is and on what data."""
        self.run = run

    def specialities(self, classes: int) -> Sequence[range]:
        """Of which of so many classes each of the run's teachers is."""
        return [range(classes)]

    def wrap(self, student: nn.Module) -> nn.Module:
        """What is trained: ``student`` itself, or a module around it that grows, or has more heads.

        It is in the checkpoint; what is exported is the student.
        """
        return student

    def unwrap(self, trained: nn.Module) -> nn.Module:
        """The student in what :meth:`wrap` made, or in a copy of it."""
        return trained

    def batch(self, batches: Batches | LoaderBatches, step: int, share: int = 0) -> Batch:
        """A share of the batch of a step: of some classes only, say."""
        return batches(step, share)

    def teachers(self, step: int) -> Sequence[int]:
        """Which of the run's teachers answer at a step, by position."""
        return (0,) if self.taught else ()

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

    def stage(self, epoch: int) -> str:
        """What an epoch's line in the log says of how far the student has come."""
        return ""

    def selectable(self, epoch: int) -> bool:
        """Whether the student as it is after an epoch may be the one that is exported."""
        return True
