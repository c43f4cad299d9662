# SPDX-License-Identifier: Apache-2.0
"""One forward and backward on a GPU, for a profiler: step.py LOSS SHAPE DTYPE BACKEND

Lies between the marks `ncu --profile-from-start off` waits for; without ncu, prints the kernels.
"""

from __future__ import annotations

import os
import sys

import torch

from kdkernels.bench import DTYPES, Case, measure
from kdkernels.testing import LOSSES

name, shape, dtype, backend = sys.argv[1:]
loss = LOSSES[name]
inputs = measure.make_inputs(loss, Case(name, shape).size(), DTYPES[dtype], "cuda")
step = measure.make_step(lambda given: loss(given, backend=backend), inputs, 1.0)
for _ in range(3):
    step()
torch.cuda.synchronize()
if "UNDER_NCU" in os.environ:  # two profilers cannot share the counters
    with torch.cuda.profiler.profile():
        step()
        torch.cuda.synchronize()
else:
    with torch.profiler.profile() as profile:
        step()
        torch.cuda.synchronize()
    print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=12))
