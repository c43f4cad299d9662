# SPDX-License-Identifier: Apache-2.0
"""Entries of the losses over what is left of maps without channels, and at several sizes."""

from __future__ import annotations

import torch.nn.functional as F

from kdkernels import functional
from kdkernels.testing.loss import Loss
from kdkernels.testing.maps.inputs import STAGES, maps


def _none(shape, generator, device, dtype):
    return {}


def _attention(maps):
    return F.normalize(maps.pow(2).mean(1).flatten(1))


def _attention_transfer(student, teacher):
    return (_attention(student) - _attention(teacher)).pow(2).mean()


def _attention_norm(student, teacher, *, compat):
    squares = [F.normalize(x.pow(2).sum(1).flatten(1)) for x in (student, teacher)]
    return (squares[0] - squares[1]).norm(dim=1).sum() / len(student)


def _factor_transfer(student, teacher):
    return (_attention(student) - _attention(teacher)).abs().mean()


def _hcl(student, teacher):
    height = student.shape[2]
    loss = F.mse_loss(student, teacher)
    total = weight = 1.0
    for level in (4, 2, 1):
        if level >= height:
            continue
        weight /= 2
        pooled = [F.adaptive_avg_pool2d(x, (level, level)) for x in (student, teacher)]
        loss = loss + F.mse_loss(*pooled) * weight
        total += weight
    return loss / total


def _cwd(student, teacher, *, temperature):
    s, t = (x.flatten(0, 1).flatten(1) / temperature for x in (student, teacher))
    divergence = F.kl_div(s.log_softmax(1), t.log_softmax(1), log_target=True, reduction="sum")
    return temperature**2 * divergence / len(s)


def _pkd(student, teacher):
    def standardised(maps):
        values = maps.movedim(1, 0).flatten(1)
        mean, deviation = values.mean(1, keepdim=True), values.std(1, keepdim=True)
        return (values - mean) / (deviation + 1e-6)

    return F.mse_loss(standardised(student), standardised(teacher)) / 2


# All three stages at once, as training has them, from the shape of the first.
THREE_STAGES = {"resnet32x4_stages": (64, 64, 32, 32)}


def _stages(shape, generator, device, dtype):
    batch, channels, height, width = shape
    made = {}
    for k in range(3):
        size = (batch, channels << k, max(height >> k, 1), max(width >> k, 1))
        stage = maps(size, generator, device, dtype)
        made |= {f"{side}{k or ''}": value for side, value in stage.items()}
    return made


def _of_stages(function, per_stage=False):
    """``function`` of the tensors that ``_stages`` makes: of lists, or summed stage by stage."""

    def call(*, student, student1, student2, teacher, teacher1, teacher2, **options):
        students, teachers = [student, student1, student2], [teacher, teacher1, teacher2]
        if per_stage:
            pairs = zip(students, teachers, strict=True)
            return sum(function(s, t, **options) for s, t in pairs)
        return function(students, teachers, **options)

    call.__name__ = function.__name__
    return call


_MAPS = {
    "make": maps,
    "make_optional": _none,
    "differentiable": ("student", "teacher"),
    "shapes": STAGES,
    "small": (3, 5, 6, 9),
    "by_row": False,
    "features": True,
    "divergence": False,
}

LOSSES = (
    Loss(
        name="attention_transfer",
        family="maps.spatial_attention",
        function=functional.attention_transfer,
        eager=_attention_transfer,
        **_MAPS,
    ),
    Loss(
        name="attention_transfer_norm",
        family="maps.spatial_attention",
        function=functional.attention_transfer,
        eager=_attention_norm,
        hyper={"compat": "torchdistill"},
        **_MAPS,
    ),
    Loss(
        name="ft_loss",
        family="maps.spatial_attention",
        function=functional.ft_loss,
        eager=_factor_transfer,
        **_MAPS,
    ),
    Loss(
        name="hcl_loss",
        family="maps.pyramid",
        function=functional.hcl_loss,
        eager=_hcl,
        **_MAPS,
    ),
    Loss(
        name="cwd_loss",
        family="rowwise",
        function=functional.cwd_loss,
        eager=_cwd,
        hyper={"temperature": 2.0},
        **_MAPS,
    ),
    Loss(
        name="pkd_loss",
        family="maps.pkd_loss",
        function=functional.pkd_loss,
        eager=_pkd,
        **_MAPS,
    ),
    *(
        Loss(
            name=f"{name}_stages",
            family=family,
            function=_of_stages(function),
            eager=_of_stages(eager, per_stage=True),
            **_MAPS
            | {
                "make": _stages,
                "differentiable": tuple(
                    f"{s}{k}" for k in ("", 1, 2) for s in ("student", "teacher")
                ),
                "learned": ("student1", "student2"),
                "shapes": THREE_STAGES,
                "small": (2, 3, 9, 10),
            },
        )
        for name, family, function, eager in (
            (
                "attention_transfer",
                "maps.spatial_attention",
                functional.attention_transfer,
                _attention_transfer,
            ),
            ("hcl", "maps.pyramid", functional.hcl_loss, _hcl),
        )
    ),
)
