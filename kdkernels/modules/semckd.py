# SPDX-License-Identifier: Apache-2.0
"""Semantic calibration (arXiv 2012.03236): which teacher stage a student's stage learns from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels import checks
from kdkernels.functional.features import same_size

__all__ = ["SemCKDLoss"]


class _Embedding(nn.Module):
    """Rows of similarities (B, B) to unit vectors."""

    def __init__(self, batch_size: int, dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(batch_size, 2 * dim)
        self.linear2 = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.linear2(self.linear1(x).relu()), dim=1)


class StageAttention(nn.Module):
    """How much each student stage attends to each of the teacher's: (B, S, T) from their maps.

    Args:
        students, teachers: how many stages.
        batch_size, factor, soft: as in :class:`SemCKDLoss`.
    """

    def __init__(
        self, students: int, teachers: int, batch_size: int, factor: int, soft: float
    ) -> None:
        super().__init__()
        self.soft = soft
        dim = batch_size // factor
        self.queries = nn.ModuleList(_Embedding(batch_size, dim) for _ in range(students))
        self.keys = nn.ModuleList(_Embedding(batch_size, dim) for _ in range(teachers))

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        queries = torch.stack(
            [embed(_similarities(x)) for embed, x in zip(self.queries, student, strict=True)], 1
        )
        keys = torch.stack(
            [embed(_similarities(x)) for embed, x in zip(self.keys, teacher, strict=True)], 1
        )
        return (queries @ keys.mT / self.soft).softmax(-1)


def _projection(student_channels: int, teacher_channels: int) -> nn.Sequential:
    mid = 2 * teacher_channels
    layers = nn.Sequential()
    for inputs, outputs, size in ((student_channels, mid, 1), (mid, mid, 3)):
        layers.append(nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False))
        layers.append(nn.BatchNorm2d(outputs))
        layers.append(nn.ReLU(inplace=True))
    return layers.append(nn.Conv2d(mid, teacher_channels, 1, bias=False))


class SemCKDLoss(nn.Module):
    """Every student stage learns from every teacher stage, as much as attention gives it.

    ``1 / (B S) sum_bij a_bij mean (projected_ij - teacher_j)^2_b`` over S student stages i, where
    ``a_bi = softmax_j(q_bi . k_bj / soft)`` and q, k are unit vectors that a layer of two linear
    maps makes of sample b's similarities ``x x^T`` to the batch. Each pair of stages has a
    projection of its own: convolutions 1x1, 3x3, 1x1 without bias, batch norm and ReLU between, of
    twice the teacher's channels. The larger map is average-pooled to the smaller one's size, the
    student's before its projection. On torch's own operators: the projections' convolutions are
    nearly all of the work.

    All layers learn from the loss: give :meth:`parameters` to the optimiser. Published with a
    weight of 400 beside the cross-entropy.

    Args:
        student_channels, teacher_channels: of the stages, any number of each.
        batch_size: B of every batch, the width of the first linear map: drop the incomplete last.
        factor: the embeddings have ``batch_size // factor`` dimensions.
        soft: temperature of the attention.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        batch_size: int,
        factor: int = 4,
        soft: float = 1.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not student_channels or not teacher_channels:
            raise ValueError(
                f"{name}: student_channels and teacher_channels must be those of at least one "
                f"stage each, got {list(student_channels)} and {list(teacher_channels)}."
            )
        self.batch_size = checks.integer(name, "batch_size", batch_size)
        if not 1 <= checks.integer(name, "factor", factor) <= batch_size:
            raise ValueError(f"{name}: factor must be in [1, {batch_size}], got {factor}.")
        if not checks.number(name, "soft", soft) > 0:
            raise ValueError(f"{name}: soft must be positive, got {soft}.")
        self.channels = {"student": list(student_channels), "teacher": list(teacher_channels)}
        counts = len(student_channels), len(teacher_channels)
        self.attention = StageAttention(*counts, batch_size, factor, soft)
        self.projections = nn.ModuleList(
            nn.ModuleList(_projection(s, t) for t in teacher_channels) for s in student_channels
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss of the stages' maps (B, C, H, W); the teacher's get no gradient."""
        self._check(student, teacher)
        teacher = [x.detach() for x in teacher]
        attention = self.attention(student, teacher)
        projected, targets = [], []
        for s, projections in zip(student, self.projections, strict=True):
            pairs = [same_size(s, t) for t in teacher]
            projected.append([f(x) for f, (x, _) in zip(projections, pairs, strict=True)])
            targets.append([t for _, t in pairs])
        return calibrated_mse(projected, targets, attention)

    def _check(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
        name = type(self).__name__
        for argument, stages in (("student", student), ("teacher", teacher)):
            channels = self.channels[argument]
            if len(stages) != len(channels):
                raise ValueError(
                    f"{name}: {argument} must be {len(channels)} stages, got {len(stages)}."
                )
            for x, count in zip(stages, channels, strict=True):
                if x.dim() != 4 or x.shape[:2] != (self.batch_size, count):
                    raise ValueError(
                        f"{name}: {argument} must be maps of shape ({self.batch_size}, {count}, "
                        f"H, W), got {tuple(x.shape)}."
                    )


def calibrated_mse(
    projected: Sequence[Sequence[Tensor]], targets: Sequence[Sequence[Tensor]], attention: Tensor
) -> Tensor:
    """``1 / (B S) sum_bij a_bij mean (projected_ij - target_ij)^2_b``, attention (B, S, T)."""
    batch_size, stages, _ = attention.shape
    loss = attention.new_zeros(())
    for i, (student, teacher) in enumerate(zip(projected, targets, strict=True)):
        for j, (s, t) in enumerate(zip(student, teacher, strict=True)):
            squares = (s - t).to(attention.dtype).square().flatten(1).mean(1)
            loss = loss + attention[:, i, j] @ squares
    return loss / (batch_size * stages)


def _similarities(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    if flat.dtype in (torch.float16, torch.bfloat16):
        flat = flat.float()
    return flat @ flat.T
