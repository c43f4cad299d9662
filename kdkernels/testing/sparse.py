# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from kdkernels import functional
from kdkernels.testing.inputs import SHAPES, logits, per_row
from kdkernels.testing.loss import Loss

K = 64


def _stored(shape, generator, device, dtype):
    """A student, and its teacher's K largest log-probabilities; of few classes an eighth."""
    dense = logits(shape, generator, "cpu", torch.float64)
    k = min(K, (shape[-1] + 7) // 8)
    values, indices = dense["teacher"].log_softmax(-1).topk(k)
    return {
        "student": dense["student"].to(device, dtype),
        "topk_values": values.to(device, dtype),
        "topk_indices": indices.to(device),
    }


def _log1mexp(x):
    x = x.clamp(max=-1e-7)
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())


def _tail_logits(log_probs, temperature, others):
    """Of the teacher over the temperature: its stored classes, and the tail."""
    tail = _log1mexp(log_probs.logsumexp(-1, keepdim=True))
    width = math.log(max(others, 1))
    return torch.cat([log_probs / temperature, width + (tail - width) / temperature], -1)


def _with_tail(rows):
    """From a divergence of log-probabilities to the usual loss: gather, one more class, T^2."""

    def loss(student, topk_values, topk_indices, *, temperature, kind, **parameters):
        log_s = F.log_softmax(student / temperature, -1).gather(-1, topk_indices)
        log_s = torch.cat([log_s, _log1mexp(log_s.logsumexp(-1, keepdim=True))], -1)
        others = student.shape[-1] - topk_values.shape[-1]
        log_t = F.log_softmax(_tail_logits(topk_values, temperature, others), -1)
        return rows(log_s, log_t, **parameters).mean() * temperature**2

    return loss


def _kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _js(log_s, log_t, beta):
    log_m = torch.logsumexp(
        torch.stack([log_s + math.log(1 - beta), log_t + math.log(beta)]), dim=0
    )
    return beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m)


def _tv(log_s, log_t):
    return 0.5 * (log_t.exp() - log_s.exp()).abs().sum(-1)


def _topk(kind: str, rows, **parameters) -> Loss:
    return Loss(
        name=f"topk_{kind}",
        family="sparse",
        function=functional.topk_divergence,
        eager=_with_tail(rows),
        make=_stored,
        make_optional=per_row,
        differentiable=(
            "student", "topk_values", "temperature", "teacher_temperature", "row_weight",
        ),
        shapes=SHAPES,
        hyper={"kind": kind, "temperature": 2.0, **parameters},
        by_row=False,
    )  # fmt: skip


LOSSES = (
    _topk("forward_kl", lambda s, t: _kl(t, s)),
    _topk("reverse_kl", _kl),
    _topk("js", _js, beta=0.3),
    _topk("tv", _tv),
)
