# SPDX-License-Identifier: Apache-2.0
"""The batchwise losses as modules; arguments, result and errors are those of their functions."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import backends, checks, functional
from kdkernels.modules.base import LossModule

__all__ = ["DISTLoss", "MLKDLoss"]


class BatchwiseLoss(LossModule):
    """Base of the batchwise modules: logits in, loss out."""

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``student`` (..., C) against ``teacher``."""
        return self._call(student, teacher, labels, mask=mask)

    def _check(self, held):
        # The function itself judges its hyperparameters, on one row.
        checks.choice(type(self).__name__, "backend", held["backend"], backends.BACKENDS)
        numbers = {n: 1.0 if isinstance(v, Tensor) else v for n, v in held.items()}
        row = torch.zeros(1, 2, device="cpu")
        self._function(row, row, **numbers | {"backend": "reference", "group": None})


class DISTLoss(BatchwiseLoss, function=functional.dist_loss):
    """Pearson correlations by rows and columns: :func:`kdkernels.functional.dist_loss`."""


class MLKDLoss(BatchwiseLoss, function=functional.mlkd_loss):
    """Multi-level logit distillation: :func:`kdkernels.functional.mlkd_loss`."""
