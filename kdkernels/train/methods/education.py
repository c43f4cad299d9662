# SPDX-License-Identifier: Apache-2.0
"""Education distillation (arXiv 2311.13811), a reconstruction."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from torch import Tensor, nn

from kdkernels import functional as KF
from kdkernels.train.config import check_range
from kdkernels.train.data import Batch, Batches
from kdkernels.train.errors import InputError
from kdkernels.train.methods.base import Method, Output, Run
from kdkernels.train.methods.growing import GrowingStudent, grow


class Education(Method):
    """A student that grows grade by grade, taught each group of classes by its specialist.

    Classes are cut into as many groups as there are grades, and a teacher of its own learns each.
    In grade g the student is its first stages with a reference head, dropped at the promotion
    to g + 1; it sees the groups up to g. A batch is of one group: (1 - alpha) CE over all classes
    seen so far + alpha T^2 KL(specialist || student) inside the group's classes. With one grade it
    is ``kd``.

    Reconstruction: idea and recipe are those of abstract and published code, which does not run as
    it is. Guessed: heads pool globally (the code's first one to 4x4); an epoch has the same number
    of steps in every grade, which makes budgets those of other methods. The code's passes once over
    the groups seen; so do the default grades, each as often as the others, so that all classes are
    seen for half of the steps. Its own schedule, of 49, 20 and 61 passes over all images after
    which the rate falls, is nearly --boundaries 0.38 0.53 --restart false --order sequential
    --schedule multistep --epochs 130.

    Args:
        temperature: softens the teacher's and the student's probabilities.
        alpha: weight of the teacher's part; the labels get the rest.
        grades: number of groups of classes, of teachers and of the student's parts.
        boundaries: shares of the epochs after which the grades behind the first begin; if not
            given, a grade is as long as it has groups (1, 2 and 3 sixths).
        replay: whether a grade sees the groups of those before it again.
        order: of the groups in an epoch: taking turns, or one after the other.
        restart: whether the learning rate's schedule begins anew with each grade.
    """

    composable = False

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 0.7,
        grades: int = 3,
        boundaries: list[float] | None = None,
        replay: bool = True,
        order: Literal["interleaved", "sequential"] = "interleaved",
        restart: bool = True,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(backend)
        check_range(above=0, temperature=temperature)
        check_range(least=0, most=1, alpha=alpha)
        check_range(least=1, grades=grades)
        if boundaries is not None and len(boundaries) != grades - 1:
            raise InputError(
                f"--boundaries: expected {grades - 1} for {grades} grades, got {boundaries}"
            )
        self.temperature, self.alpha, self.ce_weight = temperature, alpha, 1 - alpha
        self.grades, self.replay, self.order, self.restart = grades, replay, order, restart
        self.boundaries = boundaries

    def specialities(self, classes: int) -> Sequence[range]:
        if classes < self.grades:
            raise InputError(f"--grades: expected at most {classes}, one a class")
        edges = [group * classes // self.grades for group in range(self.grades + 1)]
        return [range(*edge) for edge in pairwise(edges)]

    def begin(self, run: Run) -> None:
        super().begin(run)
        self.groups = self.specialities(len(run.data.classes))
        epochs = math.ceil(run.steps / run.steps_per_epoch)
        self.starts = [0, *self._boundaries(epochs)]
        if sorted({*self.starts, epochs}) != [*self.starts, epochs]:
            raise InputError(
                f"--boundaries: every grade must last an epoch or more; of {epochs} epochs, grades "
                f"would begin after {self.starts}"
            )
        self.timetable = self._timetable(epochs)
        self._parts: list[Batches] = []

    def _boundaries(self, epochs: int) -> list[int]:
        """After which of the epochs the grades behind the first begin."""
        if self.boundaries is not None:
            return [round(share * epochs) for share in self.boundaries]
        passes = np.cumsum([len(self._seen(grade)) for grade in range(self.grades)])
        shares = passes[:-1] / passes[-1]
        return [max(round(share * epochs), grade) for grade, share in enumerate(shares, 1)]

    def _seen(self, grade: int) -> range:
        """The groups whose images a grade sees."""
        return range(0 if self.replay else grade, grade + 1)

    def _timetable(self, epochs: int) -> np.ndarray:
        """(steps, 2): the group of each step's batch, and how many of its batches were before."""
        train = self.run.data.train
        counts = np.bincount(train.labels[train.rows], minlength=len(self.run.data.classes))
        sizes = np.array([counts[group.start : group.stop].sum() for group in self.groups])
        groups = np.concatenate([self._epoch(self._grade(epoch), sizes) for epoch in range(epochs)])
        turns = np.empty_like(groups)
        for group in range(self.grades):
            own = groups == group
            turns[own] = np.arange(own.sum())
        return np.stack([groups, turns], 1)

    def _epoch(self, grade: int, sizes: np.ndarray) -> np.ndarray:
        """The group of each step of an epoch, each as often as its share of the images is."""
        seen = np.array(self._seen(grade))
        share = sizes[seen].cumsum() / sizes[seen].sum()
        steps = np.diff((share * self.run.steps_per_epoch).round().astype(int), prepend=0)
        groups = np.repeat(seen, steps)
        if self.order == "sequential":
            return groups
        places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in steps])
        return groups[places.argsort(kind="stable")]

    def _grade(self, epoch: int) -> int:
        return bisect_right(self.starts, epoch) - 1

    def wrap(self, student: nn.Module) -> GrowingStudent:
        return grow(student, self.run.data.shape, [group.stop for group in self.groups])

    def unwrap(self, trained: GrowingStudent) -> nn.Module:
        return trained.network

    def data(self, batches: Batches, step: int, share: int = 0) -> Batch:
        group, turn = map(int, self.timetable[step])
        return self._classes(batches)[group](turn, share)

    def _classes(self, batches: Batches) -> list[Batches]:
        """The batches of each group."""
        if not self._parts:
            self._parts = [batches.only(group) for group in self.groups]
        return self._parts

    def shown(self, batches: Batches, steps: int) -> dict[int, tuple[Batches, Sequence[int]]]:
        times = np.bincount(self.timetable[:steps, 0], minlength=self.grades)
        found = {}
        for group, part in enumerate(self._classes(batches)):
            epochs = range(math.ceil(times[group] / part.per_epoch))
            views = {view for epoch in epochs for view in part.views_of(epoch)}
            found[group] = part, sorted(views)
        return found

    def teachers(self, step: int) -> Sequence[int]:
        return (int(self.timetable[step, 0]),)

    def progress(self, step: int) -> float:
        if not self.restart:
            return super().progress(step)
        grade = self._grade(step // self.run.steps_per_epoch)
        edges = [start * self.run.steps_per_epoch for start in self.starts] + [self.run.steps]
        return (step - edges[grade]) / (edges[grade + 1] - edges[grade])

    def on_boundary(self, epoch: int, trained: GrowingStudent) -> bool:
        trained.grade = self._grade(epoch)
        return epoch in self.starts[1:]

    def selectable(self, epoch: int) -> bool:
        return self._grade(epoch) == self.grades - 1

    def losses(
        self, batch: Batch, student_out: Output, teacher_out: Sequence[Output]
    ) -> dict[str, Tensor]:
        seen = student_out.logits.shape[1]
        labels = batch.labels if batch.labels.ndim == 1 else batch.labels[:, :seen]
        loss = KF.kd_loss(
            student_out.logits,
            teacher_out[0].logits,
            labels,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kd_weight=self.alpha,
            class_range=None if batch.classes == (0, seen) else batch.classes,
            backend=self.backend,
        )
        return {"education": loss}

    def measure(self, student: Tensor, labels: Tensor, teacher: Tensor | None) -> dict[str, float]:
        """Accuracy within each group's images, among all classes known so far."""
        right = (student.argmax(-1) == labels).float()
        return {
            f"accuracy_of_group_{number}": right[
                (labels >= group.start) & (labels < group.stop)
            ].mean().item()
            for number, group in enumerate(self.groups, 1)
        }  # fmt: skip
