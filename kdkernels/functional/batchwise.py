# SPDX-License-Identifier: Apache-2.0
"""Losses that relate the rows of a batch to each other: all of them enter one number.

Arguments that the functions here share:

    student: logits ``(..., C)``; the leading dimensions are the batch's N rows. fp64, fp32, bf16 or
        fp16, any strides. Classes that are not last are moved there: ``x.movedim(1, -1)`` for maps
        ``(N, C, H, W)``, each pixel a row; no copy is made.
    teacher: logits of the same shape; its dtype may differ.
    labels: class indices ``(...)``; they only mask, by ``ignore_index``.
    mask: bool ``(...)``, True where the row takes part. Other rows are as if they were not there.
    ignore_index: rows with this label take no part.
    group: the rows of all ranks of this process group take part; every rank gets the same loss, and
        the gradient that DDP's averaging turns into that of one process on the whole batch. Ranks
        may have different numbers of rows. Each rank checks its own arguments first: one that
        raises leaves the others waiting in the collective, until the group's timeout, as with any
        error on one rank. Without it a loss sees its own rank's rows alone. Not
        under ``torch.compile(fullgraph=True)``.
    backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; anything but
        ``"auto"`` raises where it cannot run.

They return the loss, fp32 (fp64 if either side is), 0-d, and differentiate to student and teacher
in each one's dtype, where these require a gradient. A second derivative, or a ``torch.func``
transform, needs ``backend="reference"``.

No row takes part: 0, with zero gradients. A class at -inf has probability 0 and takes part as such.
NaN only from NaN or +inf logits, or a row without a finite class; as everything is related, one
such row makes the loss and every gradient NaN.

Raises ``ValueError`` for a shape or value out of range, ``TypeError`` for a dtype,
``NotImplementedError`` for a meaningful combination that is not supported, ``RuntimeError`` where
the demanded backend cannot run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdkernels import backends, checks, divergences, ops, reference
from kdkernels.functional import rules
from kdkernels.functional.rowwise import kl_div
from kdkernels.ops.batchwise import MOST_TEMPERATURES, DistChoices, DistNumbers, Relations
from kdkernels.ops.rowwise import compute_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["dist_loss", "mlkd_loss"]


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    scale: str = "t2",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    group: ProcessGroup | None = None,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """DIST (arXiv 2205.10536): Pearson correlations of the probabilities, by rows and by columns.

    With ``P = softmax(student / T)`` and ``Q`` the teacher's: ``T^2 (beta inter + gamma intra)``,
    where ``inter`` is 1 less the mean over rows of ``corr(P_i, Q_i)`` and ``intra`` 1 less the mean
    over classes of ``corr(P_:k, Q_:k)``; ``corr = <a, b> / (|a| |b| + 1e-8)`` of the centred
    vectors. ``beta=0`` or ``gamma=0`` leaves one of them. ``scale="none"`` leaves out ``T^2``.

    ``temperature`` is a number or a tensor of one element, to which the loss is differentiated as
    well. A constant vector (all logits of a row equal, a batch of one) has correlation 0; its
    gradient is the formula's, ``b / 1e-8`` along the other side's ``b``, unless that is constant
    too: then it is 0.

    On a CPU both sides' probabilities of up to 2^20 logits are kept for the time of the call: twice
    the logits, in the type that is accumulated in. Of more, and on a GPU, they are computed again.

    compat:
        ``"paper"`` (also ``"image_classification_sota"``, ``"mmrazor"``): as above.
        ``"torchdistill"``: norms below 1e-8 are raised to it, and nothing is added.
    """
    name = "dist_loss"
    checks.choice(
        name, "compat", compat, ("paper", "image_classification_sota", "mmrazor", "torchdistill")
    )
    checks.choice(name, "scale", scale, divergences.SCALES)
    checks.logits(name, student, teacher)
    value, tensor = checks.temperature(
        name, "temperature", temperature, student, compute_dtype(student, teacher)
    )
    if tensor is not None and tensor.numel() != 1:
        raise NotImplementedError(
            f"{name}: temperature must be a number or have one element, got {tuple(tensor.shape)}; "
            "divide the logits outside."
        )
    numbers = DistNumbers(
        value, checks.number(name, "beta", beta), checks.number(name, "gamma", gamma)
    )
    choices = DistChoices(scale == "t2", compat == "torchdistill")
    student, teacher, mask, backend = _prepare(
        name, "dist", student, teacher, labels, mask, ignore_index, group, backend
    )
    if backend == "reference":
        return reference.dist(student, teacher, mask, tensor, numbers, choices)
    return ops.batchwise.dist(backend, student, teacher, mask, tensor, numbers, choices)


def mlkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperatures: Sequence[float] = (4.0, 3.0, 5.0, 2.0, 6.0),
    instance_weight: float = 1.0,
    batch_weight: float = 1.0,
    class_weight: float = 1.0,
    selection: str = "median",
    standardize: bool = False,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    group: ProcessGroup | None = None,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Multi-level logit distillation (CVPR 2023) of one view, at several temperatures at once.

    With ``P`` and ``Q`` the probabilities (N, C) at ``T``, the sum over ``temperatures`` of

    * ``instance_weight T^2 / N sum_i KL(Q_i || P_i)``,
    * ``batch_weight / N || P P' - Q Q' ||^2``: the samples among each other,
    * ``class_weight / C || P' P - Q' Q ||^2``: the classes among each other.

    ``selection="median"`` takes the samples whose largest probability in the teacher (at T = 1) is
    at most the batch's median, and the classes whose sum of them is at most the classes' median:
    terms, and entries of the squared differences, of others are left out. ``"none"`` takes all. The
    selection is a constant to the gradient. ``standardize`` takes the z-score of every row's logits
    over its finite classes before the KL, and only there (arXiv 2403.01427). Then, and where the
    teacher requires a gradient, the KLs are as many calls of :func:`kl_div`; else all temperatures
    come from one read of the logits. Extra memory: 2 numbers per logit and temperature.

    compat:
        ``"paper"``: as above.
        ``"mlkd"``: what the published code computes. Its masks multiply sums that are numbers by
        then, so the fractions of samples and classes that are selected only scale the terms.
    """
    name = "mlkd_loss"
    checks.choice(name, "compat", compat, ("paper", "mlkd"))
    checks.choice(name, "selection", selection, ("median", "none"))
    checks.logits(name, student, teacher)
    weights = [
        checks.number(name, argument, value)
        for argument, value in (
            ("instance_weight", instance_weight),
            ("batch_weight", batch_weight),
            ("class_weight", class_weight),
        )
    ]
    if isinstance(temperatures, Tensor) or not isinstance(temperatures, Sequence):
        raise TypeError(
            f"{name}: temperatures must be a sequence of numbers, got "
            f"{type(temperatures).__name__}."
        )
    if not 0 < len(temperatures) <= MOST_TEMPERATURES:
        raise ValueError(
            f"{name}: temperatures must be 1 to {MOST_TEMPERATURES} numbers, got "
            f"{len(temperatures)}."
        )
    temperatures = tuple(checks.number(name, "temperatures", tau) for tau in temperatures)
    if min(temperatures) <= 0:
        raise ValueError(f"{name}: temperatures must be positive, got {min(temperatures)}.")
    student, teacher, mask, backend = _prepare(
        name, "mlkd_softmax", student, teacher, labels, mask, ignore_index, group, backend
    )
    relations = _relations(
        teacher, mask, *weights, selection, compat, compute_dtype(student, teacher)
    )

    def run(student, teacher, relations):
        if backend == "reference":
            return reference.mlkd(student, teacher, mask, temperatures, relations)
        return ops.batchwise.mlkd(backend, student, teacher, mask, temperatures, relations)

    alone = standardize or (torch.is_grad_enabled() and teacher.requires_grad)
    if not alone:
        return run(student, teacher, relations)
    # The rowwise kernel standardises, and keeps the teacher's gradient where a probability of the
    # student is too small for a number.
    weight = relations.row_weight
    classes = student.shape[-1]
    loss = sum(
        kl_div(
            student.reshape(-1, classes), teacher.reshape(-1, classes), temperature=tau,
            reduction="sum", mask=mask, row_weight=weight, standardize=standardize, backend=backend,
        )
        for tau in temperatures
    )  # fmt: skip
    if any(relations.weights):
        none = relations._replace(row_weight=torch.zeros_like(weight))
        loss = loss + run(student, teacher, none)
    return loss


def _prepare(name, operator, student, teacher, labels, mask, ignore_index, group, backend):
    """Validate what the functions share; with a group, the rows of all its ranks."""
    checks.integer(name, "ignore_index", ignore_index)
    backend = backends.select(f"batchwise.{operator}", student.device.type, backend, name)
    if mask is not None:
        mask = checks.per_row(name, "mask", mask, student, None)
    if labels is not None:
        labels = checks.labels(name, labels, student, ignore_index, read=True)
        if labels.dtype.is_floating_point:
            raise TypeError(f"{name}: labels must be class indices, got probabilities.")
        counts = labels != ignore_index
        mask = counts if mask is None else mask & counts
    checks.group(name, group)
    if group is not None:
        from kdkernels.distributed import gather_rows

        classes = student.shape[-1]
        student, teacher, mask = gather_rows(
            group, student.reshape(-1, classes), teacher.reshape(-1, classes), mask
        )
    return student, teacher, mask, backend


@torch.no_grad()
def _relations(
    teacher, mask, instance_weight, batch_weight, class_weight, selection, compat, dtype
) -> Relations:  # fmt: skip
    """The weights of MLKD's terms, without waiting for a device."""
    classes = teacher.shape[-1]
    teacher = teacher.reshape(-1, classes)
    rows = teacher.shape[0]
    counts = teacher.new_ones(rows, dtype=dtype) if mask is None else mask.to(dtype)
    number = max(rows, 1) if mask is None else counts.sum().clamp(min=1)
    weights, scale = (batch_weight, class_weight / classes), None
    if mask is None:
        weights = batch_weight / number, weights[1]
    else:
        scale = torch.stack([1 / number, torch.ones_like(number)])
    if selection == "none" or rows == 0:
        return Relations(counts * (instance_weight / number), weights, scale, None, None)
    teacher = teacher.to(dtype)
    q = teacher.softmax(-1)
    if compat == "mlkd":
        confidence = q.amax(-1)
    else:  # in an order that does not end where the largest probability rounds to 1
        top, at = teacher.max(-1, keepdim=True)
        confidence = -(teacher - top).exp().scatter(-1, at, 0.0).sum(-1)
    if mask is not None:
        q = torch.where(mask.unsqueeze(-1), q, 0.0)
    unsound = (counts > 0) & ~(q.sum(-1) > 0)
    if mask is not None:
        confidence = torch.where(mask, confidence, torch.nan)
    mass = q.sum(0)
    # The lower of two medians: nothing lies between it and their mean.
    samples = (confidence <= confidence.nanmedian()).to(dtype)
    chosen = (mass <= mass.median()).to(dtype)
    if compat == "paper":
        # A row that no selection takes makes the loss NaN all the same.
        row_weight = torch.where(unsound, torch.nan, samples) * (instance_weight / number)
        return Relations(row_weight, weights, scale, samples, chosen)
    shares = torch.stack([samples.sum() / number, chosen.mean()])
    row_weight = counts * (instance_weight / number * shares[0])
    return Relations(row_weight, weights, shares if scale is None else shares * scale, None, None)


rules.share(__doc__, dist_loss, mlkd_loss)
