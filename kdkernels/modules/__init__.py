# SPDX-License-Identifier: Apache-2.0
"""The losses as ``torch.nn`` modules, one file per family."""

from kdkernels.modules.attention import LearningSimplifier, StudentFriendlyKDLoss
from kdkernels.modules.batchwise import DISTLoss, MLKDLoss
from kdkernels.modules.ensemble import MultiTeacherKLDivLoss
from kdkernels.modules.listwise import PLDLoss
from kdkernels.modules.rowwise import (
    ATSLoss,
    DivergenceLoss,
    DKDLoss,
    JSDivLoss,
    KDLoss,
    NKDLoss,
    ReverseKLDivLoss,
    SoftKLDivLoss,
    TVDistanceLoss,
    WSLDLoss,
)
from kdkernels.modules.sparse import TopKDivergenceLoss

__all__ = [
    "ATSLoss",
    "DISTLoss",
    "DKDLoss",
    "DivergenceLoss",
    "JSDivLoss",
    "KDLoss",
    "LearningSimplifier",
    "MLKDLoss",
    "MultiTeacherKLDivLoss",
    "NKDLoss",
    "PLDLoss",
    "ReverseKLDivLoss",
    "SoftKLDivLoss",
    "StudentFriendlyKDLoss",
    "TVDistanceLoss",
    "TopKDivergenceLoss",
    "WSLDLoss",
]
