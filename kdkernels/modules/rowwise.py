# SPDX-License-Identifier: Apache-2.0
"""The rowwise losses as modules; arguments, result and errors are those of their functions."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import backends, checks, functional
from kdkernels.modules.base import LossModule

__all__ = [
    "ATSLoss",
    "DKDLoss",
    "DivergenceLoss",
    "JSDivLoss",
    "KDLoss",
    "NKDLoss",
    "ReverseKLDivLoss",
    "SoftKLDivLoss",
    "TVDistanceLoss",
    "WSLDLoss",
]


class RowwiseLoss(LossModule):
    """Base of the rowwise modules: logits in, loss out."""

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``student`` (..., C) against ``teacher``."""
        return self._call(student, teacher, labels, mask=mask, row_weight=row_weight)

    def _check(self, held):
        # The function itself judges its hyperparameters, on one row. What depends on the logits
        # (a tensor's shape and device, whether the backend runs there) is left to the call.
        checks.choice(type(self).__name__, "backend", held["backend"], backends.BACKENDS)
        numbers = {n: 1.0 if isinstance(v, Tensor) else v for n, v in held.items()}
        first, last = held.get("class_range") or (0, 2)
        row = torch.zeros(1, last, device="cpu")
        label = torch.full((1,), first, device="cpu")
        overrides = {"backend": "reference", "inplace": False}
        numbers |= {name: value for name, value in overrides.items() if name in held}
        self._function(row, row, label, **numbers)


class SoftKLDivLoss(RowwiseLoss, function=functional.kl_div):
    """Softened KL divergence of Hinton et al.: :func:`kdkernels.functional.kl_div`.

    Takes logits, unlike ``torch.nn.KLDivLoss``; for its semantics see
    :class:`kdkernels.dropin.KLDivFromLogits`.
    """


class ReverseKLDivLoss(RowwiseLoss, function=functional.reverse_kl_div):
    """Reverse KL divergence: :func:`kdkernels.functional.reverse_kl_div`."""


class JSDivLoss(RowwiseLoss, function=functional.js_div):
    """Generalised Jensen-Shannon divergence: :func:`kdkernels.functional.js_div`."""


class TVDistanceLoss(RowwiseLoss, function=functional.tv_distance):
    """Total variation distance: :func:`kdkernels.functional.tv_distance`."""


class DivergenceLoss(RowwiseLoss, function=functional.divergence):
    """Any divergence of the family by name: :func:`kdkernels.functional.divergence`."""


class KDLoss(RowwiseLoss, function=functional.kd_loss):
    """Cross-entropy and softened KL in one pass: :func:`kdkernels.functional.kd_loss`."""


class DKDLoss(RowwiseLoss, function=functional.dkd_loss):
    """Decoupled knowledge distillation: :func:`kdkernels.functional.dkd_loss`."""


class NKDLoss(RowwiseLoss, function=functional.nkd_loss):
    """Normalised knowledge distillation: :func:`kdkernels.functional.nkd_loss`."""


class ATSLoss(RowwiseLoss, function=functional.ats_loss):
    """Asymmetric temperature scaling: :func:`kdkernels.functional.ats_loss`."""


class WSLDLoss(RowwiseLoss, function=functional.wsld_loss):
    """Weighted soft labels: :func:`kdkernels.functional.wsld_loss`."""
