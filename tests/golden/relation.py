# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from torch.nn.functional import normalize

import kdkernels
from golden import adapter
from kdkernels import functional as kd


def _stages(x):
    number = sum(name.startswith("fs") for name in vars(x))
    return [[getattr(x, f"f{side}{i}") for i in range(number)] for side in "st"]


def _of(function, **options):
    return lambda x, h: function(x.feat_student, x.feat_teacher, **options)


adapter("sp", "mdistiller", "RepDistiller")(_of(kd.sp_loss))
adapter("nst", "mdistiller")(_of(kd.nst_loss))
adapter("nst_multi", "RepDistiller")(lambda x, h: kd.nst_loss(*_stages(x)))
adapter("rkd_distance", "RKD")(_of(kd.rkd_distance))
adapter("rkd_angle", "mdistiller", "RKD")(_of(kd.rkd_angle))
adapter("cc", "RepDistiller")(_of(kd.cc_loss, compat="repdistiller"))


@adapter("sp", "torchdistill")
def _(x, h):
    reduction = "mean" if h.reduction == "batchmean" else "sum"
    return _of(kd.sp_loss, compat="torchdistill", reduction=reduction)(x, h)


@adapter("pkt", "mdistiller", "RepDistiller", "torchdistill")
def _(x, h):
    return _of(kd.pkt_loss, eps=h.eps)(x, h)


@adapter("rkd", "mdistiller")
def _(x, h):
    return _of(
        kd.rkd_loss, distance_weight=h.distance_weight, angle_weight=h.angle_weight,
        squared=h.squared,
    )(x, h)  # fmt: skip


@adapter("rkd_distance", "mdistiller")
def _(x, h):
    return _of(kd.rkd_distance, squared=h.squared)(x, h)


def _weighted(function):
    def loss(x, h):
        given = x.feat_student, x.feat_teacher
        if h.with_l2_norm:
            given = (normalize(f.flatten(1)) for f in given)
        return h.loss_weight * function(*given)

    return loss


adapter("rkd_distance", "mmrazor")(_weighted(kd.rkd_distance))
adapter("rkd_angle", "mmrazor")(_weighted(kd.rkd_angle))


@adapter("rkd", "RepDistiller")
def _(x, h):
    return _of(kd.rkd_loss, distance_weight=h.w_d, angle_weight=h.w_a)(x, h)


@adapter("rkd", "torchdistill")
def _(x, h):
    return _of(
        kd.rkd_loss, distance_weight=h.dist_factor, angle_weight=h.angle_factor,
        reduction=h.reduction,
    )(x, h)  # fmt: skip


@adapter("cckd", "torchdistill")
def _(x, h):
    kernel = h.kernel.split()[0]
    series = {"gamma": h.gamma, "order": h.max_p} if kernel == "gaussian" else {}
    reduction = "sum" if h.reduction == "none" else "mean"
    return _of(kd.cc_loss, kernel=kernel, reduction=reduction, compat="torchdistill", **series)(
        x, h
    )


@adapter("cc_embed", "RepDistiller")
def _(x, h):
    given = vars(x)
    embeddings = (
        given[f"feat_{side}"] @ given[f"{side[0]}.linear.weight"].T
        + given[f"{side[0]}.linear.bias"]
        for side in ("student", "teacher")
    )
    return kdkernels.CCLoss(compat="repdistiller")(*embeddings)


@adapter("fsp", "RepDistiller", "torchdistill")
def _(x, h):
    return kd.fsp_loss(*_stages(x), compat="torchdistill" if "MAX" in h.pool else "repdistiller")


@adapter("kdsvd", "mdistiller", "RepDistiller")
def _(x, h):
    compat = "mdistiller" if h.reshape.startswith("(C*H)") else "repdistiller"
    return kd.kdsvd_loss(*_stages(x), k=h.k, compat=compat)


@adapter("ickd", "torchdistill")
def _(x, h):
    return h.weight * kd.ickd_loss(x.feat_student, x.feat_teacher)


@adapter("gram_modality", "restated")
def _(x, h):
    return kd.gram_loss(x.mods_student, x.mods_teacher, normalize=h.row_normalize)


@adapter("sskd", "SSKD")
def _(x, h):
    def loss(**weights):
        module = kdkernels.SSKDLoss(
            temperature=h.kd_T, ss_temperature=h.ss_T, tf_ratio=h.ratio_tf, ss_ratio=h.ratio_ss,
            **weights,
        )  # fmt: skip
        return module(x.output, x.knowledge, x.s_feat, x.t_feat, x.target)

    weights = {name: getattr(h, name) for name in vars(h) if name.endswith("_weight")}
    none = dict.fromkeys(weights, 0.0)
    parts = {name: loss(**none | {f"{name}_weight": 1.0}) for name in ("ce", "kd", "tf", "ss")}
    return {"loss": loss(**weights)} | {f"loss_{name}": part for name, part in parts.items()}


@adapter("sskd", "torchdistill")
def _(x, h):
    ce, kd_weight, ss, tf = h.loss_weights
    module = kdkernels.SSKDLoss(
        temperature=h.kl_temp, ss_temperature=h.ss_temp, tf_ratio=h.tf_ratio, ss_ratio=h.ss_ratio,
        ce_weight=ce, kd_weight=kd_weight, ss_weight=ss, tf_weight=tf,
    )  # fmt: skip
    return module(x.output, x.knowledge, x.s_feat, x.t_feat, x.target)
