# SPDX-License-Identifier: Apache-2.0
"""Fused, exact distillation losses for PyTorch.

``kdkernels.functional`` has the losses as functions, the package itself as modules,
``kdkernels.dropin`` under the signatures of other packages, ``kdkernels.numpy`` on NumPy arrays.
Everything is imported on first use, so that ``kdkernels.numpy`` never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

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
    "backends",
    "check",
    "dropin",
    "functional",
    "get_backend",
    "info",
    "modules",
    "numpy",
    "set_backend",
    "testing",
]
_SUBMODULES = ("backends", "dropin", "functional", "modules", "numpy", "testing")
_HOMES = {
    "check": "diagnostics",
    "info": "diagnostics",
    "get_backend": "backends",
    "set_backend": "backends",
}

if TYPE_CHECKING:
    from kdkernels import backends, dropin, functional, modules, numpy, testing
    from kdkernels.backends import get_backend, set_backend
    from kdkernels.diagnostics import check, info
    from kdkernels.modules import (
        ABLoss,
        ATSLoss,
        CCLoss,
        DISTLoss,
        DivergenceLoss,
        DKDLoss,
        FitNetLoss,
        FSPLoss,
        GramLoss,
        ICKDLoss,
        JSDivLoss,
        KDLoss,
        KDSVDLoss,
        LearningSimplifier,
        MasKDLoss,
        MGDLoss,
        MLKDLoss,
        MultiTeacherKLDivLoss,
        NKDLoss,
        NSTLoss,
        OFDLoss,
        PKTLoss,
        PLDLoss,
        ReceptiveTokens,
        ReverseKLDivLoss,
        RKDLoss,
        SoftKLDivLoss,
        SPLoss,
        SSKDLoss,
        StudentFriendlyKDLoss,
        TopKDivergenceLoss,
        TVDistanceLoss,
        VIDLoss,
        WSLDLoss,
    )


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"kdkernels.{name}")
    if name in __all__:  # the modules of the losses, unless listed elsewhere
        value = getattr(importlib.import_module(f"kdkernels.{_HOMES.get(name, 'modules')}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'kdkernels' has no attribute {name!r}")


def __dir__():
    return __all__
