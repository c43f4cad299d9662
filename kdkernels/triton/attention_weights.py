# SPDX-License-Identifier: Apache-2.0
"""``attention_coefficients_triton`` and its backward: products of weights, which are torch's.

No kernel of ours: they are K x K x d multiplications once a batch, and libraries' at the limit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import ops


def _scaled_product(a, b, width):  # (H, n, m) and (H, m, l)
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=width**-0.5)


def _products(query, key, value, output, embedding, heads):
    """What tokens are multiplied by, (D + 1, 2 H d + H); queries and keys; values (K + 1, H)."""
    value = value.unflatten(1, (heads, -1)).transpose(0, 1) @ output.reshape(heads, -1, 1)
    columns = torch.cat([query, key, value.squeeze(-1).t()], 1)
    products = torch.cat([embedding @ columns[:-1], columns[-1:]])
    *pairs, values = products.split([query.shape[1], query.shape[1], heads], 1)
    return columns, *(x.unflatten(1, (heads, -1)).transpose(0, 1) for x in pairs), values


def _coefficients(query, key, value, output, embedding, heads):
    _, queries, keys, values = _products(query, key, value, output, embedding, heads)
    return _scaled_product(queries, keys.mT, keys.shape[-1]), values.t().contiguous()


def _backward(
    to_scores, to_values, query, key, value, output, embedding, heads
) -> tuple[Tensor, ...]:
    columns, queries, keys, _ = _products(query, key, value, output, embedding, heads)
    width = keys.shape[-1]
    to_queries = _scaled_product(to_scores, keys, width).transpose(0, 1).flatten(1)
    to_keys = _scaled_product(to_scores.mT, queries, width).transpose(0, 1).flatten(1)
    to_products = torch.cat([to_queries, to_keys, to_values.t()], 1)
    to_columns = torch.cat([embedding.t() @ to_products[:-1], to_products[-1:]])
    to_query, to_key, by_value = to_columns.split([query.shape[1], query.shape[1], heads], 1)
    by_value = by_value.unsqueeze(-1)  # (D + 1, H, 1)
    return (
        to_query.contiguous(),
        to_key.contiguous(),
        (by_value * output.reshape(heads, -1)).flatten(1),
        (by_value * value.unflatten(1, (heads, -1))).sum(0).reshape(-1, 1),
        to_products[:-1] @ columns[:-1].t(),
    )


for _key in ("CUDA", "CPU") if ops.triton_interpreted() else ("CUDA",):
    torch.library.impl("kdkernels::attention_coefficients_triton", _key, _coefficients)
    torch.library.impl("kdkernels::attention_coefficients_backward_triton", _key, _backward)
