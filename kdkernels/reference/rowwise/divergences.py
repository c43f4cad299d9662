# SPDX-License-Identifier: Apache-2.0
"""The divergences of two rows of logits.

A divergence is a sum over classes of ``p f(d)``, where ``p`` is the larger of the two probabilities
and ``d <= 0`` the log-ratio of the other to it, so that nothing overflows. Where the teacher's is
the larger, ``f`` is that of the divergence with its arguments swapped. Terms that vanish with
``d`` are evaluated without cancellation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Beyond this log-ratio a row is not close, and its log-normalisers are subtracted plainly.
_WIDE = 30.0


def _series(x: Tensor, coefficients) -> Tensor:
    """``sum_n coefficients[n] x^(n+2)``."""
    total = torch.zeros_like(x)
    for c in reversed(coefficients):
        total = total * x + c
    return total * x * x


def _small(x: Tensor) -> Tensor:
    return x.abs() < (0.25 if x.dtype == torch.float32 else 0.01)


_ORDERS = range(2, 11)


def phi(e: Tensor, log1p_e: Tensor) -> Tensor:
    """``(1 + e) log(1 + e) - e``."""
    series = _series(e, [(-1) ** n / (n * (n - 1)) for n in _ORDERS])
    return torch.where(_small(e), series, (1 + e) * log1p_e - e)


def _minus_log1p(x: Tensor, log1p_x: Tensor) -> Tensor:
    """``x - log(1 + x)``."""
    series = _series(x, [(-1) ** n / n for n in _ORDERS])
    return torch.where(_small(x), series, x - log1p_x)


def _log1p(x: Tensor) -> Tensor:
    # x = -1 only where the other factor is 0; the clamp keeps 0 * inf out of the derivative.
    return torch.log1p(x.clamp(min=-1 + torch.finfo(x.dtype).eps / 2))


def _forward_kl(e, d, alpha, beta):
    return phi(e, d)


def _reverse_kl(e, d, alpha, beta):
    series = _series(d, [1 / math.factorial(n) for n in _ORDERS])
    return torch.where(_small(d), series, e - d)


def _js(e, d, alpha, beta):
    return beta * phi(e, d) - phi(beta * e, _log1p(beta * e))


def _tv(e, d, alpha, beta):
    return e.abs() / 2  # whose derivative at 0 is 0


def _skew_forward(e, d, alpha, beta):
    mixture = 1 + alpha * e
    return mixture * phi((1 - alpha) * e / mixture, d - _log1p(alpha * e))


def _skew_reverse(e, d, alpha, beta):
    x = (1 - alpha) * e
    return _minus_log1p(x, _log1p(x))


def _jeffreys(e, d, alpha, beta):
    return e * d


def _ab(e, d, alpha, beta):
    gamma = alpha + beta
    orders = [
        sum(gamma**k * alpha ** (n - 2 - k) for k in range(n - 1)) / math.factorial(n)
        for n in _ORDERS
    ]
    closed = (alpha / gamma * torch.expm1(gamma * d) - torch.expm1(alpha * d)) / (alpha * beta)
    ratio = torch.where(_small(d * max(abs(alpha), abs(gamma))), _series(d, orders), closed)
    return ratio


_GENERATORS = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "js": _js,
    "tv": _tv,
    "skew_forward": _skew_forward,
    "skew_reverse": _skew_reverse,
    "jeffreys": _jeffreys,
    "ab": _ab,
}
_SWAPPED = {
    "forward_kl": "reverse_kl",
    "reverse_kl": "forward_kl",
    "skew_forward": "skew_reverse",
    "skew_reverse": "skew_forward",
}


def _swap(kind: str, alpha: float, beta: float) -> tuple[str, float, float]:
    """The divergence with its two arguments exchanged."""
    if kind == "js":
        return kind, alpha, 1 - beta
    if kind == "ab":
        return kind, beta, alpha
    return _SWAPPED.get(kind, kind), alpha, beta


def _at_zero(kind: str, alpha: float, beta: float) -> float:
    """``f`` where the other probability is 0."""
    if kind in ("reverse_kl", "jeffreys"):
        return math.inf
    if kind == "js":
        return -(1 - beta) * math.log(1 - beta)
    if kind == "skew_forward":
        return 1 - alpha
    if kind == "skew_reverse":
        return alpha - 1 - math.log(alpha) if alpha > 0 else math.inf
    if kind == "ab":
        gamma = alpha + beta
        return 1 / (alpha * gamma) if alpha > 0 and gamma > 0 else math.inf
    return {"forward_kl": 1.0, "tv": 0.5}[kind]


class Gradient(torch.autograd.Function):
    """Zero in value, with a given gradient: what stays of a row whose loss is +inf."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits, gradient):
        return gradient.new_zeros(gradient.shape[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return upstream.unsqueeze(-1) * gradient, None


class Softmax:
    """Log-probabilities of rows in which -inf classes are `off` and carry no derivative."""

    def __init__(self, logits: Tensor, temperature: Tensor | float):
        self.off = torch.isneginf(logits)
        self.shift = logits.detach().amax(-1, keepdim=True)
        centred = torch.where(self.off, torch.zeros_like(logits), logits - self.shift)
        self.u = centred / temperature
        exps = torch.where(self.off, torch.zeros_like(self.u), self.u.exp())
        total = exps.sum(-1, keepdim=True)
        self.log_total = total.log()
        self.p = exps / total
        self.log_p = self.u - self.log_total
        self.empty = self.off.all(-1)


class LogRatio:
    """``log p_t - log p_s`` of two softmaxes, without cancellation where they are close."""

    def __init__(self, s: Softmax, t: Softmax, dz: Tensor):
        zero = torch.zeros_like(dz)
        self.on = ~(s.off | t.off)
        self.one_sided = s.off ^ t.off
        dz = torch.where(self.on, dz, zero)
        self.wide = (self.one_sided | (dz.abs() > _WIDE)).any(-1, keepdim=True)
        close = torch.where(self.wide, zero, dz)
        # The difference of the log-normalisers.
        self.delta = torch.where(
            self.wide,
            t.log_total - s.log_total,
            torch.log1p((s.p * torch.expm1(close)).sum(-1, keepdim=True)),
        )
        self.d = torch.where(self.on, dz - self.delta, zero)


def divergence(kind: str, s: Softmax, t: Softmax, ratio: LogRatio, alpha: float, beta: float):
    """Per row: the divergence where it is finite (else 0), and where it is infinite."""
    on, one_sided, d = ratio.on, ratio.one_sided, ratio.d
    zero = torch.zeros_like(d)
    if kind == "cross_entropy":
        rows = -(t.p * torch.where(s.off, zero, s.log_p)).sum(-1)
        return rows, (s.off & (t.p > 0)).any(-1)
    if kind == "renyi":
        return _renyi(s, t, on, d, ratio.wide, alpha)

    power = alpha + beta if kind == "ab" else 1.0

    def weight(side: Softmax) -> Tensor:
        return side.p if power == 1 else torch.exp(power * side.log_p)

    swapped = _swap(kind, alpha, beta)
    student_larger = d <= 0
    overflow = torch.zeros_like(on)
    if kind == "ab" and min(alpha, beta) < 0:
        # A ratio of probabilities to a negative power that no number holds.
        steepness = torch.where(student_larger, max(-alpha, -power), max(-beta, -power))
        overflow = on & (d.abs() * steepness > math.log(torch.finfo(d.dtype).max))
        d = torch.where(overflow, zero, d)
    down, up = torch.where(student_larger, d, zero), torch.where(student_larger, zero, -d)
    value = torch.where(
        student_larger,
        weight(s) * _GENERATORS[kind](torch.expm1(down), down, alpha, beta),
        weight(t) * _GENERATORS[swapped[0]](torch.expm1(up), up, *swapped[1:]),
    )
    rows = torch.where(on, value, zero).sum(-1)
    infinite = overflow.any(-1)
    for side, alone, limit in (
        (s, one_sided & t.off, _at_zero(kind, alpha, beta)),
        (t, one_sided & s.off, _at_zero(*swapped)),
    ):
        alone = alone & (side.p > 0)
        if math.isinf(limit):
            infinite = infinite | alone.any(-1)
        else:
            rows = rows + limit * torch.where(alone, weight(side), zero).sum(-1)
    return rows, infinite


def _renyi(s: Softmax, t: Softmax, on: Tensor, d: Tensor, wide: Tensor, alpha: float):
    wide = wide.squeeze(-1) | (d.abs().amax(-1) * max(alpha, 1.0) > _WIDE)
    close = torch.where(wide.unsqueeze(-1), torch.zeros_like(d), d)
    c = alpha * (alpha - 1)
    generator = _ab(torch.expm1(close), close, alpha, 1 - alpha)
    near = torch.log1p(c * (s.p * generator).sum(-1)) / (alpha - 1)
    mixed = torch.where(on, t.log_p * alpha + s.log_p * (1 - alpha), -math.inf)
    some = on.any(-1)  # disjoint supports: log 0
    far = torch.logsumexp(torch.where(some.unsqueeze(-1), mixed, 0.0), -1) / (alpha - 1)
    infinite = ~some | (s.off & (t.p > 0)).any(-1) if alpha > 1 else ~some
    return torch.where(wide, far, near), infinite
