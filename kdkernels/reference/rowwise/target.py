# SPDX-License-Identifier: Apache-2.0
"""What the losses that look at a row's target class add to a divergence, and standardisation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.divergences import STANDARD_EPS
from kdkernels.reference.rowwise.divergences import Gradient, LogRatio, Softmax, phi


def cross_entropy(s: Softmax, logits: Tensor, labels: Tensor, smoothing: float):
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
    gradient = Gradient.apply(logits, s.p * target.sum(-1, keepdim=True) - target)
    return torch.where(infinite, gradient, rows), infinite


def log_prob(logits: Tensor, target: Tensor) -> Tensor:
    """Of the target class at temperature 1, per row."""
    known = (target >= 0) & (target < logits.shape[-1])
    at = torch.where(known, target, 0).unsqueeze(-1)
    # -inf logits have no derivative.
    off = torch.isneginf(logits)
    safe = torch.where(off.all(-1, keepdim=True), math.nan, logits)
    return safe.log_softmax(-1).gather(-1, at).squeeze(-1)


def omega(log_s: Tensor, log_t: Tensor) -> Tensor:
    """WSLD's weight of a row, from the cross-entropies of student and teacher."""
    return -torch.expm1(torch.where(torch.isneginf(log_t), 0.0, log_s / (1e-7 - log_t)))


def standardized(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits less their mean, over their deviation (unbiased) plus eps; and that divisor.

    Over the finite classes; a row that does not vary is 0.
    """
    off = torch.isneginf(logits)
    count = (~off).sum(-1, keepdim=True)
    inside = torch.where(off, 0.0, logits)
    centred = torch.where(off, 0.0, inside - inside.sum(-1, keepdim=True) / count.clamp(min=1))
    variance = (centred**2).sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    constant = variance == 0
    divisor = STANDARD_EPS + torch.where(constant, 1.0, variance).sqrt()
    scaled = torch.where(constant, 0.0, centred / divisor)
    return torch.where(off, -math.inf, scaled), torch.where(constant, math.inf, divisor)


def others(s: Tensor, t: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both rows without the target, and which have any other class.

    Where either has none, there is nothing to compare: both are read as zeros.
    """
    s, t = s.masked_fill(target, -math.inf), t.masked_fill(target, -math.inf)
    some_s, some_t = (~torch.isneginf(x).all(-1, keepdim=True) for x in (s, t))
    both = some_s & some_t
    return torch.where(both, s, 0.0), torch.where(both, t, 0.0), some_s, some_t


def decoupled(us, ut, du, target, some_s, some_t, s: Softmax, t: Softmax, ratio: LogRatio):
    """Per row: KL between (b, 1 - b) of teacher and student, and where it is infinite.

    ``us``, ``ut`` and ``du`` are the tempered rows and their difference, centred as the softmaxes
    of the others, ``s`` and ``t``, are. Third, the student's gradient per logit of ``us``.
    """
    zero = torch.zeros_like(us[..., :1])

    def of_target(x):
        return torch.where(target, x, 0.0).sum(-1, keepdim=True)

    on_s, on_t = (~(torch.isneginf(u) & target).any(-1, keepdim=True) for u in (us, ut))
    usual = some_s & some_t & on_s & on_t
    safe = [torch.where(usual, of_target(torch.where(torch.isneginf(u), 0.0, u)), zero)
            for u in (us, ut, du)]  # fmt: skip
    x_s = torch.where(usual, safe[0] - s.log_total, zero)
    x_t = torch.where(usual, safe[1] - t.log_total, zero)
    d = torch.where(usual, safe[2] - ratio.delta, zero)

    near = d.abs() <= 1
    close, b_s, c_s = torch.where(near, d, zero), torch.sigmoid(x_s), torch.sigmoid(-x_s)
    m = torch.expm1(close)
    w = torch.log1p(b_s * m)
    e_1, e_0 = c_s * m / (1 + b_s * m), -b_s * m / (1 + b_s * m)
    far = torch.sigmoid(x_t) * (F.logsigmoid(x_t) - F.logsigmoid(x_s))
    far = far + torch.sigmoid(-x_t) * (F.logsigmoid(-x_t) - F.logsigmoid(-x_s))
    value = torch.where(near, b_s * phi(e_1, close - w) + c_s * phi(e_0, -w), far)

    # The teacher certain, one way or the other, and the student not.
    one = some_s & ~some_t & on_s & on_t
    none = some_s & some_t & on_s & ~on_t
    odds = torch.where(one | none, of_target(torch.where(torch.isneginf(us), 0.0, us)), zero)
    odds = odds - torch.where(one | none, s.log_total, zero)
    value = torch.where(one, F.softplus(-odds), torch.where(none, F.softplus(odds), value))
    infinite = (on_t & ~on_s & some_s) | (some_t & ~some_s & on_s)

    def mass(u, side, some, on):
        odds = of_target(torch.where(torch.isneginf(u), 0.0, u)) - side.log_total
        return torch.where(some & on, torch.sigmoid(odds), on.to(odds))

    g = (mass(us, s, some_s, on_s) - mass(ut, t, some_t, on_t)).detach()
    gradient = torch.where(target, g, torch.where(some_s, -g * s.p.detach(), zero))
    value = torch.where(infinite, zero, value).squeeze(-1)
    empty = ~((some_s | on_s) & (some_t | on_t))
    return torch.where(empty.squeeze(-1), math.nan, value), infinite.squeeze(-1), gradient
