# SPDX-License-Identifier: Apache-2.0
"""The registry of losses that tests, benchmarks and the self-check iterate over.

One :class:`Loss` says how to call a loss, how to make inputs for it and how it is written in plain
torch. To add a loss, add one entry to its family's module; whatever walks over :data:`LOSSES` then
covers it.

The pass rule for a kernel (:func:`assert_close_to_oracle`): against the reference in float64 on the
same rounded inputs, its error is at most twice that of plain torch in the same dtype plus a floor,
and below a cap; both by the largest deviation and by relative L2.
"""

from __future__ import annotations

from kdkernels.testing import (
    attention,
    batchwise,
    contrast,
    embeddings,
    ensemble,
    listwise,
    maps,
    relation,
    rowwise,
    sparse,
)
from kdkernels.testing.loss import (
    CAP,
    FLOOR,
    Loss,
    assert_close_to_oracle,
    error_ratio,
    gradients,
    leaves,
    relative_errors,
)

__all__ = [
    "CAP",
    "FLOOR",
    "LOSSES",
    "Loss",
    "assert_close_to_oracle",
    "error_ratio",
    "gradients",
    "leaves",
    "relative_errors",
]

_FAMILIES = (
    rowwise,
    attention,
    ensemble,
    listwise,
    sparse,
    batchwise,
    maps,
    relation,
    contrast,
    embeddings,
)
LOSSES: dict[str, Loss] = {loss.name: loss for family in _FAMILIES for loss in family.LOSSES}
