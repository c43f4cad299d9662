# SPDX-License-Identifier: Apache-2.0
"""The losses as ``torch.nn`` modules, one file per family."""

from kdkernels.modules.attention import LearningSimplifier, StudentFriendlyKDLoss
from kdkernels.modules.batchwise import DISTLoss, MLKDLoss
from kdkernels.modules.ensemble import MultiTeacherKLDivLoss
from kdkernels.modules.listwise import PLDLoss
from kdkernels.modules.maps import (
    ABLoss,
    FitNetLoss,
    MasKDLoss,
    MGDLoss,
    OFDLoss,
    ReceptiveTokens,
    VIDLoss,
)
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
    "ABLoss",
    "ATSLoss",
    "DISTLoss",
    "DKDLoss",
    "DivergenceLoss",
    "FitNetLoss",
    "JSDivLoss",
    "KDLoss",
    "LearningSimplifier",
    "MGDLoss",
    "MLKDLoss",
    "MasKDLoss",
    "MultiTeacherKLDivLoss",
    "NKDLoss",
    "OFDLoss",
    "PLDLoss",
    "ReceptiveTokens",
    "ReverseKLDivLoss",
    "SoftKLDivLoss",
    "StudentFriendlyKDLoss",
    "TVDistanceLoss",
    "TopKDivergenceLoss",
    "VIDLoss",
    "WSLDLoss",
]
