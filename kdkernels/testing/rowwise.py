# SPDX-License-Identifier: Apache-2.0
"""The rowwise family's entries."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from kdkernels import functional
from kdkernels.testing.inputs import SHAPES, labelled_logits, logits, per_row
from kdkernels.testing.loss import Loss, compiled_when_used


def _t2_mean(rows):
    """From a divergence per row of tempered logits to the loss: mean over rows, times T^2."""

    def loss(student, teacher, *, temperature, **parameters):
        value = rows(student / temperature, teacher / temperature, **parameters)
        return value.mean() * temperature**2

    return loss


def _kl(s, t):
    return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="none").sum(-1)


def _reverse_kl(s, t):
    return F.kl_div(
        F.log_softmax(t, -1), F.log_softmax(s, -1), reduction="none", log_target=True
    ).sum(-1)


def _js(s, t, beta):
    log_s, log_t = F.log_softmax(s, -1), F.log_softmax(t, -1)
    log_m = torch.logsumexp(
        torch.stack([log_s + math.log(1 - beta), log_t + math.log(beta)]), dim=0
    )
    teacher = F.kl_div(log_m, log_t, reduction="none", log_target=True)
    student = F.kl_div(log_m, log_s, reduction="none", log_target=True)
    return (beta * teacher + (1 - beta) * student).sum(-1)


def _tv(s, t):
    return 0.5 * (F.softmax(t, -1) - F.softmax(s, -1)).abs().sum(-1)


def _skew_forward(s, t, alpha):
    s, t = F.softmax(s, -1), F.softmax(t, -1)
    return F.kl_div((alpha * t + (1 - alpha) * s).log(), t, reduction="none").sum(-1)


def _skew_reverse(s, t, alpha):
    return _skew_forward(t, s, alpha)


def _jeffreys(s, t):
    log_s, log_t = F.log_softmax(s, -1), F.log_softmax(t, -1)
    return ((log_t.exp() - log_s.exp()) * (log_t - log_s)).sum(-1)


def _affinity(s, t, alpha):
    return torch.exp(alpha * F.log_softmax(t, -1) + (1 - alpha) * F.log_softmax(s, -1)).sum(-1)


def _alpha(s, t, alpha):
    return (_affinity(s, t, alpha) - 1) / (alpha * (alpha - 1))


def _renyi(s, t, alpha):
    return _affinity(s, t, alpha).log() / (alpha - 1)


def _hellinger(s, t):
    return 1 - _affinity(s, t, 0.5)


def _chi2(s, t):
    s, t = F.softmax(s, -1), F.softmax(t, -1)
    return ((t - s) ** 2 / s).sum(-1)


def _ab(s, t, alpha, beta):
    s, t = F.softmax(s, -1), F.softmax(t, -1)
    total = alpha + beta
    terms = t**alpha * s**beta - alpha / total * t**total - beta / total * s**total
    return -terms.sum(-1) / (alpha * beta)


def _soft_cross_entropy(student, teacher, *, temperature, compat):
    log_s = F.log_softmax(student / temperature, -1)
    return -(F.softmax(teacher / temperature, -1) * log_s).sum(-1).mean() * temperature**2


def _kd(student, teacher, labels, *, temperature, alpha):
    soft = _t2_mean(_kl)(student, teacher, temperature=temperature)
    return (1 - alpha) * F.cross_entropy(student, labels) + alpha * soft


def _target(like, labels):
    return torch.zeros_like(like).scatter_(-1, labels.unsqueeze(-1), 1).bool()


def _dkd(student, teacher, labels, *, temperature, alpha, beta):
    """As mdistiller writes it: probabilities of the target and of all others, then the others."""
    target = _target(student, labels)

    def two(p):
        return torch.cat([(p * target).sum(-1, True), (p * ~target).sum(-1, True)], -1)

    s, t = F.softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
    tckd = F.kl_div(two(s).log(), two(t), reduction="none").sum(-1).mean()
    s = F.log_softmax(student / temperature - 1000.0 * target, -1)
    t = F.softmax(teacher / temperature - 1000.0 * target, -1)
    nckd = F.kl_div(s, t, reduction="none").sum(-1).mean()
    return (alpha * tckd + beta * nckd) * temperature**2


def _nkd(student, teacher, labels, *, temperature, gamma):
    """As cls_KD writes it: the others by a boolean index."""
    others = ~_target(student, labels)
    at = labels.unsqueeze(-1)
    q = F.softmax(teacher, -1).gather(-1, at).detach()
    own = -(q * F.log_softmax(student, -1).gather(-1, at)).mean()
    shape = (*student.shape[:-1], -1)
    s, t = student[others].reshape(shape), teacher[others].reshape(shape)
    s, t = F.log_softmax(s / temperature, -1), F.softmax(t / temperature, -1)
    return own - gamma * temperature**2 * (t * s).sum(-1).mean()


def _nkd_masked(student, teacher, labels, *, temperature, gamma):
    """The same without the index, which a compiler cannot take."""
    target = _target(student, labels)
    at = labels.unsqueeze(-1)
    q = F.softmax(teacher, -1).gather(-1, at).detach()
    own = -(q * F.log_softmax(student, -1).gather(-1, at)).mean()
    s = F.log_softmax((student / temperature).masked_fill(target, -math.inf), -1)
    t = F.softmax((teacher / temperature).masked_fill(target, -math.inf), -1)
    return own - gamma * temperature**2 * (t * s.masked_fill(target, 0.0)).sum(-1).mean()


def _ats(student, teacher, labels, *, temperature, target_temperature, teacher_temperature, alpha):
    tau = torch.full_like(teacher, teacher_temperature)
    tau.scatter_(-1, labels.unsqueeze(-1), target_temperature)
    s, t = F.log_softmax(student / temperature, -1), F.softmax(teacher / tau, -1)
    ce = F.cross_entropy(student.flatten(0, -2), labels.flatten())
    return (1 - alpha) * ce - alpha * temperature**2 * (t * s).sum(-1).mean()


def _wsld(student, teacher, labels, *, temperature, alpha):
    at = labels.unsqueeze(-1)
    ce_s = -F.log_softmax(student.detach(), -1).gather(-1, at).squeeze(-1)
    ce_t = -F.log_softmax(teacher.detach(), -1).gather(-1, at).squeeze(-1)
    weight = 1 - torch.exp(-ce_s / (ce_t + 1e-7))
    s, t = F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
    return -alpha * temperature**2 * (weight * (t * s).sum(-1)).mean()


def _standardized_kl(student, teacher, *, temperature, standardize):
    def z_score(x):
        return (x - x.mean(-1, keepdim=True)) / (1e-7 + x.std(-1, keepdim=True))

    return _t2_mean(_kl)(z_score(student), z_score(teacher), temperature=temperature)


_ROWWISE = {
    "family": "rowwise",
    "make": logits,
    "make_optional": per_row,
    "differentiable": ("student", "teacher", "temperature", "teacher_temperature", "row_weight"),
    "shapes": SHAPES,
}


def _divergence(kind: str, rows, **parameters) -> Loss:
    def eager(student, teacher, *, kind, **hyper):
        return _t2_mean(rows)(student, teacher, **hyper)

    return Loss(
        name=f"divergence_{kind}",
        function=functional.divergence,
        eager=eager,
        hyper={"kind": kind, "temperature": 2.0, **parameters},
        **_ROWWISE,
    )


# Kinds of `divergence` that have a function of their own are entered once, by that.
LOSSES = (
    Loss(
        name="kl_div",
        function=functional.kl_div,
        eager=_t2_mean(_kl),
        hyper={"temperature": 4.0},
        **_ROWWISE,
    ),
    Loss(
        name="reverse_kl_div",
        function=functional.reverse_kl_div,
        eager=_t2_mean(_reverse_kl),
        hyper={"temperature": 2.0},
        **_ROWWISE,
    ),
    Loss(
        name="js_div",
        function=functional.js_div,
        eager=_t2_mean(_js),
        hyper={"temperature": 2.0, "beta": 0.3},
        **_ROWWISE,
    ),
    Loss(
        name="tv_distance",
        function=functional.tv_distance,
        eager=_t2_mean(_tv),
        hyper={"temperature": 2.0},
        **_ROWWISE,
    ),
    _divergence("skew_forward", _skew_forward, alpha=0.1),
    _divergence("skew_reverse", _skew_reverse, alpha=0.1),
    _divergence("jeffreys", _jeffreys),
    _divergence("alpha", _alpha, alpha=0.3),
    _divergence("renyi", _renyi, alpha=0.5),
    _divergence("hellinger", _hellinger),
    _divergence("chi2", _chi2),
    _divergence("ab", _ab, alpha=0.2, beta=0.7),
    Loss(
        name="soft_cross_entropy",
        function=functional.kl_div,
        eager=_soft_cross_entropy,
        hyper={"temperature": 4.0, "compat": "cls_kd"},
        divergence=False,
        **_ROWWISE,
    ),
    Loss(
        name="kd_loss",
        function=functional.kd_loss,
        eager=_kd,
        hyper={"temperature": 4.0, "alpha": 0.9},
        divergence=False,
        **(_ROWWISE | {"make": labelled_logits}),
    ),
    Loss(
        name="kl_div_standardized",
        function=functional.kl_div,
        eager=_standardized_kl,
        fewest_classes=3,
        divergence=False,
        hyper={"temperature": 2.0, "standardize": True},
        **_ROWWISE,
    ),
    Loss(
        name="dkd_loss",
        function=functional.dkd_loss,
        eager=_dkd,
        divergence=False,
        hyper={"temperature": 4.0, "alpha": 1.0, "beta": 8.0},
        **(_ROWWISE | {"make": labelled_logits}),
    ),
    Loss(
        name="nkd_loss",
        function=functional.nkd_loss,
        eager=_nkd,
        others={"compile_masked": compiled_when_used(_nkd_masked)},
        stops=True,
        hyper={"temperature": 1.0, "gamma": 1.5},
        divergence=False,
        **(_ROWWISE | {"make": labelled_logits}),
    ),
    Loss(
        name="ats_loss",
        function=functional.ats_loss,
        eager=_ats,
        hyper={
            "temperature": 1.0,
            "target_temperature": 4.0,
            "teacher_temperature": 2.0,
            "alpha": 0.5,
        },
        divergence=False,
        **(_ROWWISE | {"make": labelled_logits}),
    ),
    Loss(
        name="wsld_loss",
        function=functional.wsld_loss,
        eager=_wsld,
        stops=True,
        hyper={"temperature": 4.0, "alpha": 2.25},
        divergence=False,
        **(_ROWWISE | {"make": labelled_logits}),
    ),
)
