# SPDX-License-Identifier: Apache-2.0
"""What the references of losses over rows of logits share."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tempered(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """``logits / temperature``, whose derivatives know nothing of -inf."""
    off = torch.isneginf(logits)
    return torch.where(off, -math.inf, torch.where(off, 0.0, logits) / temperature)
