# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs a loss: ``reference``, ``cpu``, ``triton`` or ``cuda``.

An explicit ``backend=`` is a demand and raises with the reason when it cannot be met; a preference
(:func:`set_backend`, ``KDKERNELS_BACKEND``) is used where the device allows; ``auto`` takes the
fastest kernel there is and says so, once, when it has to fall back to the reference. ``cuda`` is
CUDA C++, which the rowwise family alone has; a factor on its saved gradient, in the backward, is
Triton's.
"""

from __future__ import annotations

import os
import warnings
from typing import NamedTuple

import torch

from kdkernels import ops

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
# What `auto` tries per device type, first to last.
AUTO_ORDER = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
# Families of which the CUDA kernels go first: none, until a committed GPU result shows them correct
# and faster.
CUDA_FIRST: frozenset[str] = frozenset()

# Families, or single losses ("family.loss"), that torch's own operators compute, and why a kernel
# would not pay. For them `auto` means these operators, which the reference is made of, and nothing
# is warned of.
COMPOSITE = {
    "maps.pkd_loss": "composite by design: batch statistics of every channel, torch's own",
    "embeddings": "composite by design: D numbers a row, beside the D x D product that made them",
    "listwise": "composite by design: a sort of every row, beside which the rest is small",
    "relation.kdsvd_loss": "composite by design: a decomposition of every map, beside which the "
    "rest is small",
}

# Likewise on a GPU: torch's matrix products, and its operators on their results, which are small.
COMPOSITE_ON_GPU = {
    "relation.gram_match": "composite by design: torch's products read 4 B C H W bytes a side, "
    "what is between them 4 B C^2 (SP: 4 B^2)",
    "relation.nst_grams": "composite by design: torch's products read 4 B C H W bytes a side, "
    "what is between them 12 B C^2",
    "relation.polynomial": "composite by design: torch's product reads 4 B D bytes a side, what "
    "comes after it 4 B^2",
    "relation.neighbours": "composite by design: 8 B D bytes of embeddings",
    "contrast.sample_negatives": "composite by design: a shuffle, a sort and a search of n numbers",
}

_preference = os.environ.get("KDKERNELS_BACKEND", "auto")
_choices: dict[tuple[str, str, str], str] = {}
_warned: set[tuple[str, str]] = set()


class Verdict(NamedTuple):
    ok: bool
    reason: str


def _known(backend: str, where: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{where}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}.")
    return backend


def set_backend(backend: str) -> None:
    """Prefer ``backend`` for every loss called with ``backend="auto"``, where the device allows.

    ``"auto"`` restores the default. A function that ``torch.compile`` has traced keeps the choice
    made when it was traced.
    """
    global _preference
    _preference = _known(backend, "set_backend")
    _choices.clear()


def get_backend() -> str:
    """The preference set by :func:`set_backend` or ``KDKERNELS_BACKEND``."""
    return _known(_preference, "KDKERNELS_BACKEND")


def verdict(family: str, backend: str, device_type: str) -> Verdict:
    """Whether ``backend`` can run the losses of ``family`` on a device type, and why not.

    ``"family.operator"`` asks for one of a family's operators, where it has several.
    """
    if backend == "reference":
        return Verdict(True, "plain torch, any device")
    if family in COMPOSITE:
        return Verdict(False, COMPOSITE[family])
    if backend == "triton" and family in COMPOSITE_ON_GPU:
        return Verdict(False, COMPOSITE_ON_GPU[family])
    if backend == "triton":
        return Verdict(*ops.triton_verdict(family, device_type))
    ok, reason = ops.compiled_verdict(family, backend)
    if ok and device_type != backend:
        return Verdict(False, f"runs on {backend} tensors, got {device_type} tensors")
    return Verdict(ok, reason)


def _choose(family: str, device_type: str, backend: str, name: str) -> str:
    if backend != "auto":
        ok, reason = verdict(family, backend, device_type)
        if not ok:
            raise RuntimeError(f"{name}: backend {backend!r} cannot run here: {reason}.")
        return backend
    chosen, reasons = auto(family, device_type)
    if reasons and (family, device_type) not in _warned:
        _warned.add((family, device_type))
        warnings.warn(
            f"kdkernels: no fused {family} kernel for {device_type} tensors ({reasons}); using the "
            'plain-torch reference. kdkernels.set_backend("reference") silences this.',
            stacklevel=2,
        )
    return chosen


def auto(family: str, device_type: str) -> tuple[str, str]:
    """What ``backend="auto"`` takes, and why it is no kernel where one would expect one."""
    preferred = get_backend()
    if preferred != "auto" and verdict(family, preferred, device_type).ok:
        return preferred, ""
    reasons = []
    order = AUTO_ORDER.get(device_type, ())
    for candidate in reversed(order) if family in CUDA_FIRST else order:
        ok, reason = verdict(family, candidate, device_type)
        if ok:
            return candidate, ""
        reasons.append(f"{candidate}: {reason}")
    composite = family in COMPOSITE or (device_type == "cuda" and family in COMPOSITE_ON_GPU)
    return "reference", "" if composite else "; ".join(reasons)


@torch.compiler.assume_constant_result
def select(family: str, device_type: str, backend: str, name: str) -> str:
    """The backend that will run loss ``name`` of ``family`` (cached; a constant in traces)."""
    key = (family, device_type, backend)
    choice = _choices.get(key)
    if choice is None:
        choice = _choices[key] = _choose(family, device_type, _known(backend, name), name)
    return choice
