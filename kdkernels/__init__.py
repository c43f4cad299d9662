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
    from kdkernels.modules import *


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"kdkernels.{name}")
    if name in _HOMES or name[0].isupper():  # the losses' modules, and nothing that needs no torch
        home = importlib.import_module(f"kdkernels.{_HOMES.get(name, 'modules')}")
        if name in _HOMES or name in home.__all__:
            globals()[name] = getattr(home, name)
            return globals()[name]
    raise AttributeError(f"module 'kdkernels' has no attribute {name!r}")


def __dir__():
    return [*__all__, *importlib.import_module("kdkernels.modules").__all__]
