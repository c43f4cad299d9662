# SPDX-License-Identifier: Apache-2.0
"""The losses that are a sum over elements, per element.

Value and derivatives to the student, the teacher and the parameter, as in csrc/kd/elementwise.h:
half of a square each, and gates that multiply, so that NaN stays NaN. A new loss is one more branch
of :func:`terms`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def terms(s, t, c, margin, KIND: tl.constexpr):
    """``c`` is None where there is no parameter."""
    if KIND == "square":
        e = s - t
        to_s = e if c is None else c * e
        return 0.5 * e * to_s, to_s, -to_s, 0.5 * e * e
    elif KIND == "ofd":
        target, own = t, 1.0
        if c is not None:
            target, own = tl.where(t <= c, c, t), tl.where(t > c, 1.0, 0.0)
        e = (s - target) * tl.where((s > target) | (target > 0), 1.0, 0.0)
        return 0.5 * e * e, e, -own * e, (own - 1.0) * e
    else:
        tl.static_assert(KIND == "ab")
        low, high = s - margin, s + margin
        e = tl.where(t > 0, tl.where(low > 0, 0.0, low), tl.where(high < 0, 0.0, high))
        return 0.5 * e * e, e, 0.0 * e, 0.0 * e
