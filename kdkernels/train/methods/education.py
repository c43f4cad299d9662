# SPDX-License-Identifier: Apache-2.0
"""Education distillation (arXiv 2311.13811), a reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from kdkernels import functional as KF
from kdkernels.train.config import check_range
from kdkernels.train.data import Batch
from kdkernels.train.errors import InputError
from kdkernels.train.methods.base import Method, Output
from kdkernels.train.methods.grades import Grades


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

    needs_numbers = True

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
        self.course = Grades(grades, boundaries, replay, order, restart)

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
            for number, group in enumerate(self.course.groups, 1)
        }  # fmt: skip
