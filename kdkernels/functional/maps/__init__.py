# SPDX-License-Identifier: Apache-2.0
"""Losses over feature maps of one stage or several.

Arguments that the functions here share:

    student, teacher: features in fp64, fp32, bf16 or fp16, each in its own; contiguous or
        channels-last without a copy, other strides are packed first. Where a sequence of stages is
        taken, the loss is the sum over stages.
    reduction: ``"mean"``, as in the formula, or ``"sum"``, not divided by the numbers that the
        formula's means divide by, unless it says otherwise.
    backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; anything but
        ``"auto"`` raises where it cannot run.

They return the loss, fp32 (fp64 if either side is), 0-d, and differentiate to every tensor that
requires a gradient, in its dtype, unless they say otherwise. A second derivative, or a
``torch.func`` transform, needs ``backend="reference"``. No sample: 0, with zero gradients.

Raises ``ValueError`` for a shape or value out of range, ``TypeError`` for a dtype or an argument of
another kind, ``NotImplementedError`` for a gradient that is not given, ``RuntimeError`` where the
demanded backend cannot run.
"""

from kdkernels.functional import rules
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

rules.share(
    __doc__,
    *(globals()[name] for name in __all__ if name.endswith("_loss")),
    attention_transfer,
    masked_mse,
)
