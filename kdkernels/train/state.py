# SPDX-License-Identifier: Apache-2.0
"""Where a run stands, and the checkpoint that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kdkernels.train import checkpoint


@dataclass
class State:
    """Where a run stands."""

    step: int = 0
    tally: dict[str, float] = field(default_factory=dict)  # sums over the epoch under way
    history: list[dict[str, Any]] = field(default_factory=list)  # one record per epoch
    best: dict[str, Any] | None = None  # epoch, accuracy and weights, by validation


def save(path: Path, state: State, parts: Mapping[str, Any], device: torch.device) -> None:
    """Checkpoint the state, every part's ``state_dict`` and torch's random numbers."""
    content = {name: part.state_dict() for name, part in parts.items()}
    rng = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    checkpoint.save_state(path, content | {"state": vars(state), "rng": rng})


def restore(path: Path, parts: Mapping[str, Any], device: torch.device) -> State:
    """Put back what :func:`save` saved."""
    content = checkpoint.load_state(path)
    for name, part in parts.items():
        part.load_state_dict(content[name])
    torch.set_rng_state(content["rng"]["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(content["rng"]["cuda"], device)
    return State(**content["state"])
