# SPDX-License-Identifier: Apache-2.0
"""The ensemble family's entries: three teachers."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kdkernels import functional
from kdkernels.testing.inputs import SHAPES, logits, per_row
from kdkernels.testing.loss import Loss


def _teachers(shape, generator, device, dtype):
    """A student on its way to the first of three teachers."""
    made = logits(shape, generator, device, dtype)
    others = 3.0 * torch.randn((2, *shape), generator=generator, dtype=torch.float64)
    teachers = torch.cat([made["teacher"].unsqueeze(0), others.to(device, dtype)])
    return {"student": made["student"], "teachers": teachers}


def _weights_too(shape, generator, device, dtype):
    optional = per_row(shape, generator, device, dtype)
    weights = torch.rand((3, *shape[:-1]), generator=generator, dtype=torch.float64)
    return optional | {"weights": (0.1 + weights).to(optional["row_weight"])}


def _sum(student, teachers, *, temperature):
    log_p = F.log_softmax(student / temperature, -1)
    losses = [
        F.kl_div(log_p, F.softmax(teacher / temperature, -1), reduction="none").sum(-1).mean()
        for teacher in teachers
    ]
    return sum(losses) / len(losses) * temperature**2


def _mixture(student, teachers, *, temperature, form):
    target = sum(F.softmax(teacher / temperature, -1) for teacher in teachers) / len(teachers)
    rows = F.kl_div(F.log_softmax(student / temperature, -1), target, reduction="none").sum(-1)
    return rows.mean() * temperature**2


_ENSEMBLE = {
    "family": "ensemble",
    "function": functional.multi_teacher_kl_div,
    "make": _teachers,
    "make_optional": _weights_too,
    "differentiable": (
        "student", "teachers", "temperature", "teacher_temperature", "row_weight", "weights",
    ),
    "shapes": SHAPES,
    "by_row": False,
    "divergence": False,  # the teachers differ
}  # fmt: skip

LOSSES = (
    Loss(name="multi_teacher_kl_div", eager=_sum, hyper={"temperature": 4.0}, **_ENSEMBLE),
    Loss(
        name="multi_teacher_mixture",
        eager=_mixture,
        hyper={"temperature": 4.0, "form": "mixture"},
        **_ENSEMBLE,
    ),
)
