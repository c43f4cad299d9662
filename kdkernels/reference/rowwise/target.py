# SPDX-License-Identifier: Apache-2.0
"""What the losses that look at a row's target class add to a divergence, and standardisation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels.divergences import STANDARD_EPS, WEIGHTING_EPS
from kdkernels.reference.rowwise.divergences import Gradient, Softmax, phi


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
    return -torch.expm1(torch.where(torch.isneginf(log_t), 0.0, log_s / (WEIGHTING_EPS - log_t)))


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


def others(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A row without its target, and whether it has another class; if not, it is read as zeros."""
    logits = logits.masked_fill(target, -math.inf)
    some = ~torch.isneginf(logits).all(-1, keepdim=True)
    return torch.where(some, logits, 0.0), some


class Odds:
    """The log-odds of the target against the others of one side, and which of them there are."""

    def __init__(self, centred: Tensor, off: Tensor, target: Tensor, some: Tensor, side: Softmax):
        self.on = ~(off & target).any(-1, keepdim=True)
        self.some = some
        self.usual = self.on & some
        self.u = torch.where(target & ~off, centred, 0.0).sum(-1, keepdim=True)
        self.x = torch.where(self.usual, self.u - side.log_total, torch.zeros_like(self.u))
        # Of the target: 1 or 0 where one of the two is missing.
        self.p = torch.where(self.usual, torch.sigmoid(self.x), self.on.to(self.x))


def decoupled(s: Odds, t: Odds, target: Tensor, p_s: Tensor, difference: Tensor):
    """Per row: KL between (b, 1 - b) of teacher and student, and where it is infinite.

    ``difference`` is that of the log-odds, where both are usual. Third, what remains of the
    student's gradient per tempered logit where the row is infinite; ``p_s`` is over the others.
    """
    zero = torch.zeros_like(s.x)
    usual = s.usual & t.usual
    d = torch.where(usual, difference, zero)
    near = d.abs() <= 1
    close, b_s, c_s = torch.where(near, d, zero), torch.sigmoid(s.x), torch.sigmoid(-s.x)
    m = torch.expm1(close)
    w = torch.log1p(b_s * m)
    e_1, e_0 = c_s * m / (1 + b_s * m), -b_s * m / (1 + b_s * m)
    far = torch.sigmoid(t.x) * (F.logsigmoid(t.x) - F.logsigmoid(s.x))
    far = far + torch.sigmoid(-t.x) * (F.logsigmoid(-t.x) - F.logsigmoid(-s.x))
    value = torch.where(near, b_s * phi(e_1, close - w) + c_s * phi(e_0, -w), far)
    # The teacher certain, one way or the other, and the student not.
    value = torch.where(s.usual & ~t.some & t.on, F.softplus(-s.x), value)
    value = torch.where(s.usual & t.some & ~t.on, F.softplus(s.x), value)
    infinite = (t.on & ~s.on & s.some) | (t.some & ~s.some & s.on)
    value = torch.where(infinite | ~(usual | s.usual), zero, value)

    g = (s.p - t.p).detach()
    remains = torch.where(target, g, torch.where(s.some, -g * p_s.detach(), zero))
    return value.squeeze(-1), infinite.squeeze(-1), remains
