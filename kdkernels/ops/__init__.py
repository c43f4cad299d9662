# SPDX-License-Identifier: Apache-2.0
"""Registered operators: one module per family with its schema, fake and autograd function.

Schemas are defined in Python, so that importing the package never depends on a binary; the
compiled extensions only add kernels to them. What could not be loaded, and why, is kept here.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from pathlib import Path

import torch

from kdkernels import contract

NAMESPACE = "kdkernels"
_MISSING = {
    "_C_cpu": "the extension was not built (no compiler at install time, or KDKERNELS_BUILD=0)",
    "_C_cuda": "the extension was not built (kdkernels info says why)",
}
_load_errors: dict[str, str] = {}


def _load(name: str) -> None:
    path = Path(__file__).parents[1] / f"{name}.so"
    if not path.exists():
        _load_errors[name] = _MISSING[name]
        return
    if reason := contract.breach(path):
        _load_errors[name] = reason
        warnings.warn(f"kdkernels: {reason}", stacklevel=2)
        return
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        _load_errors[name] = f"{name} did not load with torch {torch.__version__}: {error}"


def loaded(name: str) -> bool:
    """Whether the compiled extension ``name`` is in use."""
    return name not in _load_errors


def _operator(family: str) -> str:
    """Of "family.operator", or of a family that has but one, of its name."""
    return family.rpartition(".")[2]


def compiled_verdict(family: str, backend: str) -> tuple[bool, str]:
    """Whether the compiled extension of ``backend`` ("cpu" or "cuda") holds ``family``."""
    operator = f"{NAMESPACE}::{_operator(family)}"
    if torch._C._dispatch_has_kernel_for_dispatch_key(operator, backend.upper()):
        return True, f"compiled extension _C_{backend}"
    return False, _load_errors.get(f"_C_{backend}", f"_C_{backend} has no {family} kernel")


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (for tests)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_verdict(family: str, device_type: str) -> tuple[bool, str]:
    """Whether the Triton kernels of ``family`` run on a device type."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    module = importlib.util.find_spec(f"kdkernels.triton.{family.partition('.')[0]}")
    if module is None or not hasattr(torch.ops.kdkernels, f"{_operator(family)}_triton"):
        return False, f"{family} has no triton kernel"
    if device_type == "cuda":
        return True, "triton, compiled at first use"
    if device_type == "cpu" and triton_interpreted():
        return True, "triton's interpreter"
    return False, f"runs on cuda tensors, got {device_type} tensors"


@torch.compiler.assume_constant_result  # imports are not for tracing
def register_triton(*modules: str) -> bool:
    """Import modules of ``kdkernels.triton``, which register their operators."""
    for module in modules:
        importlib.import_module(f"kdkernels.triton.{module}")
    return True


# These define the schemas that the binaries implement.
from kdkernels.ops import (  # noqa: E402
    attention,
    batchwise,
    contrast,
    ensemble,
    maps,
    relation,
    rowwise,
    sparse,
)

__all__ = [
    "attention", "batchwise", "contrast", "ensemble", "maps", "relation", "rowwise", "sparse",
]  # fmt: skip

_load("_C_cpu")
_load("_C_cuda")
