# SPDX-License-Identifier: Apache-2.0
"""Losses against memory banks, in plain torch.

The scores of a batch are a matrix product with the whole bank, (B, n) numbers, of which the chosen
ones are gathered: the rows of the bank themselves, (B, K, D), would be D / 3 times as many.
"""

from __future__ import annotations

import math

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
