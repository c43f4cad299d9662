# SPDX-License-Identifier: Apache-2.0
"""Losses of training methods that are several calls; each value has a graph of its own."""

from __future__ import annotations

from torch.nn import functional as F

from golden import adapter
from kdkernels import functional as kd


@adapter("mag_code_kl", "multi-granularity-distillation")
def _(x, h):
    def abstract():
        return kd.kl_div(x.s_ak, x.t_ak, temperature=h.low_T)

    def detailed():
        return kd.kl_div(x.s_dk, x.t_dk, temperature=h.high_T)

    return {
        "loss": abstract() + detailed(),
        "loss_ak_code": abstract(),
        "loss_dk_code": detailed(),
    }


@adapter("byot", "pytorch-be-your-own-teacher")
def _(x, h):
    exits = [x.middle_output1, x.middle_output2, x.middle_output3]
    features = [x.middle1_fea, x.middle2_fea, x.middle3_fea]
    final, deepest = x.output.detach(), x.final_fea.detach()

    def ce():
        return sum(F.cross_entropy(logits, x.target) for logits in [x.output, *exits])

    def soft():
        return sum(
            kd.kl_div(logits, final, temperature=h.temperature, compat="cls_kd") for logits in exits
        )

    def feature():
        return sum(
            kd.masked_mse(f, deepest, (f > 0) | (deepest > 0), reduction="sum") for f in features
        )

    return {
        "loss": (1 - h.alpha) * ce() + h.alpha * soft() + h.beta * feature(),
        "loss_ce_sum": ce(),
        "loss_kd_sum": soft(),
        "loss_feature_sum": feature(),
    }
