# SPDX-License-Identifier: Apache-2.0
"""The training loop: one student, one seed, top to bottom.

Nothing here knows a method: each takes part through the hooks of ``methods.Method``. What changes
from step to step is the student, the method, the optimizer, torch's random state and ``State``; a
checkpoint holds these and nothing else, because batches and learning rates are functions of the
step.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from kdkernels.train import checkpoint, report
from kdkernels.train.clock import StepClock
from kdkernels.train.config import Config
from kdkernels.train.data import Batches, Dataset
from kdkernels.train.errors import DivergedError
from kdkernels.train.methods import Method
from kdkernels.train.metrics import accuracy, measure, predict
from kdkernels.train.taps import Tapped
from kdkernels.train.teachers import Teachers

MOMENTUM = 0.9
# The multistep schedule: a tenth of the learning rate after each of these shares of the steps.
MILESTONES = (5 / 8, 6 / 8, 7 / 8)


@dataclass
class State:
    """Where a run stands."""

    step: int = 0
    tally: dict[str, float] = field(default_factory=dict)  # sums over the epoch under way
    history: list[dict[str, Any]] = field(default_factory=list)  # one record per epoch
    best: dict[str, Any] | None = None  # epoch, accuracy and weights, by validation


def fit(
    fabric: Fabric,
    method: Method,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    data: Dataset,
    config: Config,
    *,
    seed: int,
    out: Path,
) -> dict[str, Any]:
    """Train ``student``, leave it with the weights of its best epoch, and return the results.

    ``teachers`` are frozen; the student is measured against the first. Writes
    ``checkpoint.pt`` and ``log.jsonl`` into ``out`` and goes on from a checkpoint found there.
    """
    device = fabric.device
    student_taps, *teacher_taps = method.taps(student, teachers)
    network = Tapped(student, student_taps, what="student")
    teachers = Teachers(fabric, teachers, teacher_taps)
    dry_run(method, network, teachers, data, device)
    batches = Batches(
        data,
        batch_size=config.batch_size,
        augment=config.augment,
        mixup=config.mixup,
        seed=seed,
        device=device,
    )
    last_step = min(config.epochs * batches.per_epoch, config.max_steps or math.inf)
    optimizer = torch.optim.SGD(
        [
            {"params": list(student.parameters())},
            *(scaled_lr(group, config.lr) for group in method.parameter_groups()),
        ],
        lr=config.lr,
        momentum=MOMENTUM,
        nesterov=True,
        weight_decay=config.weight_decay,
    )
    base_lr = [group["lr"] for group in optimizer.param_groups]
    model, optimizer = fabric.setup(network, optimizer)

    state = State()
    checkpointed = {"student": student, "method": method, "optimizer": optimizer}
    checkpointed["precision"] = fabric.strategy.precision
    if (out / "checkpoint.pt").exists():
        state = restore(out / "checkpoint.pt", checkpointed, device)

    teacher_val = predict(teachers[0], data, data.val, device)[0] if teachers else None
    clock = StepClock(device)
    sums: Counter[str] = Counter()

    label = f"{config.method} {config.student} seed {seed}"
    with report.progress(label, state.step, last_step) as advance:
        while state.step < last_step:
            epoch, position = divmod(state.step, batches.per_epoch)
            if position == 0:
                method.on_boundary(epoch)
            clock.mark()
            factor = lr_factor(config.schedule, state.step / last_step)
            for group, lr in zip(optimizer.param_groups, base_lr, strict=True):
                group["lr"] = lr * factor

            batch = batches(state.step)
            teacher_out = teachers(batch, method.teachers(state.step))
            student_out = model(batch.images)
            clock.loss_starts(student_out.logits)
            terms = method.losses(batch, student_out, method.teach(batch, teacher_out))
            loss = weighted_sum(terms, method.weights(state.step))
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            clock.mark()

            # Kept on the device: reading a loss at every step would make a GPU wait for it.
            sums.update({name: term.detach() for name, term in terms.items()})
            sums.update(steps=1, loss=loss.detach())
            state.step += 1
            advance()

            epoch_ends = state.step % batches.per_epoch == 0 or state.step == last_step
            if epoch_ends or (
                config.checkpoint_every and state.step % config.checkpoint_every == 0
            ):
                sums["seconds"], sums["loss_seconds"] = clock.read()
                add_to_tally(state, sums)
                if epoch_ends:
                    logits, labels = predict(model, data, data.val, device)
                    validation = measure(logits, labels, teacher_val)
                    if teacher_val is not None:
                        validation |= method.measure(logits, teacher_val)
                    close_epoch(
                        state,
                        epoch,
                        validation,
                        student,
                        lr=optimizer.param_groups[0]["lr"],
                        batch_size=batches.batch_size,
                    )
                    checkpoint.write_lines(out / "log.jsonl", state.history)
                save(out / "checkpoint.pt", state, checkpointed, device)

    # Test images: read only now, when nothing is left to choose.
    last_accuracy = accuracy(*predict(model, data, data.test, device))
    student.load_state_dict(state.best["weights"])
    teacher_test = predict(teachers[0], data, data.test, device)[0] if teachers else None
    test = measure(*predict(model, data, data.test, device), teacher_test)
    return results(state, test, last_accuracy)


def dry_run(
    method: Method,
    student: nn.Module,
    teachers: Teachers,
    data: Dataset,
    device: torch.device,
) -> None:
    """Show the method two images' outputs, and put what it makes of their shapes on the device."""
    height, width, channels = data.shape
    images = torch.zeros(2, channels, height, width)
    training = student.training
    with torch.no_grad():
        outputs = [student.eval()(images), *(t(images.to(device)) for t in teachers)]
    student.train(training)
    method.setup(outputs[0], outputs[1:])
    method.to(device)


def scaled_lr(group: dict[str, Any], lr: float) -> dict[str, Any]:
    """A method's parameter group at its ``lr_scale`` times the student's learning rate."""
    own = {name: value for name, value in group.items() if name != "lr_scale"}
    return own | {"lr": lr * group.get("lr_scale", 1.0)}


def lr_factor(schedule: str, progress: float) -> float:
    """Share of the initial learning rate after ``progress`` (0 to 1) of the steps."""
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 0.1 ** sum(progress >= milestone for milestone in MILESTONES)


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of the terms; a lone term of weight 1 is handed on as it is, without an operation."""
    weighted = [weights[name] * term if name in weights else term for name, term in terms.items()]
    return functools.reduce(torch.add, weighted)


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
