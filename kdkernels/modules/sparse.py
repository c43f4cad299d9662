# SPDX-License-Identifier: Apache-2.0
"""The sparse losses as modules; arguments, result and errors are those of their functions."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import backends, checks, functional
from kdkernels.modules.base import LossModule

__all__ = ["TopKDivergenceLoss"]


class TopKDivergenceLoss(LossModule, function=functional.topk_divergence):
    """Divergence from a top-k teacher: :func:`kdkernels.functional.topk_divergence`."""

    def forward(
        self,
        student: Tensor,
        topk_values: Tensor,
        topk_indices: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        row_weight: Tensor | None = None,
        teacher_logsumexp: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``student`` (..., C) against ``topk_values`` (..., k)."""
        return self._call(
            student, topk_values, topk_indices, labels, mask=mask, row_weight=row_weight,
            teacher_logsumexp=teacher_logsumexp,
        )  # fmt: skip

    def _check(self, held):
        # As in RowwiseLoss: the function itself judges its hyperparameters, on one row.
        checks.choice(type(self).__name__, "backend", held["backend"], backends.BACKENDS)
        numbers = {n: 1.0 if isinstance(v, Tensor) else v for n, v in held.items()}
        row = torch.zeros(1, 2, device="cpu")
        label = torch.zeros(1, dtype=torch.int64, device="cpu")
        whole = row[:, 0] + 1.0 if held["missing"] == "tail" else None
        self._function(
            row, row[:, :1], label[:, None], label, teacher_logsumexp=whole,
            **numbers | {"backend": "reference"},
        )  # fmt: skip
