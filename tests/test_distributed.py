# SPDX-License-Identifier: Apache-2.0
"""Losses with ``group``: two processes with DDP's averaging against one on the whole batch."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kdkernels.testing import LOSSES, Loss

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
GROUPED = [
    name
    for name, x in LOSSES.items()
    if "group" in inspect.signature(x.function).parameters
    and not x.family.startswith("contrast")  # has banks beside its rows: see test_contrast.py
]
# Rows of either rank: alike, an uneven last batch, and one of which nothing is left.
SPLITS = ((4, 4), (5, 3), (8, 0))


def _case(name, split, masked):
    """The loss of some rows as a function of shared parameters, and those of the whole batch."""
    loss = LOSSES[name]
    # Logits have 6 classes; embeddings and maps are as small as the entry's are in tests.
    rest = (6,) if loss.small == Loss.small else loss.small[1:]
    inputs = loss.inputs(sum(split), *rest, dtype=torch.float64)
    if masked:
        inputs["mask"] = torch.tensor([True, False, True, True, True, False, True, True])
    each = len(inputs["student"]) // sum(split)  # views of a sample
    width = inputs["student"].shape[-1]
    parameters = [torch.eye(width, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def value(rows, **options):
        own = {name: x.unflatten(0, (-1, each))[rows].flatten(0, 1) for name, x in inputs.items()}
        for name, parameter in zip(("student", "teacher"), parameters, strict=True):
            own[name] = own[name] @ parameter
        return loss(own, **options)

    return value, parameters


def _two_ranks(rank, rendezvous, names):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for name in names:
        for split in SPLITS:
            maskable = "mask" in inspect.signature(LOSSES[name].function).parameters
            for masked in (False, True) if maskable else (False,):
                value, parameters = _case(name, split, masked)
                whole = value(slice(None))
                wanted = torch.autograd.grad(whole, parameters)
                rows = slice(0, split[0]) if rank == 0 else slice(split[0], None)
                loss = value(rows, group=dist.group.WORLD)
                torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
                gradients = torch.autograd.grad(loss, parameters)
                for gradient, expected in zip(gradients, wanted, strict=True):
                    dist.all_reduce(gradient)
                    torch.testing.assert_close(gradient / 2, expected, rtol=1e-10, atol=1e-14)
    dist.destroy_process_group()


def test_two_ranks_are_one_process(tmp_path):
    mp.spawn(_two_ranks, (str(tmp_path / "rendezvous"), GROUPED), nprocs=2)


def _gather(rank, rendezvous):
    from kdkernels.distributed import gather_rows

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for split in ((0, 0), *SPLITS):
            everything = torch.arange(sum(split) * 3.0).reshape(-1, 3).to(dtype)
            own = everything[: split[0]] if rank == 0 else everything[split[0] :]
            own.requires_grad_()
            counts = own[:, 0] > 4
            rows, mask, none = gather_rows(dist.group.WORLD, own, counts, None)
            assert torch.equal(rows, everything) and none is None
            assert torch.equal(mask, everything[:, 0] > 4)
            (gradient,) = torch.autograd.grad((rows * everything).sum(), own)
            assert torch.equal(gradient, 2 * own if sum(split) else own)
    dist.destroy_process_group()


def test_gather_rows(tmp_path):
    mp.spawn(_gather, (str(tmp_path / "rendezvous"),), nprocs=2)
