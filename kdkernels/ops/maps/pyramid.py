# SPDX-License-Identifier: Apache-2.0
"""``kdkernels::pyramid``: mean squares of a difference of maps and of its average poolings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kdkernels.ops import features
from kdkernels.ops.maps.layout import packed_alike

MOST_LEVELS = 8

# student, teacher: (B, C, H, W), lying alike. numbers: weights of the maps and of each level;
# choices: the levels' bins along an axis.
features.define("pyramid", "student", "teacher")


def pyramid(
    function: str, backend: str, student: Tensor, teacher: Tensor, levels: Sequence[int],
    weights: Sequence[float], terms: int,
) -> Tensor:  # fmt: skip
    """Sums over samples and channels of mean squares over positions, divided by ``terms``."""
    # The operator's own sum is as many times larger as gradients to an element are smaller.
    size = student.shape[2] * student.shape[3]
    return features.call(
        function, "maps.pyramid", backend, packed_alike(student, teacher), 1.0 / (terms * size),
        weights, levels,
    )  # fmt: skip
