# SPDX-License-Identifier: Apache-2.0
"""Losses over feature maps in plain torch."""

from kdkernels.reference.maps.elementwise import elementwise

__all__ = ["elementwise"]
