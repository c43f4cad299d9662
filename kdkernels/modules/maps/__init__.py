# SPDX-License-Identifier: Apache-2.0
"""The losses over feature maps as modules, with what they learn."""

from kdkernels.modules.maps.elementwise import (
    ABLoss,
    FitNetLoss,
    MGDLoss,
    OFDLoss,
    VIDLoss,
)
from kdkernels.modules.maps.maskd import MasKDLoss, ReceptiveTokens
from kdkernels.modules.maps.spatial import (
    AttentionTransferLoss,
    CWDLoss,
    FTLoss,
    HCLLoss,
    PKDLoss,
)

__all__ = [
    "ABLoss",
    "AttentionTransferLoss",
    "CWDLoss",
    "FTLoss",
    "FitNetLoss",
    "HCLLoss",
    "MGDLoss",
    "MasKDLoss",
    "OFDLoss",
    "PKDLoss",
    "ReceptiveTokens",
    "VIDLoss",
]
