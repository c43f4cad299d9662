# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from golden import adapter
from kdkernels import functional as kd


def _distillkit(kind):
    def loss(x, h):
        mask = getattr(x, "mask", None)
        return kd.topk_divergence(
            x.logits_student, x.sparse_values, x.sparse_ids, kind=kind,
            values="log_probs" if h.log_values else "logits",
            missing={"zero": "zero", "symmetric_uniform": "tail"}[h.missing],
            temperature=h.temperature, teacher_temperature=h.temperature / h.generation_temperature,
            scale="t2" if h.t2 else "none", mask=None if mask is None else mask.bool(),
            compat="distillkit",
        )  # fmt: skip

    return loss


adapter("sparse_kl", "DistillKit")(_distillkit("forward_kl"))
adapter("sparse_jsd", "DistillKit")(_distillkit("js"))
adapter("sparse_tvd", "DistillKit")(_distillkit("tv"))


@adapter("sparse_gjsd_tail", "trl")
def _(x, h):
    return kd.topk_divergence(
        x.logits_student, x.sparse_values, x.sparse_ids, kind="js", beta=h.beta,
        temperature=h.temperature, scale="none", reduction=h.reduction.split()[0], compat="trl",
    )  # fmt: skip
