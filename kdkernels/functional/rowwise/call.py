# SPDX-License-Identifier: Apache-2.0
"""From a function's arguments to the kernel of the family."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import checks, divergences, ops, reference
from kdkernels.divergences import Choices, Numbers
from kdkernels.functional.rows import prepare
from kdkernels.ops.rowwise import compute_dtype


def run(
    name, kind, student, teacher, labels, temperature, teacher_temperature, scale, reduction,
    mask, ignore_index, row_weight, standardize, class_range, inplace, backend, *, alpha=0.0,
    beta=0.0, kd_weight=1.0, ce_weight=0.0, label_smoothing=0.0, target="ordinary",
    target_weight=0.0, target_temperature=0.0, parts=False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Validate, choose the backend, call."""
    first, width = 0, 0
    if class_range is None:
        checks.logits(name, student, teacher)
    else:
        first, width = checks.class_range(name, class_range, student)
        narrow = target not in ("separate", "weighting")  # else its softmax needs every class
        checks.logits(name, student, teacher, width if narrow else None)
    checks.flag(name, "standardize", standardize)
    rows = prepare(
        name, "rowwise", student, compute_dtype(student, teacher), labels, temperature,
        teacher_temperature, scale, reduction, mask, ignore_index, row_weight, backend,
    )  # fmt: skip
    targets = None
    if target != "ordinary":
        if labels is None:
            raise TypeError(f"{name}: labels must be a tensor, got None.")
        # Of label probabilities, the most probable class.
        if rows.labels.dtype != torch.int64:
            targets = rows.labels.argmax(-1).reshape(-1)
        if width and target != "weighting":  # whose target is at temperature 1
            checks.targets(name, rows, targets, first, width, ignore_index)
    numbers = Numbers(
        rows.temperature, rows.teacher_temperature, kd_weight, ce_weight, label_smoothing, alpha,
        beta, target_weight, target_temperature,
    )  # fmt: skip
    choices = Choices(
        divergences.KINDS.index(kind), rows.t2, rows.reduction, ignore_index,
        divergences.TARGETS.index(target), standardize, first, width,
    )  # fmt: skip
    if inplace:
        others = {"teacher": teacher, "labels": labels, "mask": mask, "row_weight": row_weight}
        checks.inplace(name, student, others)
    if rows.backend == "reference":
        if inplace:
            raise NotImplementedError(f"{name}: inplace=True needs a kernel, not the reference.")
        return reference.rowwise(student, teacher, rows, targets, numbers, choices, parts)
    try:
        return ops.rowwise.apply(
            name, rows.backend, student, teacher, rows, targets, numbers, choices, inplace, parts
        )
    except RuntimeError as error:
        checks.raise_for_labels(name, error)
        raise
