# SPDX-License-Identifier: Apache-2.0
"""Elementary functions of fp32 and fp64 tiles that keep their relative accuracy near 0.

Written from language primitives: libdevice's are slower, and Triton's interpreter has none.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

# Orders of the series below; at |x| < 0.25 (fp32) and 0.01 (fp64) the rest is below rounding.
_LAST_ORDER = tl.constexpr(10)


@triton.constexpr_function
def _inverse_factorial(n):
    return 1.0 / math.factorial(n)


@triton.constexpr_function
def _log1p_coefficient(n):
    return (-1.0) ** n / n


@triton.constexpr_function
def _power_coefficient(n, alpha, gamma):
    return sum(gamma**k * alpha ** (n - 2 - k) for k in range(n - 1)) / math.factorial(n)


@triton.jit
def near_zero(x):
    """Where the series are exact enough, and the closed forms would cancel."""
    limit: tl.constexpr = 0.01 if x.dtype == tl.float64 else 0.25
    return tl.abs(x) < limit


@triton.jit
def expm1(x):
    """``exp(x) - 1`` for x below 80, to 2 ulp."""
    # x = n log 2 + f: 2^n expm1(f) + (2^n - 1), where log 2 is split so that n times its leading
    # part is exact. Below the clamp (a comparison, which lets NaN through) the result is -1.
    n_log2e: tl.constexpr = 1.4426950408889634
    if x.dtype == tl.float64:
        x = tl.where(x < -700.0, -700.0, x)
        n = tl.floor(x * n_log2e + 0.5)
        f = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10
        power = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
        order: tl.constexpr = 13
    else:
        x = tl.where(x < -80.0, -80.0, x)
        n = tl.floor(x * n_log2e + 0.5)
        f = (x - n * 0.693359375) + n * 2.12194440e-4
        power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
        order: tl.constexpr = 7
    series = f * _inverse_factorial(order) + _inverse_factorial(order - 1)
    for k in tl.static_range(order - 2, 0, -1):
        series = series * f + _inverse_factorial(k)
    return power * (series * f) + (power - 1)


@triton.jit
def log1p(x):
    """``log(1 + x)`` for x > -1; just above log(eps) at -1, which is met only times 0."""
    lowest: tl.constexpr = -1 + 2.0**-53 if x.dtype == tl.float64 else -1 + 2.0**-24
    x = tl.where(x < lowest, lowest, x)
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) + (x - (u - 1)) / u)


@triton.jit
def minus_log1p(x, log1p_x):
    """``x - log(1 + x)``."""
    series = tl.zeros_like(x)
    for n in tl.static_range(_LAST_ORDER, 1, -1):
        series = series * x + _log1p_coefficient(n)
    return tl.where(near_zero(x), series * x * x, x - log1p_x)


@triton.jit
def expm1_minus(x):
    """``exp(x) - 1 - x`` for |x| <= 1/2."""
    order: tl.constexpr = 15 if x.dtype == tl.float64 else 8
    series = x * _inverse_factorial(order) + _inverse_factorial(order - 1)
    for n in tl.static_range(order - 2, 1, -1):
        series = series * x + _inverse_factorial(n)
    return series * x * x


@triton.jit
def power_series(x, alpha: tl.constexpr, gamma: tl.constexpr):
    """``(alpha / gamma expm1(gamma x) - expm1(alpha x)) / (alpha (gamma - alpha))`` near 0."""
    series = tl.zeros_like(x)
    for n in tl.static_range(_LAST_ORDER, 1, -1):
        series = series * x + _power_coefficient(n, alpha, gamma)
    return series * x * x
