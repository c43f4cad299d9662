# SPDX-License-Identifier: Apache-2.0
"""The course of education distillation: grades, each with one group of classes more."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from torch import nn

from kdkernels.train.data import Batch, Batches
from kdkernels.train.errors import InputError
from kdkernels.train.methods.course import Course, Run
from kdkernels.train.methods.growing import GrowingStudent, grow


class Grades(Course):
    """In grade g the student is its first stages, and sees the groups of classes up to g.

    A batch is of one group, and the group's specialist teaches it. Arguments are the options of
    ``Education`` of these names.
    """

    def __init__(
        self,
        grades: int,
        boundaries: list[float] | None,
        replay: bool,
        order: str,
        restart: bool,
    ) -> None:
        super().__init__()
        self.grades, self.boundaries = grades, boundaries
        self.replay, self.order, self.restart = replay, order, restart

    def specialities(self, classes: int) -> Sequence[range]:
        if 1 < self.grades and classes < 2 * self.grades:
            raise InputError(
                f"--grades {self.grades}: expected at most {max(classes // 2, 1)} for {classes} "
                f"classes: a specialist needs two or more to tell apart"
            )
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

    def batch(self, batches: Batches, step: int, share: int = 0) -> Batch:
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

    def stage(self, epoch: int) -> str:
        return f"grade {self._grade(epoch) + 1} of {self.grades}"

    def selectable(self, epoch: int) -> bool:
        return self._grade(epoch) == self.grades - 1
