# SPDX-License-Identifier: Apache-2.0
"""Regressions between two commits on one machine, with pytest-benchmark:

pytest benchmarks --benchmark-autosave           at the first
pytest benchmarks --benchmark-compare            at the second
"""

from __future__ import annotations

import pytest
import torch

from kdkernels.bench import measure
from kdkernels.testing import LOSSES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", ["cifar100_b64", "imagenet_b256", "llama3_vocab"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_forward_and_backward(benchmark, loss, shape):
    if shape not in loss.shapes:
        pytest.skip("not a shape of this loss")
    inputs = measure.make_inputs(loss, loss.shapes[shape], torch.float32, DEVICE)
    step = measure.make_step(lambda given: loss(given), inputs, 1.0)

    def synchronised():
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(synchronised)
