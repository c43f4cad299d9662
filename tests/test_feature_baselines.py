# SPDX-License-Identifier: Apache-2.0
"""The baselines of losses over features cost what the suites' own code does."""
"""The baselines of losses over features are the suites' own code: operators and temporaries."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdkernels.testing import LOSSES


class _Count(TorchDispatchMode):
    """Operators that touch data, and the largest tensor they make."""

    def __init__(self):
        super().__init__()
        self.operators, self.largest = 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **kwargs or {})
        self.operators += not operator.is_view
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.nbytes)
        return result


# Operators of a call, forward and backward, and the largest temporary in bytes, as measured in
# mdistiller and RepDistiller at these shapes.
@pytest.mark.parametrize(
    ("name", "shape", "forward", "backward", "largest"),
    [
        # A third of what three stages take.
        ("ab_loss", (64, 64, 32, 32), 66 / 3, 47 / 3, 16.8e6),
        ("ofd_loss", (64, 64, 32, 32), 90 / 3, 56 / 3, 16.8e6),
        ("vid_loss", (64, 128, 16, 16), 11, 18, 8.4e6),
        ("attention_transfer_stages", (64, 64, 32, 32), 42, 68, 16.8e6),
        ("hcl_stages", (64, 64, 32, 32), 54, 44, 16.8e6),
    ],
)
def test_baselines_are_no_straw_men(name, shape, forward, backward, largest):
    loss = LOSSES[name]
    inputs = loss.inputs(*shape)
    leaves = [inputs[side].requires_grad_() for side in ("student", *loss.learned)]
    with _Count() as count:
        value = loss.eager(**inputs, **loss.hyper)
    found = count.operators
    with _Count() as count:
        torch.autograd.grad(value, leaves)
    assert 0.8 * forward <= found <= 1.2 * forward
    assert 0.8 * backward <= count.operators <= 1.2 * backward
    assert 0.8 * largest <= count.largest <= 1.2 * largest
from test_values import _Count

from kdkernels.testing import LOSSES, gradients

# Name, operators forward and backward, and the largest temporary at the entry's first shape, as
# measured of the suites' code (which differentiates to the student alone); and a smaller shape to
# count at, with its part of that temporary.
CASES = [
    ("nst_loss", 66, 98, 1074e6, (2, 64, 32, 32), 2 / 64),
    ("fsp_loss", 28, 33, 537e6, (2, 32, 32, 32), 2 / 64),
    ("sp_loss", 13, 24, 4e6, (64, 256, 8, 8), 1),
    ("cc_repdistiller", 5, 11, None, (64, 128), 1),
    ("pkt_loss", 32, 35, None, (64, 256), 1),
    ("rkd_loss", 43, 57, 4.2e6, (64, 256), 1),
    ("kdsvd_loss", 243, 138, 16.8e6, (8, 64, 32, 32), 8 / 64),
]


@pytest.mark.parametrize(
    ("name", "forward", "backward", "largest", "shape", "part"), CASES, ids=[x[0] for x in CASES]
)
def test_baselines_are_no_straw_men(name, forward, backward, largest, shape, part):
    entry = LOSSES[name]
    inputs = entry.inputs(*shape)
    for student in ("student", *entry.learned):
        inputs[student].requires_grad_()
    with _Count() as count:
        value = entry.eager(**inputs, **entry.hyper)
    assert 0.8 * forward <= count.operators <= 1.2 * forward
    if largest:
        assert 0.8 * part * largest <= count.largest <= 1.2 * part * largest
    with _Count() as count:
        gradients(value, inputs, torch.ones_like(value))
    assert 0.8 * backward <= count.operators <= 1.2 * backward
