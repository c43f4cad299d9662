# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the losses over feature maps."""

from kdkernels.triton.maps import elementwise

__all__ = ["elementwise"]
