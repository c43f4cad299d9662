# SPDX-License-Identifier: Apache-2.0
"""Where a run stands, and the checkpoint that holds it.

A checkpoint is one file with whole tensors, however many processes wrote it; as many others, or
one, can go on from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from kdkernels.train import checkpoint
from kdkernels.train.devices import on_first
from kdkernels.train.errors import InputError


@dataclass
class State:
    """Where a run stands."""

    step: int = 0
    tally: dict[str, float] = field(default_factory=dict)  # sums over the epoch under way
    history: list[dict[str, Any]] = field(default_factory=list)  # one record per epoch
    best: dict[str, Any] | None = None  # epoch, accuracy and weights, by validation


def save(path: Path, state: State, parts: Mapping[str, Any], fabric: Fabric) -> None:
    """Checkpoint the state, every part's ``state_dict`` and each process's random numbers."""
    content = {name: whole(part.state_dict()) for name, part in parts.items()}
    content |= {"state": vars(state), "rng": _gathered(fabric, _random_state(fabric.device))}
    on_first(fabric, partial(checkpoint.save_state, path, content))


def restore(path: Path, parts: Mapping[str, Any], fabric: Fabric) -> State:
    """Put back what :func:`save` saved."""
    content = checkpoint.load_state(path)
    if missing := [name for name in parts if name not in content]:
        raise InputError(
            f"{path}: a checkpoint without {missing[0]!r}, as of another version; begin anew in "
            "another folder"
        )
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            load_weights(part, content[name])
        else:
            if isinstance(part, torch.optim.Optimizer):
                content[name]["state"] = _like_parameters(part, content[name]["state"])
            part.load_state_dict(content[name])
    # More processes than before share what random numbers there are.
    rng = content["rng"][fabric.global_rank % len(content["rng"])]
    torch.set_rng_state(rng["cpu"])
    if fabric.device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"], fabric.device)
    return State(**content["state"])


def whole(tree: Any) -> Any:
    """``tree`` with every tensor that processes have shards of put together: all must call this."""
    return tree_map_only(DTensor, DTensor.full_tensor, tree)


def load_weights(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Load whole weights into a module that may be sharded."""
    now = module.state_dict()
    module.load_state_dict({name: _like(value, now.get(name)) for name, value in weights.items()})


def _like(value: Any, model: Any) -> Any:
    """``value`` in shards, if ``model`` is, and of its shape."""
    if isinstance(model, DTensor) and isinstance(value, Tensor) and value.shape == model.shape:
        return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)
    return value


def _like_parameters(optimizer: torch.optim.Optimizer, states: dict[int, Any]) -> dict[int, Any]:
    parameters = [x for group in optimizer.param_groups for x in group["params"]]
    return {
        index: {name: _like(value, parameters[index]) for name, value in state.items()}
        for index, state in states.items()
    }


def _random_state(device: torch.device) -> dict[str, Tensor]:
    rng = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    return rng


def _gathered(fabric: Fabric, value: Any) -> list[Any]:
    values = [value] * fabric.world_size
    if fabric.world_size > 1:
        dist.all_gather_object(values, value)
    return values
