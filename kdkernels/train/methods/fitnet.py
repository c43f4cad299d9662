# SPDX-License-Identifier: Apache-2.0
"""Hints (FitNets, arXiv 1412.6550)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from kdkernels import functional as KF
from kdkernels.modules.projectors import ConvReg
from kdkernels.train.config import check_range
from kdkernels.train.data import Batch
from kdkernels.train.errors import InputError
from kdkernels.train.methods.base import Output
from kdkernels.train.methods.features import FeatureMethod
from kdkernels.train.models import Taps


class FitNet(FeatureMethod):
    """CE + weight x mean squared error of a hint: the student's features, projected, and teacher's.

    Weight, place (the end of the second stage) and regressors are mdistiller's. As there, all learn
    from the first step on; in the paper the hint has a stage of training of its own.

    Args:
        hint_weight: weight of the squared error; the cross-entropy's is 1.
        student_taps: paths of the modules of the student whose outputs are compared, <path>:input
            for what one takes instead; those usual in the literature if not given.
        teacher_taps: the same of the teacher, one for each of the student.
    """

    def __init__(
        self,
        hint_weight: float = 100.0,
        student_taps: list[str] | None = None,
        teacher_taps: list[str] | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(student_taps, teacher_taps, backend=backend)
        check_range(least=0, hint_weight=hint_weight)
        self.hint_weight = hint_weight

    @staticmethod
    def usual(taps: Taps) -> Sequence[str]:
        return taps.stages[1:2]

    def setup(self, student_out: Output, teacher_out: Sequence[Output]) -> None:
        pairs = zip(*self.features(student_out, teacher_out), strict=True)
        try:
            self.regressors = nn.ModuleList(ConvReg(s.shape, t.shape) for s, t in pairs)
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"--method fitnet: {error}") from error

    def weights(self, step: int) -> Mapping[str, float]:
        return {"hint": self.hint_weight}

    def losses(
        self, batch: Batch, student_out: Output, teacher_out: Sequence[Output]
    ) -> dict[str, Tensor]:
        student, teacher = self.features(student_out, teacher_out)
        hints = [project(s) for project, s in zip(self.regressors, student, strict=True)]
        terms = {"hint": KF.fitnet_loss(hints, teacher, backend=self.backend)}
        if self.ce_weight:
            terms["ce"] = F.cross_entropy(student_out.logits, batch.labels)
        return terms
