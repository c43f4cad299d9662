# SPDX-License-Identifier: Apache-2.0
"""Losses over the elements of maps, with projectors of the student where the suites have them.

What is learned are submodules and parameters: give them to the optimiser, and discard the module
after training.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdkernels import backends, checks, functional
from kdkernels.functional.features import same_size, stages
from kdkernels.modules.base import LossModule
from kdkernels.modules.projectors import Connector, ConvReg, Generator, PointwiseRegressor, align


class MapsLoss(LossModule):
    """Base of the modules: maps of a stage, or sequences of stages, in; the loss out."""

    def forward(self, student, teacher) -> Tensor:
        """The loss of ``student`` (B, C, H, W), or of a sequence of stages, against ``teacher``."""
        return self._call(student, teacher)

    def _check(self, held):
        # The function judges its hyperparameters, on one element for each stage.
        checks.choice(type(self).__name__, "backend", held["backend"], backends.BACKENDS)
        weights = held.get("stage_weights")
        point = torch.zeros(1, 1, 1, 1, device="cpu")
        one = point if weights is None else [point] * len(weights)
        needed = inspect.signature(self._function).parameters.keys() & {"log_scale", "masks"}
        self._function(one, one, *[point] * len(needed), **held | {"backend": "reference"})

    def _pairs(self, student, teacher, count: int) -> list[tuple[Tensor, Tensor]]:
        pairs = stages(type(self).__name__, student, teacher)
        if len(pairs) != count:
            raise ValueError(
                f"{type(self).__name__}: student must have {count} stages, got {len(pairs)}."
            )
        return pairs


class FitNetLoss(MapsLoss, function=functional.fitnet_loss):
    """Hints: :func:`kdkernels.functional.fitnet_loss` after mdistiller's regressor.

    Args:
        student_shape, teacher_shape: of the features, (B, C, H, W), as a dry run gives them.
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int], **held) -> None:
        super().__init__(**held)
        self.regressor = ConvReg(student_shape, teacher_shape)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of features ``student`` against ``teacher``."""
        return self._call(self.regressor(student), teacher)


class OFDLoss(MapsLoss, function=functional.ofd_loss):
    """Overhaul of feature distillation: :func:`kdkernels.functional.ofd_loss` after connectors.

    Args:
        student_channels: of each stage.
        margins: of each stage, one for each of the teacher's channels; with the normalisation that
            a stage comes from, ``ofd_margin(norm.weight, norm.bias)``.
    """

    def __init__(self, student_channels: Sequence[int], margins: Sequence[Tensor], **held) -> None:
        super().__init__(**held)
        self.connectors = nn.ModuleList(
            Connector(channels, margin.numel())
            for channels, margin in zip(student_channels, margins, strict=True)
        )
        for i, margin in enumerate(margins):
            self.register_buffer(f"margin{i}", margin.detach().flatten())

    def forward(self, student, teacher) -> Tensor:
        """The loss of maps before their activation, a sequence of stages or a tensor of one."""
        pairs = self._pairs(student, teacher, len(self.connectors))
        connected = [f(s) for f, (s, _) in zip(self.connectors, pairs, strict=True)]
        margins = [getattr(self, f"margin{i}") for i in range(len(pairs))]
        return self._call(connected, [t for _, t in pairs], margins)


class ABLoss(MapsLoss, function=functional.ab_loss):
    """Activation boundaries: :func:`kdkernels.functional.ab_loss`.

    Where widths or sizes differ, ``ConvReg(..., relu=False)`` of ``kdkernels.modules.projectors``
    connects.
    """


class VIDLoss(MapsLoss, function=functional.vid_loss):
    """Variational information distillation: :func:`kdkernels.functional.vid_loss` of regressors.

    ``regressors`` predict the mean from the student's maps, of maps of two sizes the larger pooled
    first; ``log_scales`` are learned with them, as in RepDistiller.

    Args:
        student_channels, teacher_channels: of each stage.
        mid_channels: of each stage's regressor; the teacher's by default.
        init_variance: of every channel.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        mid_channels: Sequence[int] | None = None,
        init_variance: float = 5.0,
        **held,
    ) -> None:
        super().__init__(**held)
        init_variance = checks.number(type(self).__name__, "init_variance", init_variance, self.eps)
        mid_channels = teacher_channels if mid_channels is None else mid_channels
        self.regressors = nn.ModuleList(
            PointwiseRegressor(*channels)
            for channels in zip(student_channels, teacher_channels, mid_channels, strict=True)
        )
        start = math.log(math.expm1(init_variance - self.eps))
        self.log_scales = nn.ParameterList(
            nn.Parameter(torch.full((channels,), start)) for channels in teacher_channels
        )

    def forward(self, student, teacher) -> Tensor:
        """The loss of maps, sequences of stages or tensors of one."""
        pairs = self._pairs(student, teacher, len(self.regressors))
        pairs = [same_size(s, t) for s, t in pairs]
        means = [f(s) for f, (s, _) in zip(self.regressors, pairs, strict=True)]
        return self._call(means, [t for _, t in pairs], list(self.log_scales))


class MGDLoss(MapsLoss, function=functional.mgd_loss):
    """Masked generative distillation: :func:`kdkernels.functional.mgd_loss` of what is generated.

    The student's features are aligned with the teacher's width, masked, and completed by
    ``generation``.

    Args:
        student_channels, teacher_channels: of the features.
        drop: the share that a mask hides: 0.15 for classification, by channel; 0.65 for detection
            and 0.75 for segmentation, by place.
        by: as in :func:`kdkernels.functional.random_mask`.
        generator: where masks come from.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        drop: float = 0.15,
        by: str = "channel",
        generator: torch.Generator | None = None,
        **held,
    ) -> None:
        super().__init__(**held)
        self.align = align(student_channels, teacher_channels)
        self.generation = Generator(teacher_channels)
        self.drop, self.by, self.generator = drop, by, generator
        functional.random_mask(torch.zeros(1, 1, 1, device="cpu"), drop, by=by)

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of features; ``mask`` is drawn unless it is given."""
        aligned = self.align(student)
        if mask is None:
            mask = functional.random_mask(aligned, self.drop, by=self.by, generator=self.generator)
        return self._call(self.generation(aligned * mask), teacher)
