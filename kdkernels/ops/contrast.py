# SPDX-License-Identifier: Apache-2.0
"""CRD's scores against the memory banks with the gradient to both anchors, and its negatives.

``kdkernels::crd``: ``student`` and ``teacher`` (B, D) and both banks (n, D) are of the dtype that
is accumulated in; ``normalizer`` (2,) are the Z of the student's and of the teacher's scores;
``index`` (B,) and ``negatives`` (B, K) are int64, on CPUs the latter also int32, with contiguous
rows.

``kdkernels::sample_negatives``: ``count`` samples of other classes for each of ``index`` (B,), of
int32 and in ascending order; ``labels`` and a permutation ``shuffle`` (n,), of which each takes a
window that begins at ``begin`` (B,). These are int64 and contiguous. On CPUs alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from kdkernels.ops import NAMESPACE
from kdkernels.ops.features import define


class CrdNumbers(NamedTuple):
    temperature: float = 0.07
    eps: float = 1e-7


define(
    "crd", "student", "teacher", "student_bank", "teacher_bank", "normalizer", "index", "negatives"
)

torch.library.define(
    f"{NAMESPACE}::sample_negatives",
    "(Tensor labels, Tensor index, Tensor shuffle, Tensor begin, int count) -> Tensor",
)


@torch.library.register_fake(f"{NAMESPACE}::sample_negatives")
def _(labels, index, shuffle, begin, count):
    return index.new_empty(len(index), count, dtype=torch.int32)
