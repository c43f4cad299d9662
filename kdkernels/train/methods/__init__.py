# SPDX-License-Identifier: Apache-2.0
"""The training methods by name; a new one is a file here and a line in ``METHODS``."""

from kdkernels.train.methods.at import AT
from kdkernels.train.methods.base import Method, Output, TopK
from kdkernels.train.methods.ce import CE
from kdkernels.train.methods.composite import Composite
from kdkernels.train.methods.course import Course, Run
from kdkernels.train.methods.crd import CRD
from kdkernels.train.methods.dkd import DKD
from kdkernels.train.methods.education import Education
from kdkernels.train.methods.fitnet import FitNet
from kdkernels.train.methods.kd import KD
from kdkernels.train.methods.skd import SKD

__all__ = ["METHODS", "Composite", "Course", "Method", "Output", "Run", "TopK"]

METHODS: dict[str, type[Method]] = {
    "at": AT,
    "ce": CE,
    "crd": CRD,
    "dkd": DKD,
    "education": Education,
    "fitnet": FitNet,
    "kd": KD,
    "skd": SKD,
}
