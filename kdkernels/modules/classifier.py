# SPDX-License-Identifier: Apache-2.0
"""Methods in which the student's features pass through the teacher's own classifier."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from kdkernels import checks, functional
from kdkernels.functional.features import pair, same_size

__all__ = ["SRRLLoss", "SimKDLoss"]


def _frozen(name: str, classifier: nn.Module) -> nn.Module:
    """A copy that does not learn, so that the teacher's own keeps its state."""
    if not isinstance(classifier, nn.Module):
        raise TypeError(f"{name}: classifier must be a module, got {type(classifier).__name__}.")
    return copy.deepcopy(classifier).requires_grad_(False).eval()


def _pooled(x: Tensor) -> Tensor:
    return x.flatten(2).mean(-1) if x.dim() > 2 else x


class _WithClassifier(nn.Module):
    """Keeps ``classifier`` in evaluation mode."""

    classifier: nn.Module

    def train(self, mode: bool = True):
        super().train(mode)
        self.classifier.eval()
        return self


class SRRLLoss(_WithClassifier):
    """SRRL with its connector: :func:`kdkernels.functional.srrl_loss`.

    The connector, a 1x1 convolution without bias, batch norm and ReLU, learns; the classifier is a
    frozen copy of the teacher's, through which the gradient passes.

    Args:
        student_channels, teacher_channels: of the last feature maps.
        classifier: from pooled features (B, teacher_channels) to logits.
        alpha, beta: as in the function.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        classifier: nn.Module,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.alpha = checks.number(name, "alpha", alpha)
        self.beta = checks.number(name, "beta", beta)
        self.connector = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.BatchNorm2d(teacher_channels),
            nn.ReLU(inplace=True),
        )
        self.classifier = _frozen(name, classifier)

    def forward(self, student: Tensor, teacher: Tensor, teacher_logits: Tensor) -> Tensor:
        """The loss of maps ``student`` (B, C, H, W) against the teacher's and its logits (B, K)."""
        student = self.connector(student)
        logits = self.classifier(_pooled(student))
        return functional.srrl_loss(
            student, teacher, logits, teacher_logits, alpha=self.alpha, beta=self.beta
        )


class SimKDLoss(_WithClassifier):
    """SimKD (arXiv 2203.14001): the mean square of ``transfer(student) - teacher``, last maps.

    No cross-entropy and no KL divergence beside it: at inference the student is
    ``predict(student_map)``, its transfer module and a frozen copy of the teacher's classifier.

    The transfer module is 1x1, 3x3 and 1x1 convolutions, each with batch norm and ReLU, of
    ``teacher_channels // factor`` channels between. The larger map is average-pooled to the
    smaller, the student's before the transfer.

    Args:
        student_channels, teacher_channels: of the last feature maps.
        classifier: from pooled features (B, teacher_channels) to logits.
        factor: of the bottleneck.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        classifier: nn.Module,
        *,
        factor: int = 2,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not 1 <= checks.integer(name, "factor", factor) <= teacher_channels:
            raise ValueError(f"{name}: factor must be in [1, {teacher_channels}], got {factor}.")
        mid = teacher_channels // factor
        widths = ((student_channels, mid, 1), (mid, mid, 3), (mid, teacher_channels, 1))
        self.transfer = nn.Sequential()
        for inputs, outputs, size in widths:
            self.transfer.append(nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False))
            self.transfer.append(nn.BatchNorm2d(outputs))
            self.transfer.append(nn.ReLU(inplace=True))
        self.classifier = _frozen(name, classifier)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of maps ``student`` (B, C, H, W) against ``teacher``."""
        pair("SimKDLoss", student, teacher, shape="(B, C, H, W)", same=(0,))
        student, teacher = same_size(student, teacher)
        student = self.transfer(student).permute(0, 2, 3, 1)  # whose last dimension is a vector's
        return functional.embedding_loss(student, teacher.permute(0, 2, 3, 1), distance="mse")

    def project(self, student: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """The student's map in the teacher's space, pooled to the teacher's ``size`` if larger."""
        if size is not None and student.shape[2] > size[0]:
            student = F.adaptive_avg_pool2d(student, tuple(size))
        return self.transfer(student)

    def predict(self, student: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Logits (B, K) by the teacher's classifier; ``size`` as in :meth:`project`."""
        return self.classifier(_pooled(self.project(student, size)))
