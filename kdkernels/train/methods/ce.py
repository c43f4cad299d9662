# SPDX-License-Identifier: Apache-2.0
"""The student alone: cross-entropy with the labels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from kdkernels.train.data import Batch
from kdkernels.train.methods.base import Method, Output


class CE(Method):
    """Cross-entropy with the labels; the baseline, and how teachers are trained."""

    needs_teacher = False

    def losses(
        self, batch: Batch, student_out: Output, teacher_out: Sequence[Output]
    ) -> dict[str, Tensor]:
        if not self.ce_weight:
            return {}
        return {"ce": F.cross_entropy(student_out.logits, batch.labels)}
