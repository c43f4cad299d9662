# SPDX-License-Identifier: Apache-2.0
"""The losses between vectors as modules, with projections to the teacher's width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdkernels import checks, functional
from kdkernels.modules.base import LossModule

__all__ = ["EmbeddingLoss", "SGKDLoss"]


class EmbeddingLoss(nn.Module):
    """:func:`kdkernels.functional.embedding_loss` behind linear projections of the student.

    EmbedDistill has one projection, of queries and documents both; DistillKit one per layer of
    hidden states, without bias. Where the widths agree nothing is projected unless ``project``.

    Args:
        student_dim, teacher_dim: widths D.
        distance: ``"mse"``, ``"l2"`` or ``"cosine"``.
        num_layers: projections, one for each of as many tensors; by default one for all.
        bias: of the projections.
        project: whether to project; by default if the widths differ.
        reduction: ``"mean"`` or ``"sum"``.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        distance: str = "mse",
        num_layers: int | None = None,
        bias: bool = True,
        project: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, value in (("student_dim", student_dim), ("teacher_dim", teacher_dim)):
            checks.integer(name, argument, value)
        checks.choice(name, "distance", distance, functional.embeddings.DISTANCES)
        checks.choice(name, "reduction", reduction, functional.features.REDUCTIONS)
        self.distance, self.reduction, self.num_layers = distance, reduction, num_layers
        wanted = student_dim != teacher_dim if project is None else project
        self.projections = nn.ModuleList(
            nn.Linear(student_dim, teacher_dim, bias=bias)
            for _ in range((num_layers or 1) if wanted else 0)
        )

    def forward(
        self,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``student`` (..., student_dim), or several, against ``teacher``."""
        if self.projections:
            several = not isinstance(student, Tensor)
            students = list(student) if several else [student]
            if self.num_layers not in (None, len(students)):
                raise ValueError(
                    f"{type(self).__name__}: student must be {self.num_layers} tensors, one per "
                    f"layer, got {len(students)}."
                )
            last = len(self.projections) - 1
            students = [self.projections[min(i, last)](s) for i, s in enumerate(students)]
            student = students if several else students[0]
        return functional.embedding_loss(
            student, teacher, distance=self.distance, mask=mask, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        return f"distance={self.distance!r}"


class SGKDLoss(LossModule, function=functional.sgkd_loss):
    """Student-guided distillation: :func:`kdkernels.functional.sgkd_loss`."""

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of ``student`` (B, D) against ``teacher`` (B, n, D)."""
        return self._call(student, teacher)

    def _check(self, held):
        row = torch.zeros(1, 1, device="cpu")
        self._function(row, row.unsqueeze(1), **held)
