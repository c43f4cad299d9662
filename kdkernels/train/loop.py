# SPDX-License-Identifier: Apache-2.0
"""The training loop: one student, one seed, top to bottom.

Nothing here knows a method: each takes part through the hooks of ``methods.Method`` and of its
``methods.Course``. What changes from step to step is the student, the method, the optimizer,
torch's random state and ``State``; a checkpoint holds these and nothing else, because batches and
learning rates are functions of the step: but for a user's loader, whose own generators are kept
with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric
from torch import distributed as dist
from torch import nn

from kdkernels.train import predictions, report, teacher_cache
from kdkernels.train.average import Average
from kdkernels.train.clock import StepClock
from kdkernels.train.config import Config
from kdkernels.train.data import Batches, Dataset, LoaderBatches, LoaderData
from kdkernels.train.devices import (
    on_first,
    predict_together,
    seed_process,
    share_buffers,
    unsharded,
)
from kdkernels.train.learner import Learner, acquaint
from kdkernels.train.logs import Log
from kdkernels.train.methods import Method, Run
from kdkernels.train.metrics import accuracy, measure
from kdkernels.train.optimizer import make_optimizer, set_lr
from kdkernels.train.records import Tally, close_epoch, require_finite, results
from kdkernels.train.state import State, load_weights, restore, save

# Steps after which losses and their gradients are looked at: seldom enough to cost nothing, and
# what is no number ends a run long before the end of a long epoch.
READ_EVERY = 100


def fit(
    fabric: Fabric,
    method: Method,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    data: Dataset | LoaderData,
    config: Config,
    *,
    seed: int,
    out: Path,
    label: str = "",
) -> dict[str, Any]:
    """Train ``student``, leave it with the weights of its best epoch, and return the results.

    ``label`` is what its log lines begin with, if not the method, the student and the seed.
    ``teachers`` are frozen; the student is measured against the first. Writes
    ``checkpoint.pt`` and ``log.jsonl`` into ``out`` and goes on from a checkpoint found there.
    """
    device, predict = fabric.device, partial(predict_together, fabric)
    batches = batches_of(data, config, seed, fabric)
    last_step = min(config.epochs * batches.per_epoch, config.max_steps or math.inf)
    group = dist.group.WORLD if fabric.world_size > 1 else None
    method.begin(Run(data, last_step, batches.per_epoch, group))
    course = method.course
    trained = course.wrap(student)
    average = Average(fabric, trained, config.ema) if config.ema else None
    network, teachers = acquaint(fabric, method, trained, teachers, data)
    if config.compile:
        as_they_are = config.teacher_cache or device.type == "cpu"
        for tapped in (network, *(() if as_they_are else (t.network for t in teachers))):
            tapped.compile()
    learner = Learner(fabric, network, method)
    model = fabric.setup_module(learner)
    optimizer = fabric.setup_optimizers(make_optimizer(trained, method, config))

    seed_process(fabric, seed)
    state = State()
    checkpointed = {"student": trained, "method": method, "optimizer": optimizer}
    checkpointed |= {"average": average} if average else {}
    checkpointed["precision"] = fabric.strategy.precision
    checkpointed |= {"loader": batches} if isinstance(batches, LoaderBatches) else {}
    if (out / "checkpoint.pt").exists():
        state = restore(out / "checkpoint.pt", checkpointed, fabric)

    answers = teachers
    if config.teacher_cache:
        answers = teacher_cache.prepare(teachers, method, batches, config, last_step)
    evaluated = average.network if average else model
    # Of some classes only, a teacher is no measure of the student.
    judged = teachers and course.specialities(len(data.classes))[0] == range(len(data.classes))
    teacher_val = predict(teachers[0], data, data.val)[0] if judged else None
    board = config.tensorboard and fabric.is_global_zero
    label = label or f"{config.method} {config.student} seed {seed}"
    epochs = math.ceil(last_step / batches.per_epoch)
    log = Log(out, state.history, label=label, epochs=epochs, tensorboard=board)
    clock, tally = StepClock(device), Tally(fabric, config.accumulate)

    with report.progress(label, state.step, last_step) as advance:
        while state.step < last_step:
            epoch, position = divmod(state.step, batches.per_epoch)
            if position == 0 and course.on_boundary(epoch, trained):
                optimizer.state.clear()
            clock.step_starts()
            set_lr(optimizer, config.schedule, course.progress(state.step))
            for part in range(config.accumulate):
                share = fabric.global_rank * config.accumulate + part
                batch = course.batch(batches, state.step, share)
                teacher_out = answers(batch, course.teachers(state.step))
                measured = position % READ_EVERY == 0
                losses = partial(learner.losses, batch, teacher_out, state.step, clock, measured)
                unfinished = part + 1 < config.accumulate
                with fabric.no_backward_sync(model, enabled=unfinished):
                    loss, terms, norms = model(batch.images, losses)
                    fabric.backward(loss / config.accumulate)
                tally.add(state.step, terms | {"loss": loss}, norms)
            if config.clip_norm:
                fabric.clip_gradients(
                    model, optimizer, max_norm=config.clip_norm, error_if_nonfinite=False
                )
            optimizer.step()
            optimizer.zero_grad()
            if average:
                average.update(trained, state.step)
            clock.step_ends()
            state.step += 1
            advance()

            epoch_ends = state.step % batches.per_epoch == 0 or state.step == last_step
            saves = epoch_ends or (
                config.checkpoint_every and state.step % config.checkpoint_every == 0
            )
            if saves or state.step % READ_EVERY == 0:
                tally.read_into(state, clock)
            if saves:
                share_buffers(fabric, trained, *([average.student] if average else []))
                require_finite(trained, state.step)
            if epoch_ends:
                logits, labels = predict(evaluated, data, data.val)
                validation = measure(logits, labels, teacher_val)
                with unsharded(learner):
                    validation |= method.measure(logits, labels, teacher_val)
                candidate = average.student if average else trained
                close_epoch(
                    state,
                    epoch,
                    validation,
                    course.unwrap(candidate) if course.selectable(epoch) else None,
                    lr=optimizer.param_groups[0]["lr"],
                    batch_size=batches.batch_size,
                )
                on_first(fabric, partial(log.write, state.history, course.stage(epoch)))
            if saves:
                save(out / "checkpoint.pt", state, checkpointed, fabric)

    log.close()

    # Test images: read only now, when nothing is left to choose.
    last_accuracy = accuracy(*predict(evaluated, data, data.test))
    load_weights(student, state.best["weights"])
    teacher_test = predict(teachers[0], data, data.test)[0] if judged else None
    logits, labels = predict(model, data, data.test)
    test = measure(logits, labels, teacher_test)
    kept = partial(predictions.save, out / "test.npz", data, logits, labels, teacher_test)
    on_first(fabric, kept)
    size = sum(parameter.numel() for parameter in student.parameters())
    about = {"seed": seed, "model": config.student, "parameters": size}
    return about | results(state, test, last_accuracy) | answers.cost


def batches_of(
    data: Dataset | LoaderData, config: Config, seed: int, fabric: Fabric
) -> Batches | LoaderBatches:
    """The training batches, one for every step."""
    if isinstance(data, LoaderData):
        return LoaderBatches(data, fabric.device)
    return Batches(
        data,
        batch_size=config.batch_size,
        augment=config.augment,
        augment_seed=config.augment_seed,
        distinct_views=config.cache_views,
        mixup=config.mixup,
        seed=seed,
        device=fabric.device,
        shares=config.accumulate * fabric.world_size,
    )
