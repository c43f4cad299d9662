# SPDX-License-Identifier: Apache-2.0
"""Losses over feature maps of one stage or several."""

from kdkernels.functional.maps.activation import ab_loss, ofd_loss, ofd_margin
from kdkernels.functional.maps.maskd import maskd_dice, maskd_loss, receptive_masks
from kdkernels.functional.maps.pyramid import cwd_loss, hcl_loss, pkd_loss
from kdkernels.functional.maps.spatial_attention import attention_transfer, ft_loss
from kdkernels.functional.maps.squares import (
    fitnet_loss,
    l2_loss,
    masked_mse,
    mgd_loss,
    random_mask,
)
from kdkernels.functional.maps.vid import vid_loss

__all__ = [
    "ab_loss",
    "attention_transfer",
    "cwd_loss",
    "fitnet_loss",
    "ft_loss",
    "hcl_loss",
    "l2_loss",
    "maskd_dice",
    "maskd_loss",
    "masked_mse",
    "mgd_loss",
    "ofd_loss",
    "ofd_margin",
    "pkd_loss",
    "random_mask",
    "receptive_masks",
    "vid_loss",
]
