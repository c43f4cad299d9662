# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from torch.nn.functional import cross_entropy

from golden import adapter
from kdkernels import functional as kd


def _dist(x, h, **options):
    options = {"temperature": h.tau, "beta": h.beta, "gamma": h.gamma} | options
    return kd.dist_loss(x.logits_student, x.logits_teacher, **options)


@adapter("dist", "image_classification_sota")
def _(x, h):
    if getattr(h, "edge", False):  # no parts are stored
        return _dist(x, h)
    return {
        "loss": _dist(x, h),
        "loss_inter": _dist(x, h, beta=1.0, gamma=0.0),
        "loss_intra": _dist(x, h, beta=0.0, gamma=1.0),
    }


@adapter("dist", "DIST_KD")
def _(x, h):
    return _dist(x, h)


@adapter("dist", "torchdistill")
def _(x, h):
    return _dist(x, h, compat="torchdistill")


@adapter("dist", "mmrazor")
def _(x, h):
    return h.loss_weight * kd.dist_loss(
        x.logits_student, x.logits_teacher.detach() if h.teacher_detach else x.logits_teacher,
        temperature=h.tau, beta=h.inter_loss_weight, gamma=h.intra_loss_weight, compat="mmrazor",
    )  # fmt: skip


@adapter("dist_dense", "DIST_KD")
def _(x, h):
    return kd.dist_loss(
        x.logits_student.movedim(1, -1), x.logits_teacher.movedim(1, -1), temperature=h.tau,
        beta=h.beta, gamma=h.gamma,
    )  # fmt: skip


def _alone(term: str):
    def loss(x, h):
        weights = dict.fromkeys(("instance_weight", "batch_weight", "class_weight"), 0.0)
        return kd.mlkd_loss(
            x.logits_student, x.logits_teacher, temperatures=[h.temperature], selection="none",
            **weights | {term: 1.0},
        )  # fmt: skip

    return loss


adapter("mlld_kd", "Multi-Level-Logit-Distillation")(_alone("instance_weight"))
adapter("mlld_bc", "Multi-Level-Logit-Distillation")(_alone("batch_weight"))
adapter("mlld_cc", "Multi-Level-Logit-Distillation")(_alone("class_weight"))


def _two_views(x, h, temperatures, again, strong, **options):
    """The whole loss of both repositories: the last two temperatures take the weak view twice."""
    weak, other = (
        (getattr(x, f"logits_student_{view}"), getattr(x, f"logits_teacher_{view}"))
        for view in ("weak", "strong")
    )

    def terms(view, instance, batch, classes, temperatures, **more):
        return h.kd_weight * kd.mlkd_loss(
            *view, temperatures=temperatures, instance_weight=instance, batch_weight=batch,
            class_weight=classes, **options | more,
        )  # fmt: skip

    def ce():
        return h.ce_weight * sum(cross_entropy(view[0], x.target) for view in (weak, other))

    def kd_terms(batch, classes):
        return (
            terms(weak, 1.0, batch, classes, temperatures, compat="mlkd")
            + terms(other, 1.0, 0.0, 0.0, strong, selection="none")
            + terms(weak, 1.0, 0.0, 0.0, again, selection="none")
        )

    return {
        "loss": ce() + kd_terms(1.0, 1.0),
        "loss_ce": ce(),
        "loss_kd": kd_terms(0.0, 0.0),
        "loss_bc": terms(weak, 0.0, 1.0, 0.0, temperatures, compat="mlkd"),
        "loss_cc": terms(weak, 0.0, 0.0, 1.0, temperatures, compat="mlkd"),
    }


@adapter("mlld_total", "Multi-Level-Logit-Distillation")
def _(x, h):
    return _two_views(x, h, h.temperatures_weak, h.kd_strong_on_weak_again, h.kd_strong_on_strong)


@adapter("mlld_total_ls", "logit-standardization-KD")
def _(x, h):
    temperatures = [h.temperature_arg, 3.0, 5.0, 2.0, 6.0]
    return _two_views(
        x, h, temperatures, temperatures[3:], temperatures[:3], standardize=h.logit_stand
    )
