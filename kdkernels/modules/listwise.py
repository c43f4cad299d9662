# SPDX-License-Identifier: Apache-2.0
"""The list-wise losses as modules."""

from __future__ import annotations

from kdkernels import functional
from kdkernels.modules.rowwise import RowwiseLoss

__all__ = ["PLDLoss"]


class PLDLoss(RowwiseLoss, function=functional.pld_loss):
    """Plackett-Luce distillation: :func:`kdkernels.functional.pld_loss`."""
