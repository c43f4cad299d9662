# SPDX-License-Identifier: Apache-2.0
"""How the losses of the golden cases are called: one module of adapters per family."""

from __future__ import annotations

import importlib
import pkgutil

ADAPTERS = {}


def adapter(loss: str, *suites: str):
    """Register how a loss of these suites is called: from inputs and hyper to named values."""

    def register(function):
        ADAPTERS.update({(loss, suite): function for suite in suites})
        return function

    return register


def reduction_of(h) -> str:
    return h.reduction.split()[0].lower()


for _family in pkgutil.iter_modules(__path__):  # each registers its adapters
    importlib.import_module(f"golden.{_family.name}")
