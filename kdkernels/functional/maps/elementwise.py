# SPDX-License-Identifier: Apache-2.0
"""What the losses over the elements of two maps share around their kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdkernels import backends, checks, reference
from kdkernels.functional.features import REDUCTIONS, pair, stages
from kdkernels.ops.features import call, compute_dtype
from kdkernels.ops.maps.elementwise import KINDS, Choices, Numbers

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _in_one_order(student: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """All of them dense as ``student`` is, or else contiguous; what is already so is not copied."""
    order = torch.contiguous_format
    last = _CHANNELS_LAST.get(student.dim())
    if last and not student.is_contiguous() and student.is_contiguous(memory_format=last):
        order = last
    return tuple(x if x is None else x.contiguous(memory_format=order) for x in (student, *others))


def run(
    name: str,
    kind: str,
    student: Tensor,  # (B, C, ...)
    teacher: Tensor,
    parameter: Tensor | None,  # broadcast to the maps; one per channel is differentiated
    factor: float,
    backend: str,
    margin: float = 1.0,
) -> Tensor:
    """``factor`` times the sum over the elements of validated maps of half a square each."""
    if parameter is not None:
        parameter = parameter.to(compute_dtype(student, teacher))
    numbers = Numbers(margin)
    chosen = backends.select("maps.elementwise", student.device.type, backend, name)
    if chosen == "reference":
        return reference.maps.elementwise(kind, student, teacher, parameter, factor, numbers)
    student, teacher, parameter = _in_one_order(student, teacher, parameter)
    choices = Choices(KINDS.index(kind))
    tensors = student, teacher, parameter
    return call(name, "maps.elementwise", chosen, tensors, factor, numbers, choices)


def mean(name: str, reduction: str, count: int) -> float:
    """The factor of a reduction whose mean divides by ``count``."""
    checks.choice(name, "reduction", reduction, REDUCTIONS)
    return 1.0 / max(count, 1) if reduction == "mean" else 1.0


def each_stage(
    name: str,
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    loss: Callable[..., Tensor],
    parameters: object = None,
    stage_weights: Sequence[float] | None = None,
) -> Tensor:
    """The sum over stages of ``loss(student, teacher, parameter, weight)``.

    ``parameters``: None, one for a single stage, or as many as there are stages.
    """
    pairs = stages(name, student, teacher)
    single = isinstance(student, Tensor)
    if parameters is None or single:
        parameters = [parameters] * len(pairs)
    elif not isinstance(parameters, Sequence) or len(parameters) != len(pairs):
        raise ValueError(f"{name}: there must be a parameter of each of {len(pairs)} stages.")
    if stage_weights is None:
        stage_weights = [1.0] * len(pairs)
    elif len(stage_weights) != len(pairs):
        raise ValueError(
            f"{name}: stage_weights must have one number for each of {len(pairs)} stages, got "
            f"{len(stage_weights)}."
        )
    total = None
    for (s, t), parameter, weight in zip(pairs, parameters, stage_weights, strict=True):
        value = loss(s, t, parameter, checks.number(name, "stage_weights", weight))
        total = value if total is None else total + value
    return total


def same_shape(name: str, student: Tensor, teacher: Tensor) -> None:
    pair(name, student, teacher, shape="(B, C, ...)")


def per_channel(name: str, argument: str, value: Tensor, student: Tensor) -> Tensor:
    """A floating-point tensor of C elements, as (1, C, 1, ...)."""
    checks.floats(name, argument, value)
    channels = student.shape[1]
    if value.numel() != channels:
        raise ValueError(
            f"{name}: {argument} must have one element for each of {channels} channels, got "
            f"{tuple(value.shape)}."
        )
    checks.same_device(name, argument, value, student)
    return value.reshape(1, channels, *[1] * (student.dim() - 2))
