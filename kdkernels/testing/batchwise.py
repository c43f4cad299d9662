# SPDX-License-Identifier: Apache-2.0
"""The batchwise family's entries."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kdkernels import functional
from kdkernels.testing.inputs import SHAPES, logits
from kdkernels.testing.loss import Loss


def _correlation(a, b):
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)


def _dist(student, teacher, *, temperature, beta, gamma):
    p, q = (student / temperature).softmax(1), (teacher / temperature).softmax(1)
    inter = 1 - _correlation(p, q).mean()
    intra = 1 - _correlation(p.t(), q.t()).mean()
    return temperature**2 * (beta * inter + gamma * intra)


def _selected(teacher):
    """Samples and classes of at most median confidence."""
    q = teacher.softmax(1)
    confidence, mass = q.amax(1), q.sum(0)
    return confidence <= confidence.quantile(0.5), mass <= mass.quantile(0.5)


def _levels(student, teacher, temperature):
    """Divergence per row and the differences of both correlation matrices."""
    log_p, q = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    p = F.softmax(student / temperature, 1)
    rows = temperature**2 * F.kl_div(log_p, q, reduction="none").sum(1)
    return rows, p @ p.t() - q @ q.t(), p.t() @ p - q.t() @ q


def _mlkd(student, teacher, *, temperatures):
    (rows, classes), (samples, kinds) = student.shape, _selected(teacher.float())
    loss = 0
    for temperature in temperatures:
        kl, batch, correlation = _levels(student, teacher, temperature)
        loss = loss + kl[samples].sum() / rows
        loss = loss + batch[samples][:, samples].pow(2).sum() / rows
        loss = loss + correlation[kinds][:, kinds].pow(2).sum() / classes
    return loss


def _mlkd_published(student, teacher, *, temperatures, compat):
    (rows, classes), selected = student.shape, _selected(teacher.float())
    samples, kinds = (x.to(student.dtype) for x in selected)
    loss = 0
    for temperature in temperatures:
        kl, batch, correlation = _levels(student, teacher, temperature)
        loss = loss + (kl.mean() * samples).mean()
        loss = loss + (batch.pow(2).sum() / rows * samples).mean()
        loss = loss + (correlation.pow(2).sum() / classes * kinds).mean()
    return loss


def _masks(shape, generator, device, dtype):
    # Three rows at least: of two, columns correlate by 1 or -1, and the gradient is rounding.
    rows = torch.arange(torch.Size(shape[:-1]).numel()).reshape(shape[:-1])
    return {"mask": (rows % 5 != 3).to(device)}


_BATCHWISE = {
    "make": logits,
    "make_optional": _masks,
    "differentiable": ("student", "teacher", "temperature"),
    "shapes": {name: SHAPES[name] for name in ("cifar100_b64", "imagenet_b256")},
    "by_row": False,
    "divergence": False,
}
_TEMPERATURES = (4.0, 3.0, 5.0, 2.0, 6.0)

LOSSES = (
    Loss(
        name="dist_loss",
        family="batchwise.dist",
        function=functional.dist_loss,
        eager=_dist,
        hyper={"temperature": 4.0, "beta": 1.0, "gamma": 2.0},
        **_BATCHWISE,
    ),
    Loss(
        name="mlkd_loss",
        family="batchwise.mlkd_softmax",
        function=functional.mlkd_loss,
        eager=_mlkd,
        hyper={"temperatures": _TEMPERATURES},
        **_BATCHWISE,
    ),
    Loss(
        name="mlkd_published",
        family="batchwise.mlkd_softmax",
        function=functional.mlkd_loss,
        eager=_mlkd_published,
        hyper={"temperatures": _TEMPERATURES, "compat": "mlkd"},
        **_BATCHWISE,
    ),
)
