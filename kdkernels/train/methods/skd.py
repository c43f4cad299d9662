# SPDX-License-Identifier: Apache-2.0
"""Student-friendly distillation (arXiv 2305.10893), a reconstruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kdkernels import LearningSimplifier
from kdkernels import functional as KF
from kdkernels.train.config import check_range
from kdkernels.train.data import Batch
from kdkernels.train.methods.base import Method, Output


class SKD(Method):
    """CE + T^2 KL(simplified teacher || student): attention rewrites the teacher's logits.

    The learning simplifier learns from the KL with the student and is not part of the exported
    model. That KL alone has nothing to stop it before the target is the student: how much of the
    teacher is left is then a matter of how many steps of what size are taken. So the simplifier
    also has T^2 KL(teacher || simplified teacher), and settles between the two.

    Reconstruction: the paper's abstract is all that could be had; what the attention runs over, its
    sizes, the weights and the pull towards the teacher are guesses, see
    :class:`kdkernels.LearningSimplifier`.

    Args:
        temperature: softens the teacher's and the student's probabilities.
        kd_weight: weight of the KL; the cross-entropy's is 1.
        tokens: classes attend to classes in each sample, or samples to samples in each batch.
        dim: width of the attention.
        keep: how many times as strongly the target is drawn to the teacher as to the student; with
            0 it loses the teacher sooner or later (target_agreement in the log).
        simplifier_lr: learning rate of the simplifier, as a share of the student's.
    """

    def __init__(
        self,
        temperature: float = 4.0,
        kd_weight: float = 1.0,
        tokens: Literal["class", "batch"] = "class",
        dim: int = 32,
        keep: float = 4.0,
        simplifier_lr: float = 0.05,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(backend)
        check_range(above=0, temperature=temperature, dim=dim)
        check_range(least=0, kd_weight=kd_weight, keep=keep, simplifier_lr=simplifier_lr)
        self.temperature, self.kd_weight, self.keep = temperature, kd_weight, keep
        self.tokens, self.dim, self.simplifier_lr = tokens, dim, simplifier_lr

    def setup(self, student_out: Output, teacher_out: Sequence[Output]) -> None:
        self.simplifier = LearningSimplifier(
            student_out.logits.shape[-1],
            self.dim,
            temperature=self.temperature,
            tokens=self.tokens,
            group=self.run.group if self.tokens == "batch" else None,
            backend=self.backend,
        )

    def weights(self, step: int) -> Mapping[str, float]:
        return {"keep": self.keep * self.kd_weight}

    def teach(self, batch: Batch, teacher_out: Sequence[Output]) -> Sequence[Output]:
        self.original = teacher_out[0].logits
        return [out._replace(logits=self.simplifier(out.logits)) for out in teacher_out]

    def losses(
        self, batch: Batch, student_out: Output, teacher_out: Sequence[Output]
    ) -> dict[str, Tensor]:
        terms = {}
        if self.keep:
            terms["keep"] = KF.kl_div(
                teacher_out[0].logits,
                self.original,
                temperature=self.temperature,
                backend=self.backend,
            )
        terms["skd"] = KF.kd_loss(
            student_out.logits,
            teacher_out[0].logits,
            batch.labels,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            kd_weight=self.kd_weight,
            backend=self.backend,
        )
        return terms

    @torch.no_grad()
    def measure(self, student: Tensor, labels: Tensor, teacher: Tensor | None) -> dict[str, float]:
        """Whether the target is simpler than the teacher, and still the teacher's.

        Where samples attend to samples, all of validation is one batch, unlike those of training.
        """
        target = self.simplifier(teacher)

        def entropy(logits: Tensor) -> float:
            p = (logits / self.temperature).softmax(-1)
            return torch.special.entr(p).sum(-1).mean().item()

        def divergence(logits: Tensor) -> float:
            return KF.kl_div(student, logits, temperature=self.temperature, scale="none").item()

        return {
            "target_entropy": entropy(target),
            "teacher_entropy": entropy(teacher),
            "target_agreement": (target.argmax(-1) == teacher.argmax(-1)).float().mean().item(),
            "kl_to_target": divergence(target),
            "kl_to_softened_teacher": divergence(teacher),
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        # No weight decay: it would pull the target back to the teacher's own logits.
        return [
            {
                "params": list(self.simplifier.parameters()),
                "lr_scale": self.simplifier_lr,
                "weight_decay": 0.0,
            }
        ]
