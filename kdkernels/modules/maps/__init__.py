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

__all__ = [
    "ABLoss",
    "FitNetLoss",
    "MGDLoss",
    "MasKDLoss",
    "OFDLoss",
    "ReceptiveTokens",
    "VIDLoss",
]
