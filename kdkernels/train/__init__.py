# SPDX-License-Identifier: Apache-2.0
"""A small trainer for distillation: teacher, student, metrics, resumable checkpoints.

``run(Config(...), {"temperature": 4.0})`` does what ``kdkernels train`` does.
"""

from kdkernels.train.config import Config
from kdkernels.train.errors import DivergedError, InputError, TrainError
from kdkernels.train.experiment import run

__all__ = ["Config", "DivergedError", "InputError", "TrainError", "run"]
