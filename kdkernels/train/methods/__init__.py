# SPDX-License-Identifier: Apache-2.0
"""The training methods by name; a new one is a file here and a line in ``METHODS``."""

from kdkernels.train.methods.base import Method, Output
from kdkernels.train.methods.ce import CE
from kdkernels.train.methods.kd import KD

__all__ = ["METHODS", "Method", "Output"]

METHODS: dict[str, type[Method]] = {"ce": CE, "kd": KD}
