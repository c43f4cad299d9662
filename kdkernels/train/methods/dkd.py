# SPDX-License-Identifier: Apache-2.0
"""Decoupled distillation (arXiv 2203.08679)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import functional as F

from kdkernels import functional as KF
from kdkernels.train.config import check_range
from kdkernels.train.data import Batch
from kdkernels.train.methods.base import Method, Output


class DKD(Method):
    """CE + warm-up x T^2 (alpha TCKD + beta NCKD): the target's part and that of the others.

    Args:
        temperature: softens the teacher's and the student's probabilities.
        alpha: weight of the target class's part.
        beta: weight of the other classes' part. The paper's is larger for surer teachers: 2
            (resnet56 to resnet20, resnet110 to resnet32), 6 (WRN, VGG13), 8 (resnet32x4, ResNet50).
        warmup: epochs over which the weight of both grows to 1.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        warmup: int = 20,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(backend)
        check_range(above=0, temperature=temperature, warmup=warmup)
        check_range(least=0, alpha=alpha, beta=beta)
        self.temperature, self.alpha, self.beta, self.warmup = temperature, alpha, beta, warmup

    def weights(self, step: int) -> Mapping[str, float]:
        epoch = step // self.run.steps_per_epoch
        return {"dkd": min((epoch + 1) / self.warmup, 1.0)}

    def losses(
        self, batch: Batch, student_out: Output, teacher_out: Sequence[Output]
    ) -> dict[str, Tensor]:
        terms = {
            "dkd": KF.dkd_loss(
                student_out.logits,
                teacher_out[0].logits,
                batch.labels,
                temperature=self.temperature,
                alpha=self.alpha,
                beta=self.beta,
                backend=self.backend,
            )
        }
        if self.ce_weight:
            terms["ce"] = F.cross_entropy(student_out.logits, batch.labels)
        return terms
