# SPDX-License-Identifier: Apache-2.0
"""The losses as functions, one module per family."""

from kdkernels.functional.rowwise import (
    divergence,
    js_div,
    kd_loss,
    kl_div,
    reverse_kl_div,
    tv_distance,
)

__all__ = ["divergence", "js_div", "kd_loss", "kl_div", "reverse_kl_div", "tv_distance"]
