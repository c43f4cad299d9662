# SPDX-License-Identifier: Apache-2.0
"""The rows of every rank, for losses that relate the samples of a batch to each other.

Each rank computes the whole loss from all rows and differentiates it to its own. Under
``DistributedDataParallel``, which averages over ranks, the parameters' gradients are then those of
one process on the concatenated batch, and the loss is that process's loss on every rank.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    """All ranks' rows; backward needs no communication, since every rank has the whole gradient.

    The averaging over ranks divides by their number what only the rank that owns a row adds, so
    the gradient is multiplied by it. Parameters that every rank applies to all rows get the same
    gradient everywhere, which the average leaves alone.
    """

    @staticmethod
    def forward(ctx, tensor, group, sizes):
        rank = dist.get_rank(group)
        ctx.start, ctx.size, ctx.ranks = sum(sizes[:rank]), sizes[rank], len(sizes)
        return _all_gather(tensor, group, sizes)

    @staticmethod
    def backward(ctx, upstream):
        return upstream.narrow(0, ctx.start, ctx.size) * ctx.ranks, None, None


class _SumRanks(torch.autograd.Function):
    """The sum of all ranks' numbers, for losses that are sums over samples; see _GatherRows."""

    @staticmethod
    def forward(ctx, value, group):
        ctx.ranks = dist.get_world_size(group)
        total = value.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.ranks, None


@torch.compiler.disable
def sum_ranks(group: dist.ProcessGroup, value: Tensor) -> Tensor:
    """The sum of ``value`` over the ranks of ``group``, on each. Differentiable, see the module."""
    return _SumRanks.apply(value, group)


def _all_gather(tensor: Tensor, group, sizes: list[int]) -> Tensor:
    # As bytes, which every backend can send; padded to the largest rank, as collectives demand.
    width = math.prod(tensor.shape[1:]) * tensor.element_size()
    own = tensor.contiguous().view(-1).view(torch.uint8)
    padded = own.new_zeros(max(sizes) * width)
    padded[: own.numel()] = own
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded, group=group)
    rows = [part[: n * width] for part, n in zip(everyone, sizes, strict=True)]
    return torch.cat(rows).view(tensor.dtype).view(-1, *tensor.shape[1:])


@torch.compiler.disable
def gather_rows(group: dist.ProcessGroup, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each tensor (N, ...) with the rows of all ranks of ``group`` in the ranks' order.

    Ranks may have different numbers of rows, none included; the tensors of one call have the same
    number, and dtype and remaining shape agree between ranks. ``None`` stays ``None``, and must be
    so on every rank. Differentiable, see the module; no rank may leave out the call or its
    backward. The numbers of rows are read by the host, so a GPU is waited for.
    """
    if dist.get_world_size(group) == 1:
        return tensors
    some = next(t for t in tensors if t is not None)
    rows = torch.tensor([len(some)], device=some.device)
    sizes = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, rows, group=group)
    sizes = torch.cat(sizes).tolist()
    if not any(sizes):
        return tensors
    return tuple(None if t is None else _GatherRows.apply(t, group, sizes) for t in tensors)
