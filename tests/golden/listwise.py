# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from golden import adapter
from kdkernels import functional as kd


@adapter("pld", "restated")
def _(x, h):
    return kd.pld_loss(
        x.logits_student, x.logits_teacher, x.target, teacher_temperature=h.teacher_temperature
    )
