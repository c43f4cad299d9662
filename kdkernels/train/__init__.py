# SPDX-License-Identifier: Apache-2.0
"""A small trainer for distillation: teacher, student, metrics, resumable checkpoints.

``run(Config(...), {"temperature": 4.0})`` does what ``kdkernels train`` does;
``distill(student, teacher, (images, labels), method="skd")`` does it with your own modules, and
``load_student(path)`` brings back what a run has trained.
"""

from kdkernels.train.api import distill
from kdkernels.train.config import Config
from kdkernels.train.errors import DivergedError, InputError, TrainError
from kdkernels.train.experiment import run
from kdkernels.train.student import Student, load_student

__all__ = [
    "Config",
    "DivergedError",
    "InputError",
    "Student",
    "TrainError",
    "distill",
    "load_student",
    "run",
]
