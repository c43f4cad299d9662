# SPDX-License-Identifier: Apache-2.0
"""The losses as functions, one module per family."""

from kdkernels.functional.attention import learning_simplifier
from kdkernels.functional.batchwise import dist_loss, mlkd_loss
from kdkernels.functional.ensemble import multi_teacher_kl_div
from kdkernels.functional.listwise import pld_loss
from kdkernels.functional.maps import (
    ab_loss,
    attention_transfer,
    cwd_loss,
    fitnet_loss,
    ft_loss,
    hcl_loss,
    l2_loss,
    maskd_dice,
    maskd_loss,
    masked_mse,
    mgd_loss,
    ofd_loss,
    ofd_margin,
    pkd_loss,
    random_mask,
    receptive_masks,
    vid_loss,
)
from kdkernels.functional.rowwise import (
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
from kdkernels.functional.sparse import topk_divergence

__all__ = [
    "ab_loss",
    "ats_loss",
    "attention_transfer",
    "cwd_loss",
    "dist_loss",
    "divergence",
    "dkd_loss",
    "fitnet_loss",
    "ft_loss",
    "hcl_loss",
    "js_div",
    "kd_loss",
    "kl_div",
    "l2_loss",
    "learning_simplifier",
    "maskd_dice",
    "maskd_loss",
    "masked_mse",
    "mgd_loss",
    "mlkd_loss",
    "multi_teacher_kl_div",
    "nkd_loss",
    "ofd_loss",
    "ofd_margin",
    "pkd_loss",
    "pld_loss",
    "random_mask",
    "receptive_masks",
    "reverse_kl_div",
    "topk_divergence",
    "tv_distance",
    "vid_loss",
    "wsld_loss",
]
