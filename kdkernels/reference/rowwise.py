# SPDX-License-Identifier: Apache-2.0
"""Row-wise softmax divergences in plain torch.

A divergence is a sum over classes of ``p f(d)``, where ``p`` is the larger of the two probabilities
and ``d <= 0`` the log-ratio of the other to it, so that nothing overflows. Where the teacher's is
the larger, ``f`` is that of the divergence with its arguments swapped. Terms that vanish with
``d`` are evaluated without cancellation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdkernels.divergences import KINDS, REDUCTIONS, Choices, Numbers
from kdkernels.ops.rowwise import compute_dtype

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


def _phi(e: Tensor, log1p_e: Tensor) -> Tensor:
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
    return _phi(e, d)


def _reverse_kl(e, d, alpha, beta):
    series = _series(d, [1 / math.factorial(n) for n in _ORDERS])
    return torch.where(_small(d), series, e - d)


def _js(e, d, alpha, beta):
    return beta * _phi(e, d) - _phi(beta * e, _log1p(beta * e))


def _tv(e, d, alpha, beta):
    return e.abs() / 2  # whose derivative at 0 is 0


def _skew_forward(e, d, alpha, beta):
    mixture = 1 + alpha * e
    return mixture * _phi((1 - alpha) * e / mixture, d - _log1p(alpha * e))


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


class _Gradient(torch.autograd.Function):
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


class _Softmax:
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


def _divergence(kind: str, s: _Softmax, t: _Softmax, dz: Tensor, alpha: float, beta: float):
    """Per row: the divergence where it is finite (else 0), and where it is infinite."""
    zero = torch.zeros_like(dz)
    on = ~(s.off | t.off)
    one_sided = s.off ^ t.off
    dz = torch.where(on, dz, zero)
    wide = (one_sided | (dz.abs() > _WIDE)).any(-1, keepdim=True)
    close = torch.where(wide, zero, dz)
    delta = torch.where(
        wide,
        t.log_total - s.log_total,
        torch.log1p((s.p * torch.expm1(close)).sum(-1, keepdim=True)),
    )
    d = torch.where(on, dz - delta, zero)
    if kind == "cross_entropy":
        rows = -(t.p * torch.where(s.off, zero, s.log_p)).sum(-1)
        return rows, (s.off & (t.p > 0)).any(-1)
    if kind == "renyi":
        return _renyi(s, t, on, d, wide, alpha)

    power = alpha + beta if kind == "ab" else 1.0

    def weight(side: _Softmax) -> Tensor:
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


def _renyi(s: _Softmax, t: _Softmax, on: Tensor, d: Tensor, wide: Tensor, alpha: float):
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


def _cross_entropy(s: _Softmax, logits: Tensor, labels: Tensor, smoothing: float):
    """Per row: CE at temperature 1 where it is finite (else 0 in value), and where it is not."""
    classes = logits.shape[-1]
    if labels.dim() == 1:
        known = (labels >= 0) & (labels < classes)
        target = torch.nn.functional.one_hot(torch.where(known, labels, 0), classes).to(logits)
        target = torch.where(known.unsqueeze(-1), target, math.nan)
    else:
        target = labels.reshape(-1, classes).to(logits)
    target = (1 - smoothing) * target + smoothing / classes
    rows = s.log_total.squeeze(-1) * target.sum(-1)
    rows = rows - torch.where(s.off, torch.zeros_like(target), target * s.u).sum(-1)
    infinite = (s.off & (target > 0)).any(-1)
    gradient = _Gradient.apply(logits, s.p * target.sum(-1, keepdim=True) - target)
    return torch.where(infinite, gradient, rows), infinite


def rowwise(
    student: Tensor,  # (..., C)
    teacher: Tensor,  # (..., C)
    given,  # kdkernels.functional.rows.Rows
    numbers: Numbers,
    choices: Choices,
) -> Tensor:
    """The family's reference; see ``kdkernels.functional.rowwise`` for what it computes."""
    labels, mask, row_weight, temperatures, teacher_temperatures = given[:5]
    kind = KINDS[choices.kind]
    leading, classes = student.shape[:-1], student.shape[-1]
    dtype = compute_dtype(student, teacher)
    student = student.reshape(-1, classes).to(dtype)
    teacher = teacher.reshape(-1, classes).to(dtype)
    valid = torch.ones(student.shape[0], dtype=torch.bool, device=student.device)
    if mask is not None:
        valid = valid & mask
    if labels is not None and labels.dtype == torch.int64:
        valid = valid & (labels != choices.ignore_index)
    # Rows that do not count are read as zeros, so that their NaN cannot reach a derivative.
    student = torch.where(valid.unsqueeze(-1), student, 0.0)
    teacher = torch.where(valid.unsqueeze(-1), teacher, 0.0)

    tau_s = numbers.temperature if temperatures is None else temperatures.unsqueeze(-1)
    one_tau = numbers.teacher_temperature == 0
    tau_t = numbers.teacher_temperature
    if one_tau:
        tau_t = tau_s
    elif teacher_temperatures is not None:
        tau_t = teacher_temperatures.unsqueeze(-1)
    # Whatever has no weight has a gradient all the same, of 0.
    rows = sum((torch.where(x.isfinite(), x, 0.0) * 0.0).sum(-1) for x in (student, teacher))
    infinite = torch.zeros_like(valid)
    if numbers.kd_weight:
        s, t = _Softmax(student, tau_s), _Softmax(teacher, tau_t)
        if one_tau:
            dz = (teacher - student - (t.shift - s.shift)) / tau_s
        else:
            dz = t.u - s.u
        value, infinite = _divergence(kind, s, t, dz, numbers.alpha, numbers.beta)
        remains = torch.zeros_like(value)
        if kind in ("forward_kl", "cross_entropy"):
            tau = tau_s.detach() if isinstance(tau_s, Tensor) else tau_s
            remains = _Gradient.apply(student, (s.p - t.p.detach()) / tau)
        value = torch.where(infinite, remains, value)
        value = torch.where(s.empty | t.empty, math.nan, value)
        if choices.t2:
            tau = tau_s.squeeze(-1) if isinstance(tau_s, Tensor) else tau_s
            value = value * tau**2
        rows = rows + numbers.kd_weight * value
    if numbers.ce_weight:
        s = _Softmax(student, 1.0)
        value, too_large = _cross_entropy(s, student, labels, numbers.label_smoothing)
        value = torch.where(s.empty, math.nan, value)
        infinite = infinite | too_large
        rows = rows + numbers.ce_weight * value
    if row_weight is not None:
        rows = rows * row_weight
        infinite = infinite & (row_weight != 0)
    rows = rows + torch.where(infinite, math.inf, 0.0)
    rows = torch.where(valid, rows, 0.0)

    reduction = REDUCTIONS[choices.reduction]
    if reduction == "none":
        return rows.view(leading)
    total = rows.sum()
    if reduction == "sum":
        return total
    count = valid.sum().clamp(min=1).to(dtype)
    return total / (count * classes if reduction == "mean" else count)
