# SPDX-License-Identifier: Apache-2.0
"""Losses over feature maps in plain torch."""

from kdkernels.reference.maps.elementwise import elementwise
from kdkernels.reference.maps.pyramid import pkd, pyramid
from kdkernels.reference.maps.spatial_attention import spatial_attention

__all__ = ["elementwise", "pkd", "pyramid", "spatial_attention"]
