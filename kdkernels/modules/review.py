# SPDX-License-Identifier: Apache-2.0
"""Knowledge review (arXiv 2104.09044): the student's stages fused from the deepest one upwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels import functional

__all__ = ["ABF", "ReviewKDLoss"]


class ABF(nn.Module):
    """Attention-based fusion of a stage with what the deeper ones left.

    Args:
        in_channels: of the student's stage.
        mid_channels: of the residual that is handed on.
        out_channels: of the teacher's stage.
        fuse: False for the deepest stage, which has nothing to be fused with.
    """

    def __init__(
        self, in_channels: int, mid_channels: int, out_channels: int, *, fuse: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, 1, bias=False), nn.BatchNorm2d(mid_channels)
        )
        self.conv2 = nn.Sequential(
            nn.Conv2d(mid_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.att_conv = None
        if fuse:
            self.att_conv = nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1), nn.Sigmoid())
        for conv in (self.conv1[0], self.conv2[0]):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, size: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The feature to compare with the teacher's, and the residual for the next stage.

        Both have the teacher's ``size`` (H, W), by default that of ``x`` (B, C, h, w); the residual
        of the deeper stage may have any.
        """
        x = self.conv1(x)
        if self.att_conv is not None:
            residual = F.interpolate(residual, x.shape[2:], mode="nearest")
            weights = self.att_conv(torch.cat([x, residual], 1))
            x = x * weights[:, :1] + residual * weights[:, 1:]
        if size is not None and x.shape[2:] != tuple(size):
            x = F.interpolate(x, tuple(size), mode="nearest")
        return self.conv2(x), x


class ReviewKDLoss(nn.Module):
    """ReviewKD: fusions of the student's stages against the teacher's, by the HCL loss.

    Sizes of the maps are taken as they come; channels are of the stages from the shallowest to the
    deepest, ``[f.shape[1] for f in features]`` of a dry run.

    Args:
        student_channels, teacher_channels: as many of each. The suites add the pooled features as a
            last stage of size 1x1.
        mid_channels: of the fusions, by default the last student stage's, 512 at most.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        mid_channels: int | None = None,
    ) -> None:
        super().__init__()
        if len(student_channels) != len(teacher_channels) or not student_channels:
            raise ValueError(
                f"{type(self).__name__}: teacher_channels must be those of the student's "
                f"{len(student_channels)} stages, got {len(teacher_channels)}."
            )
        mid = min(512, student_channels[-1]) if mid_channels is None else mid_channels
        pairs = list(zip(student_channels, teacher_channels, strict=True))[::-1]
        self.abfs = nn.ModuleList(
            ABF(inputs, mid, outputs, fuse=i > 0) for i, (inputs, outputs) in enumerate(pairs)
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """The loss of stages (B, C, H, W), the shallowest first; (B, C) are maps of 1x1."""
        if not len(student) == len(teacher) == len(self.abfs):
            raise ValueError(
                f"{type(self).__name__}: student and teacher must be {len(self.abfs)} stages each, "
                f"got {len(student)} and {len(teacher)}."
            )
        student, teacher = (
            [x[:, :, None, None] if x.dim() == 2 else x for x in stages]
            for stages in (student, teacher)
        )
        fused, residual = [], None
        for abf, x, target in zip(self.abfs, student[::-1], teacher[::-1], strict=True):
            feature, residual = abf(x, residual, target.shape[2:])
            fused.append(feature)
        return functional.hcl_loss(fused[::-1], teacher)
