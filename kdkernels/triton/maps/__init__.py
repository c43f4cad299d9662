# SPDX-License-Identifier: Apache-2.0
"""Kernels of the losses over feature maps; importing registers them."""

from kdkernels.triton.maps import elementwise, pyramid, spatial_attention

__all__ = ["elementwise", "pyramid", "spatial_attention"]
