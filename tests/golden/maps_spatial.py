# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from golden import adapter
from kdkernels import functional as kd


def stages(x, side: str):
    """The tensors fs0, fs1, ... or ft0, ft1, ... of a case."""
    names = sorted(name for name in vars(x) if name[:2] == side and name[2:].isdigit())
    return [getattr(x, name) for name in names]


@adapter("at", "mdistiller")
def _(x, h):
    return kd.attention_transfer(x.feat_student, x.feat_teacher, power=h.p, compat="mdistiller")


@adapter("at", "torchdistill")
def _(x, h):
    compat = "torchdistill" if h.mode == "paper" else "paper"
    return h.weight * kd.attention_transfer(x.feat_student, x.feat_teacher, compat=compat)


@adapter("at", "mmrazor")
def _(x, h):
    return h.loss_weight * kd.attention_transfer(x.feat_student, x.feat_teacher, compat="mmrazor")


@adapter("at", "attention-transfer")
def _(x, h):
    return kd.attention_transfer(x.feat_student, x.feat_teacher, compat="attention-transfer")


@adapter("at_multi", "mdistiller")
def _(x, h):
    return kd.attention_transfer(stages(x, "fs"), stages(x, "ft"), power=h.p)


@adapter("at_multi", "RepDistiller")
def _(x, h):
    pairs = list(zip(stages(x, "fs"), stages(x, "ft"), strict=True))
    parts = [kd.attention_transfer(s, t, power=h.p, compat="repdistiller") for s, t in pairs]
    total = kd.attention_transfer(*zip(*pairs, strict=True), power=h.p)
    return {"loss": total} | {f"loss_s{i}": part for i, part in enumerate(parts)}


@adapter("ft", "RepDistiller")
def _(x, h):
    return kd.ft_loss(
        x.feat_student, x.feat_teacher, power=h.p1, distance_power=h.p2, compat="repdistiller"
    )


@adapter("ft", "torchdistill")
def _(x, h):
    return kd.ft_loss(
        x.feat_student, x.feat_teacher, distance_power=h.p, reduction=h.reduction,
        compat="torchdistill",
    )  # fmt: skip


@adapter("ft", "mmrazor")
def _(x, h):
    return h.loss_weight * kd.ft_loss(x.feat_student, x.feat_teacher, compat="mmrazor")


@adapter("hcl", "mdistiller")
def _(x, h):
    return kd.hcl_loss(x.feat_student, x.feat_teacher, levels=h.levels)


@adapter("hcl", "torchdistill")
def _(x, h):
    return kd.hcl_loss(x.feat_student, x.feat_teacher, levels=h.output_sizes, reduction=h.reduction)


@adapter("hcl_multi", "ReviewKD")
def _(x, h):
    return kd.hcl_loss(stages(x, "fs"), stages(x, "ft"))


@adapter("cwd", "mmrazor")
def _(x, h):
    return h.loss_weight * kd.cwd_loss(x.feat_student, x.feat_teacher, temperature=h.tau)


@adapter("pkd", "mmrazor")
def _(x, h):
    resize = "student" if h.resize_stu else "teacher"
    return h.loss_weight * kd.pkd_loss(x.feat_student, x.feat_teacher, resize=resize, eps=h.eps)
