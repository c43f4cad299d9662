# SPDX-License-Identifier: Apache-2.0
"""What a run notes of its steps, epochs and end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from kdkernels.train.clock import StepClock
from kdkernels.train.errors import DivergedError
from kdkernels.train.state import State, whole

# What a tally calls the gradient norms of terms, which not every step has.
NORM_OF = "gradient norm of "


class Tally:
    """Losses and their terms, kept on the device until read: reading makes a GPU wait.

    With several processes a value is the mean of theirs.
    """

    def __init__(self, fabric: Fabric, shares: int) -> None:
        self.fabric, self.shares = fabric, shares
        self._values: list[tuple[int, str, Tensor]] = []

    def add(self, step: int, values: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
        """Note values of one of the ``shares`` of a step, counted from 0, and gradient norms."""
        values = {**values, **{NORM_OF + name: value for name, value in norms.items()}}
        self._values += [(step, name, value.detach()) for name, value in values.items()]

    def read_into(self, state: State, clock: StepClock) -> None:
        """Add what came since the last reading, unless some of it is not finite."""
        values = torch.stack([value.double() for _, _, value in self._values])
        values = self.fabric.all_reduce(values, reduce_op="mean").tolist()
        noted = [
            (step, name, value) for (step, name, _), value in zip(self._values, values, strict=True)
        ]
        self._values.clear()
        if broken := [(step, name) for step, name, value in noted if not math.isfinite(value)]:
            first = broken[0][0]
            names = dict.fromkeys(name for step, name in broken if step == first)
            raise DivergedError(
                f"{', '.join(names)} not finite in step {first + 1}; what was checkpointed "
                f"before is kept (a smaller --lr may help, or --clip-norm)"
            )
        for _, name, value in noted:
            state.tally[name] = state.tally.get(name, 0.0) + value / self.shares
        seconds, loss_seconds = clock.read()
        for name, value in {
            "steps": len({step for step, _, _ in noted}),
            "measured": len({step for step, name, _ in noted if name.startswith(NORM_OF)}),
            "seconds": seconds,
            "loss_seconds": loss_seconds,
        }.items():
            state.tally[name] = state.tally.get(name, 0.0) + value


def require_finite(student: nn.Module, step: int) -> None:
    """Refuse weights that are no numbers, which the losses of ``step`` cannot have shown yet."""
    state = whole(student.state_dict())
    finite = torch.stack([value.isfinite().all() for value in state.values()]).tolist()
    if broken := [name for name, good in zip(state, finite, strict=True) if not good]:
        raise DivergedError(
            f"weights not finite after step {step}: {', '.join(broken[:3])}; what was "
            f"checkpointed before is kept (a smaller --lr may help, or --clip-norm)"
        )


def close_epoch(
    state: State,
    epoch: int,
    validation: dict[str, float],
    student: nn.Module | None,
    *,
    lr: float,
    batch_size: int,
) -> None:
    """Turn the tally into a record of the epoch, and keep the weights if it is the best so far.

    Without a ``student``, it cannot be the best.
    """
    tally, state.tally = state.tally, {}
    steps, seconds = tally.pop("steps"), tally.pop("seconds")
    loss_seconds, measured = tally.pop("loss_seconds"), tally.pop("measured")
    norms = {
        name.removeprefix(NORM_OF): tally.pop(name) / measured
        for name in list(tally)
        if name.startswith(NORM_OF)
    }
    state.history.append(
        {
            "epoch": epoch + 1,
            "step": state.step,
            "lr": lr,
            "train": {name: total / steps for name, total in tally.items()},
            "gradient_norms": norms,
            "val": validation,
            "samples_per_second": steps * batch_size / seconds,
            "loss_share": loss_seconds / seconds,
            "loss_ms": 1000 * loss_seconds / steps,
        }
    )
    if student and (state.best is None or validation["accuracy"] > state.best["accuracy"]):
        weights = {
            name: value.detach().cpu().clone()
            for name, value in whole(student.state_dict()).items()
        }
        state.best = {"epoch": epoch + 1, "accuracy": validation["accuracy"], "weights": weights}


def results(state: State, test: dict[str, float], last_accuracy: float) -> dict[str, Any]:
    """Summary of a finished run; rates are medians over epochs: a slow one cannot move them."""
    val = [record["val"]["accuracy"] for record in state.history]

    def median(name: str) -> float:
        return statistics.median(record[name] for record in state.history)

    return {
        "steps": state.step,
        "epochs": len(state.history),
        "val": {
            "best": state.best["accuracy"],
            "best_epoch": state.best["epoch"],
            "last": val[-1],
            "mean_of_last_10": statistics.fmean(val[-10:]),
        },
        "test": test | {"accuracy_of_last_epoch": last_accuracy},
        "samples_per_second": median("samples_per_second"),
        "loss_share": median("loss_share"),
        "loss_ms": median("loss_ms"),
    }
