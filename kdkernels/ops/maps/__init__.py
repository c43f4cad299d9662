# SPDX-License-Identifier: Apache-2.0
"""Operators of the losses over feature maps, one module per kernel."""

from kdkernels.ops.maps import elementwise, pyramid, spatial_attention

__all__ = ["elementwise", "pyramid", "spatial_attention"]
