# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one module per family; each registers its operators when it is imported."""
