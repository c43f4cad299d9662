# SPDX-License-Identifier: Apache-2.0
"""Losses against memory banks, in plain torch.

The scores of a batch are a matrix product with the whole bank, (B, n) numbers, of which the chosen
ones are gathered: the rows of the bank themselves, (B, K, D), would be D / 3 times as many.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.ops.contrast import CrdNumbers


def crd(
    student: Tensor,  # (B, D)
    teacher: Tensor,  # (B, D)
    student_bank: Tensor,  # (n, D)
    teacher_bank: Tensor,  # (n, D)
    normalizer: Tensor,  # (2,)
    index: Tensor,  # (B,)
    negatives: Tensor,  # (B, K)
    factor: float,
    numbers: CrdNumbers,
) -> Tensor:
    """P / (P + c) is the sigmoid of the score less log(c Z); c / (P + c) of its negative."""
    share = negatives.shape[1] / len(student_bank)
    constant = negatives.numel() * math.log(share / (share + numbers.eps))
    loss = student.new_zeros(())
    for anchor, bank, z in zip(
        (student, teacher), (teacher_bank, student_bank), normalizer, strict=True
    ):
        scores = anchor @ bank.T / numbers.temperature - ((share + numbers.eps) * z).log()
        positive = F.logsigmoid(scores.gather(1, index.unsqueeze(1)))
        loss = loss - positive.sum() - F.logsigmoid(-scores.gather(1, negatives)).sum() - constant
    return factor * loss


def negatives(
    labels: Tensor,  # (n,)
    index: Tensor,  # (B,)
    shuffle: Tensor,  # (n,) a permutation
    begin: Tensor,  # (B,) places in it
    count: int,
) -> Tensor:
    """``count`` samples of other classes (B, count), in the order of the shuffle."""
    n, device = len(labels), labels.device
    # The places of each class in the shuffle, one class after another.
    classes, place = labels[shuffle].sort(stable=True)
    own = labels[index]
    first, last = torch.searchsorted(classes, own), torch.searchsorted(classes, own, right=True)
    others = (n - (last - first)).clamp(min=1)
    if device.type == "cpu" and not torch.compiler.is_compiling():
        return _walk(shuffle, labels[shuffle], own, begin, others, count)
    # The j-th sample of another class stands in the shuffle behind j of these and behind the t
    # members of the own class whose place less their number before is at most j.
    number, first = torch.arange(n, device=device), first.unsqueeze(1)
    begins = torch.searchsorted(classes, classes)
    places = begins * (n + 1) + place
    begin = begin.unsqueeze(1)
    passed = begin - (torch.searchsorted(places, first * (n + 1) + begin) - first)
    j = (passed + torch.arange(count, device=device)) % others.unsqueeze(1)
    keys = places - (number - begins)
    return shuffle[j + torch.searchsorted(keys, first * (n + 1) + j, right=True) - first]


def _walk(shuffle, classes, own, begin, others, count) -> Tensor:
    """From each of the places ``begin`` on, round and round, ``count`` samples not of class own.

    A row at a time reads a window in order: several times as fast as a search for every sample.
    """
    n, drawn = len(shuffle), shuffle.new_empty(len(own), count)
    shuffle, classes = torch.cat([shuffle, shuffle]), torch.cat([classes, classes])
    places = zip(drawn, own.tolist(), begin.tolist(), others.tolist(), strict=True)
    for row, kind, place, other in places:
        window = slice(place, place + min(count + n - other, n))
        found = shuffle[window].masked_select(classes[window] != kind)[:count]
        if len(found) < count:
            found = found.repeat(-(-count // len(found)))[:count]
        row.copy_(found)
    return drawn
