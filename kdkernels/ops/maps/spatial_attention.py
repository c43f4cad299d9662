# SPDX-License-Identifier: Apache-2.0
"""``kdkernels::spatial_attention``: distance of normalised activation maps."""

from __future__ import annotations

from torch import Tensor

from kdkernels.ops import features
from kdkernels.ops.maps.layout import packed

# Of two vectors: sum of squares, sum of magnitudes, Euclidean norm.
DISTANCES = ("squared", "absolute", "norm")

# student, teacher: (B, C, H, W) of one number of positions.
features.define("spatial_attention", "student", "teacher")


def spatial_attention(
    function: str, backend: str, student: Tensor, teacher: Tensor, power: int, distance: int,
    factor: float,
) -> Tensor:  # fmt: skip
    """The sum over samples of the maps' distances, times ``factor``."""
    return features.call(
        function, "maps.spatial_attention", backend, (packed(student), packed(teacher)),
        factor, choices=(power, distance),
    )  # fmt: skip
