# SPDX-License-Identifier: Apache-2.0
"""What a run notes of its steps, epochs and end."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from typing import Any

from torch import nn

from kdkernels.train.errors import DivergedError
from kdkernels.train.state import State


def add_to_tally(state: State, sums: Counter[str]) -> None:
    """Move the sums of the last steps into the state, unless one of them is not finite."""
    tally = {name: float(value) for name, value in sums.items()}
    sums.clear()
    broken = [name for name, value in tally.items() if not math.isfinite(value)]
    if broken:
        first = state.step - int(tally["steps"]) + 1
        raise DivergedError(
            f"{', '.join(broken)} not finite within steps {first} to {state.step}; the checkpoint "
            f"before them is kept (a smaller --lr may help)"
        )
    for name, value in tally.items():
        state.tally[name] = state.tally.get(name, 0.0) + value


def close_epoch(
    state: State,
    epoch: int,
    validation: dict[str, float],
    student: nn.Module,
    *,
    lr: float,
    batch_size: int,
) -> None:
    """Turn the tally into a record of the epoch, and keep the weights if it is the best so far."""
    tally, state.tally = state.tally, {}
    steps, seconds = tally.pop("steps"), tally.pop("seconds")
    loss_seconds = tally.pop("loss_seconds")
    state.history.append(
        {
            "epoch": epoch + 1,
            "step": state.step,
            "lr": lr,
            "train": {name: total / steps for name, total in tally.items()},
            "val": validation,
            "samples_per_second": steps * batch_size / seconds,
            "loss_share": loss_seconds / seconds,
            "loss_ms": 1000 * loss_seconds / steps,
        }
    )
    if state.best is None or validation["accuracy"] > state.best["accuracy"]:
        weights = {
            name: value.detach().cpu().clone() for name, value in student.state_dict().items()
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
