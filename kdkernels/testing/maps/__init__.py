# SPDX-License-Identifier: Apache-2.0
"""The maps family's entries."""

from kdkernels.testing.maps import elementwise, spatial

LOSSES = (*elementwise.LOSSES, *spatial.LOSSES)
