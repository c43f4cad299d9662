# SPDX-License-Identifier: Apache-2.0
"""The baselines of losses over features cost what the suites' own code does."""

from __future__ import annotations

import pytest
import torch
from counting import Count

from kdkernels.testing import LOSSES


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
    with Count() as count:
        value = loss.eager(**inputs, **loss.hyper)
    found = count.operators
    with Count() as count:
        torch.autograd.grad(value, leaves)
    assert 0.8 * forward <= found <= 1.2 * forward
    assert 0.8 * backward <= count.operators <= 1.2 * backward
    assert 0.8 * largest <= count.largest <= 1.2 * largest


# Likewise, counted at a smaller batch that makes this part of the largest temporary; None where
# none was measured.
@pytest.mark.parametrize(
    ("name", "shape", "forward", "backward", "largest", "part"),
    [
        ("nst_loss", (2, 64, 32, 32), 66, 98, 1074e6, 2 / 64),
        ("fsp_loss", (2, 32, 32, 32), 28, 33, 537e6, 2 / 64),
        ("sp_loss", (64, 256, 8, 8), 13, 24, 4e6, 1),
        ("cc_repdistiller", (64, 128), 5, 11, None, 1),
        ("pkt_loss", (64, 256), 32, 35, None, 1),
        ("rkd_loss", (64, 256), 43, 57, 4.2e6, 1),
        ("kdsvd_loss", (8, 64, 32, 32), 243, 138, 16.8e6, 8 / 64),
    ],
)
def test_baselines_of_relations(name, shape, forward, backward, largest, part):
    loss = LOSSES[name]
    inputs = loss.inputs(*shape)
    leaves = [inputs[side].requires_grad_() for side in ("student", *loss.learned)]
    with Count() as count:
        value = loss.eager(**inputs, **loss.hyper)
    assert 0.8 * forward <= count.operators <= 1.2 * forward
    if largest:
        assert 0.8 * part * largest <= count.largest <= 1.2 * part * largest
    with Count() as count:
        torch.autograd.grad(value, leaves)
    assert 0.8 * backward <= count.operators <= 1.2 * backward
