# SPDX-License-Identifier: Apache-2.0
"""The ensemble losses as modules; arguments, result and errors are those of their functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels import backends, checks, functional
from kdkernels.modules.base import LossModule

__all__ = ["MultiTeacherKLDivLoss"]


class MultiTeacherKLDivLoss(LossModule, function=functional.multi_teacher_kl_div):
    """KL of several teachers: :func:`kdkernels.functional.multi_teacher_kl_div`.

    ``weights`` are held where they are one number a teacher (learned, as an ``nn.Parameter``), and
    given to the call where there is one a row.
    """

    def forward(
        self,
        student: Tensor,
        teachers: Tensor | Sequence[Tensor],
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``student`` (..., C) against ``teachers`` (M, ..., C)."""
        return self._call(student, teachers, labels, mask=mask, row_weight=row_weight)

    def _check(self, held):
        # As the rowwise modules: the function judges its hyperparameters, on one row.
        checks.choice(type(self).__name__, "backend", held["backend"], backends.BACKENDS)
        row = torch.zeros(1, 2, device="cpu")
        label = torch.zeros(1, dtype=torch.int64, device="cpu")
        numbers = {n: 1.0 if isinstance(v, Tensor) else v for n, v in held.items()}
        left = {"backend": "reference", "weights": None, "class_range": None}
        self._function(row, [row], label, **numbers | left)
