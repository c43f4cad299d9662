# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
import torch.nn.functional as F

from golden import adapter
from kdkernels import functional as kd
from kdkernels import modules


def call(module, x, *args):
    """``module(*args)`` with the case's parameters, named "p.<name>"."""
    parameters = {n.removeprefix("p."): v for n, v in vars(x).items() if n.startswith("p.")}
    return torch.func.functional_call(module.double(), parameters, args)


def _each(x, name):
    return [v for n, v in sorted(vars(x).items()) if n.rstrip("0123456789") == name]


@adapter("hidden_mse", "DistillKit")
@adapter("hidden_cosine", "DistillKit")
def _(x, h):
    teachers = _each(x, "h_teacher")
    students = [
        F.linear(s, w) for s, w in zip(_each(x, "h_student"), _each(x, "proj"), strict=True)
    ]
    return kd.embedding_loss(students, teachers, distance=h.kind, mask=x.mask)


@adapter("embed_distill", "sentence-transformers")
def _(x, h):
    students, teachers = _each(x, "s"), _each(x, "t")
    module = modules.EmbeddingLoss(
        students[0].shape[1], teachers[0].shape[1], distance=h.distance_metric
    )
    parameters = {"projections.0.weight": x.proj_weight, "projections.0.bias": x.proj_bias}
    return torch.func.functional_call(module, parameters, (students, teachers))


@adapter("logit_cosine", "liger")
def _(x, h):
    return h.beta * kd.embedding_loss(
        x.logits_student, x.logits_teacher, distance="cosine", mask=x.labels != -100,
        reduction="sum",
    )  # fmt: skip


@adapter("sgkd", "SSD")
def _(x, h):
    return kd.sgkd_loss(
        x.feat_student, x.teacher_reps.transpose(0, 1), temperature=h.temperature_h,
        quantile=h.percentile / 100,
    )  # fmt: skip


@adapter("srrl", "cls_KD")
def _(x, h):
    return kd.srrl_loss(
        x.feat_student, x.feat_teacher, x.logits_st, x.logits_teacher, alpha=h.alpha, beta=h.beta
    )


@adapter("simkd", "SimKD")
def _(x, h):
    classes, width = x.cls_weight.shape
    classifier = torch.nn.Linear(width, classes).double()
    with torch.no_grad():
        classifier.weight.copy_(x.cls_weight), classifier.bias.copy_(x.cls_bias)
    module = modules.SimKDLoss(x.feat_student.shape[1], width, classifier, factor=h.factor)
    loss = call(module, x, x.feat_student, x.feat_teacher)
    parameters = {n[2:]: v for n, v in vars(x).items() if n.startswith("p.")}
    module.load_state_dict(parameters, strict=False)
    return {
        "loss": loss,
        "out_transfer": module.project(x.feat_student, x.feat_teacher.shape[2:]),
        "out_pred": module.predict(x.feat_student, x.feat_teacher.shape[2:]),
    }


@adapter("abf", "mdistiller")
def _(x, h):
    (mid, channels), out = (
        vars(x)["p.conv1.0.weight"].shape[:2],
        vars(x)["p.conv2.0.weight"].shape[0],
    )
    module = modules.ABF(channels, mid, out, fuse=h.fuse)
    feature, residual = call(module, x, x.x, getattr(x, "y", None), (h.out_shape, h.out_shape))
    return {
        "loss": (feature * x.cot_out).sum(), "out_feature": feature, "out_residual": residual,
    }  # fmt: skip


@adapter("reviewkd", "mdistiller")
def _(x, h):
    module = modules.ReviewKDLoss(h.in_channels, h.out_channels)
    students, teachers = _each(x, "s"), _each(x, "t")
    weight = h.reviewkd_weight * min(h.epoch / h.warmup, 1.0)

    def ce():
        return h.ce_weight * F.cross_entropy(x.logits_student, x.target)

    def review():
        return weight * call(module, x, [*students, x.s_pool], [*teachers, x.t_pool])

    return {"loss": ce() + review(), "loss_ce": ce(), "loss_kd": review()}
