# SPDX-License-Identifier: Apache-2.0
"""Hinton's distillation (arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from kdkernels import functional as KF
from kdkernels.train.config import check_range
from kdkernels.train.data import Batch
from kdkernels.train.methods.base import Method, Output, TopK


class KD(Method):
    """(1 - alpha) CE + alpha T^2 KL(teacher || student) at temperature T, one pass over the logits.

    Args:
        temperature: softens the teacher's and the student's probabilities.
        alpha: weight of the teacher's part; the labels get the rest.
    """

    def __init__(
        self, temperature: float = 4.0, alpha: float = 0.9, *, backend: str = "auto"
    ) -> None:
        super().__init__(backend)
        check_range(above=0, temperature=temperature)
        check_range(least=0, most=1, alpha=alpha)
        self.temperature, self.alpha, self.ce_weight = temperature, alpha, 1 - alpha
        self.top_k_temperature = temperature

    def losses(
        self, batch: Batch, student_out: Output, teacher_out: Sequence[Output]
    ) -> dict[str, Tensor]:
        (teacher,) = teacher_out
        if isinstance(teacher.logits, TopK):
            return {"kd": self.top_k_loss(student_out.logits, teacher.logits, batch.labels)}
        loss = KF.kd_loss(
            student_out.logits,
            teacher.logits,
            batch.labels,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kd_weight=self.alpha,
            backend=self.backend,
        )
        return {"kd": loss}

    def top_k_loss(self, student: Tensor, teacher: TopK, labels: Tensor) -> Tensor:
        """The same with the teacher's other classes as one."""
        kl = KF.topk_divergence(
            student,
            teacher.values,
            teacher.classes,
            values="logits",
            teacher_logsumexp=teacher.logsumexp,
            temperature=self.temperature,
            backend=self.backend,
        )
        return self.ce_weight * F.cross_entropy(student, labels) + self.alpha * kl
