# SPDX-License-Identifier: Apache-2.0
"""``kdkernels::elementwise``: losses that are a sum over the elements of two maps.

``student`` and ``teacher`` are (B, C, ...), dense in one order. ``parameter``, in the type that is
accumulated in, has sizes of theirs or 1, its spatial ones all there or all 1; one per channel
(1, C, 1, ...) has a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

from kdkernels.ops.features import define

KINDS = ("square", "ofd", "ab")


class Numbers(NamedTuple):
    margin: float = 1.0


class Choices(NamedTuple):
    kind: int = 0


define("elementwise", "student", "teacher", "parameter?")
