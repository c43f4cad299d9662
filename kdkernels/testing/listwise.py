# SPDX-License-Identifier: Apache-2.0
"""The list-wise losses' entries."""

from __future__ import annotations

import math

import torch

from kdkernels import functional
from kdkernels.testing.inputs import SHAPES, labelled_logits, per_row
from kdkernels.testing.loss import Loss


def _pld(student, teacher, labels, *, temperature, teacher_temperature):
    ranks = teacher.detach().scatter(-1, labels.unsqueeze(-1), math.inf)
    order = ranks.argsort(-1, descending=True)
    weight = torch.softmax(teacher / teacher_temperature, -1).gather(-1, order)
    ranked = (student / temperature).gather(-1, order)
    remaining = ranked.flip(-1).logcumsumexp(-1).flip(-1)
    return -(weight * (ranked - remaining)).sum(-1).mean()


LOSSES = (
    Loss(
        name="pld_loss",
        family="listwise",
        function=functional.pld_loss,
        eager=_pld,
        make=labelled_logits,
        make_optional=per_row,
        differentiable=("student", "teacher", "temperature", "teacher_temperature", "row_weight"),
        shapes=SHAPES,
        hyper={"temperature": 1.0, "teacher_temperature": 2.0},
        by_row=False,
        divergence=False,
        stops=True,
    ),
)
