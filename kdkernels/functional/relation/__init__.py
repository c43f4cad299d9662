# SPDX-License-Identifier: Apache-2.0
"""Losses that compare relations: among the samples of a batch, or within a sample's features.

Arguments that the functions here share:

    student, teacher: features, each of its own width where the formula allows it. fp64, fp32, bf16
        or fp16; contiguous or channels-last, other strides are packed first. Where a list of stages
        is taken, the loss is the sum over stages.
    reduction: ``"mean"``, as in the formula, or ``"sum"``, not divided by the numbers that the
        formula's means divide by.
    group: the samples of all ranks of this process group take part; every rank gets the same loss,
        and the gradient that DDP's averaging turns into that of one process on the whole batch.
        Ranks may have different numbers of samples. Not under ``torch.compile(fullgraph=True)``.
    backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; anything but
        ``"auto"`` raises where it cannot run. On a GPU only the RKD losses and ``pkt_loss`` have
        Triton kernels; the others are torch's operators there, as ``kdkernels info`` says.

They return the loss, fp32 (fp64 if either side is), 0-d, and differentiate to student and teacher
in each one's dtype, where these require a gradient. A second derivative, or a ``torch.func``
transform, needs ``backend="reference"``. No sample: 0, with zero gradients.

Raises ``ValueError`` for a shape or value out of range, ``TypeError`` for a dtype or a tensor where
stages are expected, ``RuntimeError`` where the demanded backend cannot run.
"""

from kdkernels.functional import rules
from kdkernels.functional.relation.embeddings import (
    cc_loss,
    pkt_loss,
    rkd_angle,
    rkd_distance,
    rkd_loss,
)
from kdkernels.functional.relation.kdsvd import kdsvd_loss
from kdkernels.functional.relation.maps import fsp_loss, gram_loss, ickd_loss, nst_loss, sp_loss
from kdkernels.functional.relation.sskd import least_wrong, sskd_similarity

__all__ = [
    "cc_loss",
    "fsp_loss",
    "gram_loss",
    "ickd_loss",
    "kdsvd_loss",
    "least_wrong",
    "nst_loss",
    "pkt_loss",
    "rkd_angle",
    "rkd_distance",
    "rkd_loss",
    "sp_loss",
    "sskd_similarity",
]

rules.share(__doc__, *(globals()[name] for name in __all__ if name != "least_wrong"))
