# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch

from golden import adapter
from kdkernels import functional as kd


@adapter("multi_teacher_kl", "restated")
def _(x, h):
    return kd.multi_teacher_kl_div(
        x.logits_student, x.logits_teachers, weights=x.weights, temperature=h.temperature
    )


@adapter("ensemble_kl", "OKDDip-AAAI2020")
def _(x, h):
    # Its teacher is the ensemble's logits.
    return kd.multi_teacher_kl_div(
        x.logits_student, [x.logits_teacher], temperature=h.temperature, compat="okddip"
    )


@adapter("ensemble_softce", "OKDDip-AAAI2020")
def _(x, h):
    return kd.kl_div(x.logits_student, x.logits_teacher, temperature=h.temperature, compat="cls_kd")


@adapter("dml", "OKDDip-AAAI2020")
def _(x, h):
    def loss(ce_weight, weight):
        return kd.multi_teacher_kl_div(
            x.logits_student, [x.logits_peer], x.target, weights=torch.tensor([weight]),
            ce_weight=ce_weight, temperature=h.temperature, compat="okddip",
        )  # fmt: skip

    return {"loss": loss(1.0, 1.0), "loss_ce": loss(1.0, 0.0), "loss_kl": loss(0.0, 1.0)}
