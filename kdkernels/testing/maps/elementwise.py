# SPDX-License-Identifier: Apache-2.0
"""Entries of the losses that are a sum over elements."""

from __future__ import annotations

import torch.nn.functional as F

from kdkernels import functional
from kdkernels.testing.loss import Loss
from kdkernels.testing.maps.inputs import STAGES, maps, numbers


def _fitnet(student, teacher):
    return F.mse_loss(student, teacher)


def _masked(student, teacher, mask):
    return ((student - teacher) ** 2 * mask.to(student)).mean()


def _mgd(student, teacher, *, alpha):
    return F.mse_loss(student, teacher, reduction="sum") / len(student) * alpha


def _l2(student, teacher, *, scale):
    def unit(x):
        x = x.view(len(x), -1)
        return x / x.norm(2, dim=1, keepdim=True) * scale

    return (unit(student) - unit(teacher)).pow(2).sum() / len(student)


def _ofd(student, teacher, margin):
    margin = margin.to(student).view(1, -1, 1, 1)
    low = (student > margin) & (teacher <= margin)
    middle = (student > teacher) & (teacher > margin) & (teacher <= 0)
    loss = (
        (student - margin) ** 2 * low.float()
        + (student - teacher) ** 2 * middle.float()
        + (student - teacher) ** 2 * (teacher > 0).float()
    )
    return loss.abs().mean(0).sum()


def _ab(student, teacher, *, margin):
    loss = (student + margin) ** 2 * ((student > -margin) & (teacher <= 0)).float() + (
        student - margin
    ) ** 2 * ((student <= margin) & (teacher > 0)).float()
    return loss.abs().sum() / len(student) / 1000 * 3


def _vid(student, teacher, log_scale):
    variance = ((1.0 + log_scale.exp()).log() + 1e-5).view(1, -1, 1, 1)
    return (0.5 * ((student - teacher) ** 2 / variance + variance.log())).mean()


def _maskd(student, teacher, masks):
    masked = student.unsqueeze(1) * masks.unsqueeze(2), teacher.unsqueeze(1) * masks.unsqueeze(2)
    squares = ((masked[0] - masked[1]) ** 2).sum((3, 4))
    return (squares / (masks.sum((2, 3)).unsqueeze(-1) + 1e-5)).mean() * 0.5


def _with(name, size, low, high):
    """Maps, and numbers of a shape that follows from theirs."""

    def make(shape, generator, device, dtype):
        made = maps(shape, generator, device, dtype)
        return made | {name: numbers(size(*shape), generator, device, dtype, low, high)}

    return make


def _loss(name, eager, *, make=maps, differentiable=("student", "teacher"), **rest) -> Loss:
    return Loss(
        name=name,
        family="maps.elementwise",
        function=getattr(functional, name),
        eager=eager,
        make=make,
        make_optional=lambda *_: {},
        differentiable=differentiable,
        shapes=STAGES,
        small=(5, 6, 7, 5),
        by_row=False,
        features=True,
        divergence=False,
        **rest,
    )


LOSSES = (
    _loss("fitnet_loss", _fitnet),
    _loss("masked_mse", _masked, make=_with("mask", lambda b, c, h, w: (b, c, 1, 1), 0.0, 2.0)),
    _loss("mgd_loss", _mgd, hyper={"alpha": 7e-5}),
    _loss("l2_loss", _l2, hyper={"scale": 1.5}),
    _loss(
        "ofd_loss",
        _ofd,
        make=_with("margin", lambda b, c, h, w: (c,), -1.5, -0.2),
        differentiable=("student", "teacher", "margin"),
    ),
    _loss("ab_loss", _ab, hyper={"margin": 1.0}, differentiable=("student",)),
    _loss(
        "vid_loss",
        _vid,
        make=_with("log_scale", lambda b, c, h, w: (c,), -1.0, 4.0),
        differentiable=("student", "teacher", "log_scale"),
        learned=("log_scale",),
    ),
    _loss("maskd_loss", _maskd, make=_with("masks", lambda b, c, h, w: (b, 4, h, w), 0.0, 1.0)),
)
