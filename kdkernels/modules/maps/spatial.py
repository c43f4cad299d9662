# SPDX-License-Identifier: Apache-2.0
"""Losses between maps without their channels, and at several sizes; nothing of them is learned."""

from __future__ import annotations

from kdkernels import functional
from kdkernels.modules.maps.elementwise import MapsLoss


class AttentionTransferLoss(MapsLoss, function=functional.attention_transfer):
    """Attention transfer: :func:`kdkernels.functional.attention_transfer`."""


class FTLoss(MapsLoss, function=functional.ft_loss):
    """Factor transfer, of factors: :func:`kdkernels.functional.ft_loss`."""


class HCLLoss(MapsLoss, function=functional.hcl_loss):
    """Hierarchical context loss: :func:`kdkernels.functional.hcl_loss`."""


class CWDLoss(MapsLoss, function=functional.cwd_loss):
    """Channel-wise distillation: :func:`kdkernels.functional.cwd_loss`."""


class PKDLoss(MapsLoss, function=functional.pkd_loss):
    """Pearson distillation: :func:`kdkernels.functional.pkd_loss`."""
