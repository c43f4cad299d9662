# SPDX-License-Identifier: Apache-2.0
"""The rowwise family in Triton; importing it registers ``rowwise_triton``."""

from kdkernels.triton.rowwise import launch  # noqa: F401
