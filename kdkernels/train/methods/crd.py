# SPDX-License-Identifier: Apache-2.0
"""Contrastive representation distillation (arXiv 1910.10699)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdkernels import CRDLoss
from kdkernels.train.config import check_range
from kdkernels.train.data import Batch
from kdkernels.train.errors import InputError
from kdkernels.train.methods.base import Output
from kdkernels.train.methods.features import FeatureMethod
from kdkernels.train.models import Taps


class CRD(FeatureMethod):
    """CE + weight x contrast of pooled features with those of the other network's memory bank.

    Weight, sizes, temperature and momentum are RepDistiller's. Embeddings and banks are in the
    checkpoint, not in the exported model.

    Args:
        crd_weight: weight of the contrast; the cross-entropy's is 1.
        dim: width of the embeddings.
        negatives: samples of other classes that each sample is contrasted with.
        contrast_temperature: divides the scores.
        momentum: share of a bank's row that stays when its sample is seen.
        student_taps: paths of the modules of the student whose outputs are compared, <path>:input
            for what one takes instead; those usual in the literature if not given.
        teacher_taps: the same of the teacher, one for each of the student.
    """

    needs_numbers = True

    def __init__(
        self,
        crd_weight: float = 0.8,
        dim: int = 128,
        negatives: int = 16384,
        contrast_temperature: float = 0.07,
        momentum: float = 0.5,
        student_taps: list[str] | None = None,
        teacher_taps: list[str] | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(student_taps, teacher_taps, backend=backend)
        check_range(
            above=0, dim=dim, negatives=negatives, contrast_temperature=contrast_temperature
        )
        check_range(least=0, crd_weight=crd_weight)
        check_range(least=0, most=1, momentum=momentum)
        self.crd_weight, self.dim, self.negatives = crd_weight, dim, negatives
        self.contrast_temperature, self.momentum = contrast_temperature, momentum

    @staticmethod
    def usual(taps: Taps) -> Sequence[str]:
        return (taps.pooled,)

    def taps(self, student: nn.Module, teachers: Sequence[nn.Module]) -> list[Sequence[str]]:
        taps = super().taps(student, teachers)
        if len(self.student_taps) > 1:
            raise InputError(
                f"--method crd: compares one place of either network, got {self.student_taps}"
            )
        return taps

    def setup(self, student_out: Output, teacher_out: Sequence[Output]) -> None:
        (student,), (teacher,) = self.features(student_out, teacher_out)
        train = self.run.data.train
        labels = torch.from_numpy(train.labels[train.rows])
        self.contrast = CRDLoss(
            student.flatten(1).shape[1],
            teacher.flatten(1).shape[1],
            len(labels),
            labels,
            dim=self.dim,
            num_negatives=self.negatives,
            temperature=self.contrast_temperature,
            momentum=self.momentum,
            group=self.run.group,
            backend=self.backend,
        )

    def weights(self, step: int) -> Mapping[str, float]:
        return {"crd": self.crd_weight}

    def losses(
        self, batch: Batch, student_out: Output, teacher_out: Sequence[Output]
    ) -> dict[str, Tensor]:
        (student,), (teacher,) = self.features(student_out, teacher_out)
        terms = {"crd": self.contrast(student, teacher, batch.rows)}
        if self.ce_weight:
            terms["ce"] = F.cross_entropy(student_out.logits, batch.labels)
        return terms
