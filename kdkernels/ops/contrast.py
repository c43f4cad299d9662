# SPDX-License-Identifier: Apache-2.0
"""``kdkernels::crd``: CRD's scores against the memory banks, with the gradient to both anchors.

``student`` and ``teacher`` (B, D) and both banks (n, D) are of the dtype that is accumulated in;
``normalizer`` (2,) are the Z of the student's and of the teacher's scores; ``index`` (B,) and
``negatives`` (B, K) are int64, the latter's rows contiguous.
"""

from __future__ import annotations

from typing import NamedTuple

from kdkernels.ops.features import define


class CrdNumbers(NamedTuple):
    temperature: float = 0.07
    eps: float = 1e-7


define(
    "crd", "student", "teacher", "student_bank", "teacher_bank", "normalizer", "index", "negatives"
)
