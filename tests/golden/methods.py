# SPDX-License-Identifier: Apache-2.0
"""Losses of training methods that are several calls; each value has a graph of its own."""

from __future__ import annotations

from torch.func import functional_call
from torch.nn import functional as F

from golden import adapter
from kdkernels import functional as kd
from kdkernels.modules import SemCKDLoss
from kdkernels.modules.semckd import calibrated_mse


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


@adapter("semckd_loss", "SimKD")
def _(x, h):
    def grid(name):
        return [[getattr(x, f"{name}{i}{j}") for j in range(2)] for i in range(2)]

    return calibrated_mse(grid("v"), grid("g"), x.weight)


@adapter("semckd", "SimKD")
def _(x, h):
    student, teacher = [x.fs0, x.fs1], [x.ft0, x.ft1]
    module = SemCKDLoss(
        [s.shape[1] for s in student],
        [t.shape[1] for t in teacher],
        batch_size=h.feat_dim,
        factor=h.factor,
        soft=h.soft,
    ).double()
    parameters = {_ours(name): value for name, value in vars(x).items() if name.startswith("p.")}
    assert parameters.keys() == dict(module.named_parameters()).keys()
    own = {
        name.removeprefix("attention."): value
        for name, value in parameters.items()
        if name.startswith("attention.")
    }
    return {
        "loss": functional_call(module, parameters, (student, teacher)),
        "out_attention": functional_call(module.attention, own, (student, teacher)),
    }


def _ours(name: str) -> str:
    """What our module calls p.query_0.linear1.bias, or p.regressor01.regressor.3.weight."""
    _, layer, rest = name.split(".", 2)
    if layer.startswith("regressor"):
        return f"projections.{layer[-2]}.{layer[-1]}.{rest.removeprefix('regressor.')}"
    side = {"query": "queries", "key": "keys"}[layer[:-2]]
    return f"attention.{side}.{layer[-1]}.{rest}"
