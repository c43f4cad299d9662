# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from torch.nn.functional import linear

from golden import adapter
from kdkernels import functional as kd


def _loss(student, teacher, x, h, normalize):
    """The loss, and what it leaves of the banks."""
    banks = x.memory_v1.clone(), x.memory_v2.clone()
    samples = (*banks, x.idx, x.contrast_idx[:, 1:])
    options = {"temperature": h.temperature, "normalize": normalize}
    z = torch.tensor(h.Z_in, dtype=torch.float64)
    if h.first_batch:
        z = kd.crd_normalizer(student, teacher, *samples, **options)
    loss = kd.crd_loss(
        student, teacher, *samples, z, eps=h.eps, momentum=h.momentum, **options
    )  # fmt: skip
    return {"loss": loss, "out_memory_v1": banks[0], "out_memory_v2": banks[1]}


@adapter("crd", "mdistiller", "RepDistiller")
def _(x, h):
    student = linear(x.feat_student, x.embed_s_weight, x.embed_s_bias)
    teacher = linear(x.feat_teacher, x.embed_t_weight, x.embed_t_bias)
    return _loss(student, teacher, x, h, normalize=True)


@adapter("crd_embed", "torchdistill")
def _(x, h):
    return _loss(x.embed_student, x.embed_teacher, x, h, normalize=False)
