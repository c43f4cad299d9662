# SPDX-License-Identifier: Apache-2.0
"""The learning simplifier in plain torch, token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def learning_simplifier(
    teacher: Tensor,  # (N, K), in the dtype of the arithmetic, as all below
    temperature: float | Tensor,  # a number, or (1,) or (N,)
    query_weight: Tensor,  # (width of a token, H * d)
    key_weight: Tensor,  # (width, H * d)
    value_weight: Tensor,  # (width, H * d')
    class_embedding: Tensor | None,  # (K, D): classes are the tokens; None: rows are
    output_weight: Tensor,  # (H * d', 1), or (H * d', K)
    num_heads: int,
    residual: bool,
    gather: Callable[[Tensor], Tensor],  # softened rows to those that rows attend to
) -> Tensor:  # (N, K)
    """See ``kdkernels.functional.attention`` for what it computes."""
    off, logits, tokens = softened(teacher, temperature)
    tau = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    others, hidden = tokens, None
    if class_embedding is None:
        others = gather(tokens)
    else:
        embedding = class_embedding.expand(teacher.shape[0], -1, -1)
        tokens = others = torch.cat([embedding, tokens.unsqueeze(-1)], -1)
        # A row that has no class at all keeps them as keys: it has no output to spoil.
        hidden = (off & ~off.all(-1, keepdim=True))[:, None, None]
    attended = _attend(tokens, others, query_weight, key_weight, value_weight, num_heads, hidden)
    simplified = tau * (attended @ output_weight).view_as(logits)
    if residual:
        simplified = logits + simplified
    return simplified.masked_fill(off, -torch.inf)


def softened(teacher: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which classes take no part; and logits, and these softened, in which they stand as 0."""
    off = torch.isneginf(teacher)
    # No derivative is to meet their infinity.
    logits = torch.where(off, torch.zeros_like(teacher), teacher)
    tau = temperature.unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    return off, logits, logits / tau


def _attend(
    tokens: Tensor,  # (..., n, width)
    others: Tensor,  # (..., m, width)
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    num_heads: int,
    hidden: Tensor | None,  # bool, broadcast to (..., H, n, m)
) -> Tensor:  # (..., n, H * d')
    """Softmax attention of ``tokens`` to ``others``, heads side by side."""

    def heads(x, weight):  # (..., H, n, d)
        return (x @ weight).unflatten(-1, (num_heads, -1)).transpose(-3, -2)

    query = heads(tokens, query_weight)
    scores = query @ heads(others, key_weight).transpose(-2, -1) / query.shape[-1] ** 0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ heads(others, value_weight)).transpose(-3, -2).flatten(-2)
