# SPDX-License-Identifier: Apache-2.0
"""The losses as ``torch.nn`` modules, one file per family."""

from kdkernels.modules.rowwise import (
    DivergenceLoss,
    JSDivLoss,
    KDLoss,
    ReverseKLDivLoss,
    SoftKLDivLoss,
    TVDistanceLoss,
)

__all__ = [
    "DivergenceLoss",
    "JSDivLoss",
    "KDLoss",
    "ReverseKLDivLoss",
    "SoftKLDivLoss",
    "TVDistanceLoss",
]
