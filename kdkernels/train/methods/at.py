# SPDX-License-Identifier: Apache-2.0
"""Attention transfer (arXiv 1612.03928)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import functional as F

from kdkernels import functional as KF
from kdkernels.train.config import check_range
from kdkernels.train.data import Batch
from kdkernels.train.errors import InputError
from kdkernels.train.methods.base import Output
from kdkernels.train.methods.features import FeatureMethod
from kdkernels.train.models import Taps


class AT(FeatureMethod):
    """CE + weight x squared distance of normalised spatial attention, at the end of every stage.

    RepDistiller's and mdistiller's weight, power and places, which agree.

    Args:
        at_weight: weight of the distance; the cross-entropy's is 1. If not given 1000, which is for
            images of 32x32 pixels, and of smaller ones as much less as they have fewer: the
            distance is a mean over positions, and of fewer each is more of the attention.
        power: of the features, whose mean over channels is the attention.
        student_taps: paths of the modules of the student whose outputs are compared, <path>:input
            for what one takes instead; those usual in the literature if not given.
        teacher_taps: the same of the teacher, one for each of the student.
    """

    def __init__(
        self,
        at_weight: float | None = None,
        power: int = 2,
        student_taps: list[str] | None = None,
        teacher_taps: list[str] | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(student_taps, teacher_taps, backend=backend)
        check_range(least=1, power=power)
        check_range(least=0, at_weight=at_weight)
        self.at_weight, self.power = at_weight, power

    @staticmethod
    def usual(taps: Taps) -> Sequence[str]:
        return taps.stages

    def setup(self, student_out: Output, teacher_out: Sequence[Output]) -> None:
        for side, features in zip(
            ("student", "teacher"), self.features(student_out, teacher_out), strict=True
        ):
            if shapes := [tuple(x.shape) for x in features if x.ndim != 4]:
                raise InputError(
                    f"--method at: {side}: expected maps (B, C, H, W), got features {shapes[0]}"
                )

    def weights(self, step: int) -> Mapping[str, float]:
        if self.at_weight is not None:
            return {"at": self.at_weight}
        height, width, _ = self.run.data.shape
        return {"at": 1000 * min(height * width / 32**2, 1.0)}

    def losses(
        self, batch: Batch, student_out: Output, teacher_out: Sequence[Output]
    ) -> dict[str, Tensor]:
        student, teacher = self.features(student_out, teacher_out)
        terms = {
            "at": KF.attention_transfer(student, teacher, power=self.power, backend=self.backend)
        }
        if self.ce_weight:
            terms["ce"] = F.cross_entropy(student_out.logits, batch.labels)
        return terms
