# SPDX-License-Identifier: Apache-2.0
"""Validation of Python numbers and choices; knows no torch, as ``kdkernels.numpy`` does not."""

from __future__ import annotations

import math


def number(name: str, argument: str, value, low: float = -math.inf, high: float = math.inf):
    """A finite Python number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: {argument} must be a number, got {type(value).__name__}.")
    # Comparisons only: torch.compile can trace them where the number has become symbolic.
    if not (-math.inf < value < math.inf and low <= value <= high):
        expected = "finite" if low == -high == -math.inf else f"in [{low}, {high}]"
        raise ValueError(f"{name}: {argument} must be {expected}, got {value}.")
    return float(value)


def choice(name: str, argument: str, value, allowed: tuple[str, ...]) -> str:
    """One of the allowed strings."""
    if value not in allowed:
        raise ValueError(f"{name}: {argument} must be one of {', '.join(allowed)}, got {value!r}.")
    return value


def in_dimensions(which: tuple[int, ...]) -> str:
    """Those of a shape that are meant, in words."""
    return f" in dimension{'s' * (len(which) > 1)} {', '.join(map(str, which))}"
