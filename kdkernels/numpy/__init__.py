# SPDX-License-Identifier: Apache-2.0
"""Losses and their gradients on NumPy arrays: the CPU kernels without torch.

Bit for bit what the ``cpu`` backend computes on the same values, except where torch rounds once
more: the gradients to scalar temperatures and to fp16 logits; and where matrix products around a
kernel are NumPy's here (relations of maps). Arrays are float64, float32 or float16, of any strides;
logits are ``(..., C)`` and the leading dimensions rows. Every function returns the loss and a named
tuple of its gradients (of the sum, for ``reduction="none"``), the logits' in their dtype and the
others in float64. With ``teacher_temperature=None``, the student's is used, and the gradient to it
is the sum of ``temperature`` and ``teacher_temperature`` there.

``**rows`` are the keyword arguments that the losses over rows share: ``temperature``,
``teacher_temperature``, ``scale``, ``reduction``, ``mask``, ``ignore_index`` and ``row_weight``, as
in ``kdkernels.functional`` and with its defaults, and ``threads``, 1 by default. The other
arguments mean what they mean there too.
"""

from __future__ import annotations

from kdkernels.numpy.attention import AttentionGradients, class_attention
from kdkernels.numpy.batchwise import BatchGradients, dist_loss
from kdkernels.numpy.contrast import crd_loss, sample_negatives
from kdkernels.numpy.ensemble import EnsembleGradients, multi_teacher_kl_div
from kdkernels.numpy.maps import (
    MapGradients,
    ab_loss,
    fitnet_loss,
    masked_mse,
    ofd_loss,
    vid_loss,
)
from kdkernels.numpy.maps_spatial import attention_transfer, ft_loss, hcl_loss
from kdkernels.numpy.relation import (
    RelationGradients,
    cc_loss,
    ickd_loss,
    nst_loss,
    pkt_loss,
    rkd_loss,
    sp_loss,
)
from kdkernels.numpy.rowwise import (
    Gradients,
    Parts,
    ats_loss,
    divergence,
    dkd_loss,
    js_div,
    kd_loss,
    kl_div,
    nkd_loss,
    reverse_kl_div,
    tv_distance,
    wsld_loss,
)
from kdkernels.numpy.sparse import TopKGradients, topk_divergence

__all__ = [
    "AttentionGradients",
    "BatchGradients",
    "EnsembleGradients",
    "Gradients",
    "MapGradients",
    "Parts",
    "RelationGradients",
    "TopKGradients",
    "ab_loss",
    "ats_loss",
    "attention_transfer",
    "cc_loss",
    "class_attention",
    "crd_loss",
    "dist_loss",
    "divergence",
    "dkd_loss",
    "fitnet_loss",
    "ft_loss",
    "hcl_loss",
    "ickd_loss",
    "js_div",
    "kd_loss",
    "kl_div",
    "masked_mse",
    "multi_teacher_kl_div",
    "nkd_loss",
    "nst_loss",
    "ofd_loss",
    "pkt_loss",
    "reverse_kl_div",
    "rkd_loss",
    "sample_negatives",
    "sp_loss",
    "topk_divergence",
    "tv_distance",
    "vid_loss",
    "wsld_loss",
]
