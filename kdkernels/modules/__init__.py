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
from kdkernels.modules.relation import (
    CCLoss,
    FSPLoss,
    GramLoss,
    ICKDLoss,
    KDSVDLoss,
    NSTLoss,
    PKTLoss,
    RKDLoss,
    SPLoss,
    SSKDLoss,
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
    "CCLoss",
    "DISTLoss",
    "DKDLoss",
    "DivergenceLoss",
    "FSPLoss",
    "FitNetLoss",
    "GramLoss",
    "ICKDLoss",
    "JSDivLoss",
    "KDLoss",
    "KDSVDLoss",
    "LearningSimplifier",
    "MGDLoss",
    "MLKDLoss",
    "MasKDLoss",
    "MultiTeacherKLDivLoss",
    "NKDLoss",
    "NSTLoss",
    "OFDLoss",
    "PKTLoss",
    "PLDLoss",
    "RKDLoss",
    "ReceptiveTokens",
    "ReverseKLDivLoss",
    "SPLoss",
    "SSKDLoss",
    "SoftKLDivLoss",
    "StudentFriendlyKDLoss",
    "TVDistanceLoss",
    "TopKDivergenceLoss",
    "VIDLoss",
    "WSLDLoss",
]
