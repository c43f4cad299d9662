# SPDX-License-Identifier: Apache-2.0
"""The devices and processes a run is on, and the precision it computes in."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard

from kdkernels.train.config import Config
from kdkernels.train.data import Dataset, LoaderData, LoaderSplit, Split
from kdkernels.train.errors import InputError
from kdkernels.train.metrics import predict

T = TypeVar("T")


def make_fabric(config: Config) -> Fabric:
    """The processes and the precision asked for; ``auto`` is :func:`native_precision`.

    Under torchrun the processes are those it started.
    """
    # Fabric would repeat what the run says itself.
    logging.getLogger("lightning_fabric.utilities.rank_zero").setLevel(logging.WARNING)
    devices, nodes = config.devices, 1
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    try:
        device = Fabric(accelerator=config.accelerator, devices=1).device
        precision = config.precision
        if precision == "auto":
            precision = native_precision(device)
        if precision == "16-mixed" and device.type == "cpu":
            raise ValueError("float16 needs a GPU; bf16-mixed does not")
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=devices,
            num_nodes=nodes,
            precision=precision,
            strategy=_strategy(config.strategy, devices * nodes),
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"--accelerator {config.accelerator} --devices {config.devices} --precision "
            f"{config.precision}: {error}"
        ) from error
    if devices * nodes > 1:
        fabric.launch()
    return fabric


def _strategy(name: str, processes: int) -> str | DDPStrategy | ModelParallelStrategy:
    if processes == 1:
        return "auto"
    if name == "ddp":
        # Buffers are made equal where they are read (share_buffers); a method's memory bank is
        # equal anyway, and too large to be sent at every step.
        return DDPStrategy(find_unused_parameters=True, broadcast_buffers=False)
    return ModelParallelStrategy(_shard, data_parallel_size=processes, tensor_parallel_size=1)


def _shard(learner: nn.Module, mesh: dist.DeviceMesh) -> nn.Module:
    """Every process keeps its part of each block, and of the rest as one more block."""
    for block in _blocks(learner.student.network):
        fully_shard(block, mesh=mesh["data_parallel"])
    return fully_shard(learner, mesh=mesh["data_parallel"])


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child) in (nn.Sequential, nn.ModuleList):
            yield from _blocks(child)
        elif any(True for _ in child.parameters()):
            yield child


def native_precision(device: torch.device) -> str:
    """``bf16-mixed`` where matrices of bfloat16 are multiplied in hardware, else ``32-true``.

    That is GPUs from Ampere on, and CPUs with AMX, AVX512-BF16 or ARM's BF16. Where older CPUs take
    bfloat16 at all, they convert it to float32, and lose time.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(has.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return "bf16-mixed" if native else "32-true"


def on_first(fabric: Fabric, do: Callable[[], T]) -> T:
    """Have the first process ``do`` something: every process gets its result, or its error."""
    result = error = None
    if fabric.is_global_zero:
        try:
            result = do()
        except Exception as raised:
            if fabric.world_size == 1:
                raise
            error = raised
    result, error = fabric.broadcast((result, error))
    if error is not None:
        raise error
    return result


def predict_together(
    fabric: Fabric, model: nn.Module, data: Dataset | LoaderData, split: Split | LoaderSplit
) -> tuple[Tensor, Tensor]:
    """:func:`predict` with the split shared among the processes; each gets all of the result."""
    if fabric.world_size == 1:
        return predict(model, data, split, fabric.device)
    size = math.ceil(len(split) / fabric.world_size)
    # Equal shares, since all take part in every collective: the last ones begin anew.
    own = np.arange(fabric.global_rank, size * fabric.world_size, fabric.world_size) % len(split)
    part = replace(split, rows=split.rows[own])
    gathered = map(fabric.all_gather, predict(model, data, part, fabric.device))
    logits, labels = (x.transpose(0, 1).flatten(0, 1)[: len(split)] for x in gathered)
    return logits, labels


def share_buffers(fabric: Fabric, *modules: nn.Module) -> None:
    """Give every process the mean of all processes' buffers: statistics of their own samples."""
    if fabric.world_size > 1:
        for buffer in (buffer for module in modules for buffer in module.buffers()):
            if buffer.is_floating_point():
                buffer.copy_(fabric.all_reduce(buffer, reduce_op="mean"))


def seed_process(fabric: Fabric, seed: int) -> None:
    """Random numbers of its own for each process but the first, which stays as it is."""
    if fabric.global_rank:
        own = np.random.SeedSequence((seed, fabric.global_rank))
        torch.manual_seed(int(own.generate_state(1)[0]))


@contextmanager
def unsharded(learner: nn.Module) -> Iterator[None]:
    """The method's parameters as they are, for use outside of the learner's ``forward``."""
    if not isinstance(learner, FSDPModule):
        yield
        return
    learner.unshard()
    yield
    learner.reshard()
