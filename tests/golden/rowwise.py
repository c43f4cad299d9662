# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import torch

from golden import adapter, reduction_of
from kdkernels import dropin
from kdkernels import functional as kd


@adapter("kd", "mdistiller")
def _(x, h):
    return dropin.kd_loss(x.logits_student, x.logits_teacher, h.temperature)


@adapter("kd", "RepDistiller")
def _(x, h):
    return dropin.DistillKL(h.temperature)(x.logits_student, x.logits_teacher)


@adapter("kd", "torchdistill")
def _(x, h):
    return kd.kl_div(
        x.logits_student, x.logits_teacher, temperature=h.temperature, scale="none",
        reduction=reduction_of(h), compat="torchdistill",
    )  # fmt: skip


@adapter("kd_ce", "torchdistill")
def _(x, h):
    options = {"reduction": reduction_of(h), "compat": "torchdistill"}
    if options["reduction"] == "mean":  # nn.KLDivLoss's, as in TAKD
        options = {"compat": "takd"}
    weights = {"ce_weight": h.alpha, "kd_weight": 1 - h.alpha if h.beta is None else h.beta}
    if h.beta is None and options["compat"] == "torchdistill":
        weights = {"alpha": h.alpha}
    return kd.kd_loss(
        x.logits_student, x.logits_teacher, x.target, temperature=h.temperature, **options,
        **weights,
    )  # fmt: skip


@adapter("kd", "mmrazor")
def _(x, h):
    return h.loss_weight * kd.kl_div(
        x.logits_student, x.logits_teacher.detach() if h.teacher_detach else x.logits_teacher,
        temperature=h.temperature, reduction=reduction_of(h), compat="mmrazor",
    )  # fmt: skip


@adapter("kd_soft_ce", "cls_KD")
def _(x, h):
    return h.alpha * kd.kl_div(
        x.logits_student, x.logits_teacher, temperature=h.temperature, compat="cls_kd"
    )


@adapter("kd_soft_ce", "TextBrewer")
def _(x, h):
    temperature = getattr(x, "temperature", h.temperature)
    return kd.kl_div(
        x.logits_student, x.logits_teacher, temperature=temperature, scale="none",
        compat="textbrewer",
    )  # fmt: skip


@adapter("kd_ce", "TAKD")
def _(x, h):
    return kd.kd_loss(
        x.logits_student, x.logits_teacher, x.target, temperature=h.temperature,
        alpha=h.lambda_, compat="takd",
    )  # fmt: skip


@adapter("dgkd", "DGKD")
def _(x, h):
    # Several teachers: the cross-entropy goes with the first, the others add their divergence.
    teachers = [x.logits_teacher, *(getattr(x, f"logits_ta{i}") for i in range(h.n_ta))]
    dropped = np.atleast_1d(h.dropped_index).tolist()
    first, *others = [t for i, t in enumerate(teachers) if i not in dropped]
    loss = kd.kd_loss(
        x.logits_student, first, x.target, temperature=h.temperature, alpha=h.lambda_,
        compat="takd",
    )  # fmt: skip
    for teacher in others:
        loss = loss + h.lambda_ * kd.kl_div(
            x.logits_student, teacher, temperature=h.temperature, reduction="mean"
        )
    return loss


@adapter("kd_ce", "attention-transfer")
def _(x, h):
    return kd.kd_loss(
        x.logits_student, x.logits_teacher, x.target, temperature=h.temperature, alpha=h.alpha
    )


@adapter("kd_ce", "mdistiller")
def _(x, h):
    def loss(ce_weight, kd_weight):
        return kd.kd_loss(
            x.logits_student, x.logits_teacher, x.target, temperature=h.temperature,
            ce_weight=ce_weight, kd_weight=kd_weight, compat="mdistiller",
        )  # fmt: skip

    return {
        "loss": loss(h.ce_weight, h.kd_weight),
        "loss_ce": loss(h.ce_weight, 0.0),
        "loss_kd": loss(0.0, h.kd_weight),
    }


@adapter("ctkd_T", "CTKD")
def _(x, h):
    return kd.kl_div(x.logits_student, x.logits_teacher, temperature=x.temperature)


@adapter("ctkd_rowT", "restated")
def _(x, h):
    return kd.kl_div(x.logits_student, x.logits_teacher, temperature=x.temperature.flatten())


@adapter("kd_row_weighted", "restated")
def _(x, h):
    return kd.kl_div(
        x.logits_student, x.logits_teacher, temperature=h.temperature, row_weight=x.row_weight
    )


@adapter("gjsd", "trl")
def _(x, h):
    return dropin.generalized_jsd_loss(
        x.logits_student, x.logits_teacher, getattr(x, "labels", None), h.beta, h.temperature,
        getattr(h, "reduction", "batchmean").split()[0], getattr(h, "num_items_in_batch", None),
    )  # fmt: skip


@adapter("gjsd", "liger")
def _(x, h):
    return kd.js_div(
        x.logits_student, x.logits_teacher, x.labels, beta=h.beta, temperature=h.temperature,
        scale="none", reduction=reduction_of(h),
    )  # fmt: skip


@adapter("gjsd_masked", "trl")
def _(x, h):
    # A divergence is a sum over classes, so the classes that are left out may be one class: the
    # term of that class is subtracted again.
    def bucketed(logits):
        log_p = logits.log_softmax(-1)
        inside = log_p.masked_fill(~x.support_mask, -torch.inf)
        outside = log_p.masked_fill(x.support_mask, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([inside, outside], -1), outside.squeeze(-1)

    (student, s), (teacher, t) = bucketed(x.logits_student), bucketed(x.logits_teacher)
    whole = kd.js_div(student, teacher, beta=h.beta, scale="none", reduction="sum")
    if h.beta in (0.0, 1.0):
        p, q = (t, s) if h.beta == 0 else (s, t)
        return whole - (p.exp() * (p - q)).sum()
    log_m = ((1 - h.beta) * s.exp() + h.beta * t.exp()).log()
    left_out = h.beta * t.exp() * (t - log_m) + (1 - h.beta) * s.exp() * (s - log_m)
    return whole - left_out.sum()


def _torchtune(x, h, loss, **options):
    return loss(
        x.logits_student, x.logits_teacher, x.labels, temperature=h.temperature, scale="none",
        reduction="batchmean" if h.normalize else "sum", ignore_index=h.ignore_index, **options,
    )  # fmt: skip


@adapter("forward_kl_ce", "torchtune")
def _(x, h):
    return _torchtune(x, h, kd.kl_div, compat="torchtune")


@adapter("reverse_kl", "torchtune")
def _(x, h):
    return _torchtune(x, h, kd.reverse_kl_div)


@adapter("symmetric_kl_ce", "torchtune")
def _(x, h):
    forward = _torchtune(x, h, kd.kl_div, compat="torchtune")
    return h.sym_kd_ratio * forward + (1 - h.sym_kd_ratio) * _torchtune(x, h, kd.reverse_kl_div)


def _distillkit(kind):
    def loss(x, h):
        mask = getattr(x, "mask", None)
        return kd.divergence(
            x.logits_student, x.logits_teacher, kind=kind, temperature=h.temperature,
            scale="t2" if h.t2 else "none", mask=None if mask is None else mask.bool(),
        )  # fmt: skip

    return loss


adapter("dense_kl", "DistillKit")(_distillkit("forward_kl"))
adapter("dense_jsd", "DistillKit")(_distillkit("js"))
adapter("dense_tvd", "DistillKit")(_distillkit("tv"))


@adapter("dkd", "mdistiller", "restated")
@adapter("lsdkd", "logit-standardization-KD")
@adapter("ctkd_dkd", "CTKD")
def _(x, h):
    def loss(alpha, beta):
        temperature = getattr(x, "temperature", None)
        return kd.dkd_loss(
            x.logits_student, x.logits_teacher, x.target, alpha=alpha, beta=beta,
            temperature=h.temperature if temperature is None else temperature,
            standardize=hasattr(h, "std"), compat="mdistiller",
        )  # fmt: skip

    parts = {"loss_tckd": loss(1.0, 0.0), "loss_nckd": loss(0.0, 1.0)}
    return {"loss": loss(h.alpha, h.beta), **parts}


@adapter("dkd", "mmrazor", "cls_KD")
def _(x, h):
    return getattr(h, "loss_weight", 1.0) * kd.dkd_loss(
        x.logits_student, x.logits_teacher, x.target, temperature=h.temperature, alpha=h.alpha,
        beta=h.beta, reduction=getattr(h, "reduction", "batchmean"), compat="mmrazor",
    )  # fmt: skip


@adapter("dkd_ce", "mdistiller")
def _(x, h):
    def loss(weight, warmup):
        return kd.dkd_loss(
            x.logits_student, x.logits_teacher, x.target, temperature=h.temperature, alpha=h.alpha,
            beta=h.beta, warmup=warmup, ce_weight=weight,
        )  # fmt: skip

    return {
        "loss": loss(h.ce_weight, h.warmup_factor),
        "loss_ce": loss(h.ce_weight, 0.0),
        "loss_kd": loss(0.0, h.warmup_factor),
    }


@adapter("nkd", "cls_KD")
def _(x, h):
    return kd.nkd_loss(
        x.logits_student, x.logits_teacher, x.target, temperature=h.temperature, gamma=h.gamma,
        compat="cls_kd",
    )  # fmt: skip


@adapter("ats", "ATS-LargeKD")
def _(x, h):
    def loss(alpha):
        return kd.ats_loss(
            x.logits_student, x.logits_teacher, x.target, temperature=h.s_tau, alpha=alpha,
            target_temperature=h.tau1_target, teacher_temperature=h.tau2_other,
        )  # fmt: skip

    return {"loss": loss(h.lamb), "loss_ce": loss(0.0), "loss_kd": loss(1.0)}


@adapter("wsld", "cls_KD", "mmrazor")
def _(x, h):
    return kd.wsld_loss(
        x.logits_student, x.logits_teacher, x.target, temperature=h.temperature,
        alpha=getattr(h, "alpha", getattr(h, "loss_weight", None)), compat="cls_kd",
    )  # fmt: skip


@adapter("lskd", "logit-standardization-KD", "torchdistill")
def _(x, h):
    return kd.kl_div(
        x.logits_student, x.logits_teacher, temperature=h.temperature, standardize=True,
        scale="t2" if h.t2 else "none",
    )  # fmt: skip


@adapter("lskd_ce", "torchdistill")
def _(x, h):
    return kd.kd_loss(
        x.logits_student, x.logits_teacher, x.target, temperature=h.temperature, standardize=True,
        ce_weight=h.alpha, kd_weight=1 - h.alpha if h.beta is None else h.beta,
    )  # fmt: skip


@adapter("kd_class_window", "restated")
def _(x, h):
    return kd.kl_div(
        x.logits_student, x.logits_teacher, temperature=h.temperature, class_range=(h.lo, h.hi),
        compat="cls_kd",
    )  # fmt: skip


@adapter("ctkd", "CTKD")
def _(x, h):
    # The temperature's curriculum is the trainer's; here by its formula, with gradient reversal.
    def temperature():
        theta = h.grl_lambda * x.theta + (1 - h.grl_lambda) * x.theta.detach()
        return (h.t_start + h.t_end * theta.sigmoid()).squeeze()

    loss = kd.kl_div(x.logits_student, x.logits_teacher, temperature=temperature())
    return {"loss": loss, "loss_temperature": temperature()}
