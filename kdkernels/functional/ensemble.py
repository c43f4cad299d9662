# SPDX-License-Identifier: Apache-2.0
"""Several teachers at once: the divergence of each, or of their mixture, from one student."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels import checks, divergences, ops, reference
from kdkernels.divergences import Choices, Numbers
from kdkernels.functional import rowwise, rules
from kdkernels.functional.rows import Rows, prepare
from kdkernels.ops.ensemble import compute_dtype
from kdkernels.reference.ensemble import okddip
from kdkernels.reference.rowwise.target import standardized

__all__ = ["multi_teacher_kl_div"]


def multi_teacher_kl_div(
    student: Tensor,
    teachers: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    weights: Tensor | Sequence[float] | None = None,
    form: str = "sum",
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale: str = "t2",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    standardize: bool = False,
    class_range: tuple[int, int] | None = None,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Softened KL divergence of M teachers from one student, whose logits are read once.

    With ``p_s = softmax(student / T)``, ``p_m = softmax(teachers[m] / T)``, weights ``w`` and
    cross-entropy at temperature 1, per row ``ce_weight CE(student, labels)`` plus

    ===========  ==========================================================================
    form
    ===========  ==========================================================================
    ``sum``      ``T^2 sum_m w_m KL(p_m || p_s)`` (DGKD, arXiv 2009.08825; DML, arXiv
                 1706.00384: one call per network, with its peers as teachers)
    ``mixture``  ``T^2 KL(sum_m w_m p_m || p_s)``, the weights divided by their sum: the
                 teachers' probabilities averaged (Hinton et al., arXiv 1503.02531)
    ===========  ==========================================================================

    ``teachers`` is one tensor (M, ..., C), or a sequence of M tensors (..., C) of one dtype, which
    are not copied. ``weights`` are M numbers, or a tensor (M,) or (M, ...); 1 / M each by default.
    In a sum they may be of any sign; in a mixture they must not be negative, nor all 0. A teacher
    without weight contributes nothing, whatever it holds. Weights differentiate like the rest, also
    where they are 0; a divergence that is not finite gives its weight none.

    ``labels`` are as in :func:`kdkernels.functional.kd_loss`, and needed where ``ce_weight`` is not
    0. In a sum, an infinite divergence leaves the other teachers' gradients as they are. The other
    arguments, the result and the errors are as in :mod:`kdkernels.functional.rowwise`; there is no
    ``inplace``. ``standardize`` and ``class_range`` are composed around the kernel: z-scores in
    plain torch, a view of the classes, and the cross-entropy, which sees the logits as they are, as
    a call of its own.

    compat:
        ``"paper"``: as above.
        ``"dgkd"``: its ``nn.KLDivLoss()`` averages over classes too, which divides the divergences,
        and not the cross-entropy, by C (by the width of class_range); use weights of 1, or 0 for a
        teacher that is dropped.
        ``"okddip"`` (also its DML): targets are raised by 1e-7 a class, without normalising them
        again. What this adds is formed in plain torch beside the kernel, without its exactness.
    """
    name = "multi_teacher_kl_div"
    checks.choice(name, "form", form, ("sum", "mixture"))
    checks.choice(name, "compat", compat, ("paper", "dgkd", "okddip"))
    ce_weight = checks.number(name, "ce_weight", ce_weight)
    smoothing = checks.number(name, "label_smoothing", label_smoothing, 0.0, 1.0)
    if labels is None and ce_weight:
        raise TypeError(f"{name}: labels must be a tensor where ce_weight is not 0, got None.")
    checks.flag(name, "standardize", standardize)
    first, width = 0, None
    if class_range is not None:
        first, width = checks.class_range(name, class_range, student)
    parts, stacked = _parts(name, student, teachers, width)
    dtype = compute_dtype(student, parts)
    rows = prepare(
        name, "ensemble", student, dtype, labels, temperature, teacher_temperature, scale,
        reduction, mask, ignore_index, row_weight, backend,
    )  # fmt: skip
    mixture = form == "mixture"
    if weights is not None:
        weights = checks.teacher_weights(name, weights, len(parts), student, dtype, mixture)
        if mixture:
            weights = weights / weights.sum(0)
    cross_entropy = None
    if standardize or width is not None:
        if rows.labels is not None:
            checks.labels(name, labels, student, ignore_index, read=True)
            if ce_weight:
                cross_entropy = rowwise.kd_loss(
                    student, student.detach(), labels, ce_weight=ce_weight, kd_weight=0.0,
                    label_smoothing=smoothing, reduction=reduction, mask=mask,
                    ignore_index=ignore_index, row_weight=row_weight, class_range=class_range,
                    backend=backend,
                )  # fmt: skip
            rows = _without_labels(rows, ignore_index)
        ce_weight = 0.0
        if width is not None:
            student = student[..., first : first + width]
            parts = [
                t if t.shape == student.shape else t[..., first : first + width] for t in parts
            ]
        if standardize:
            student, *parts = (_z_scores(x.to(dtype), rows.mask) for x in (student, *parts))
        stacked = None
    kd_weight = 1.0 / student.shape[-1] if compat == "dgkd" else 1.0
    numbers = Numbers(rows.temperature, rows.teacher_temperature, kd_weight, ce_weight, smoothing)
    choices = Choices(t2=rows.t2, reduction=rows.reduction, ignore_index=ignore_index)
    if compat != "okddip":
        loss = _run(name, student, parts, stacked, weights, rows, mixture, numbers, choices)
    else:
        by_row = choices._replace(reduction=divergences.REDUCTIONS.index("none"))
        loss = _run(name, student, parts, stacked, weights, rows, mixture, numbers, by_row)
        loss = okddip(loss, student, parts, weights, rows, mixture, numbers, choices)
    return loss if cross_entropy is None else loss + cross_entropy


def _without_labels(rows: Rows, ignore_index: int) -> Rows:
    """The same rows, where labels only mask, once the classes are not all there."""
    mask = rows.mask
    if rows.labels.dtype == torch.int64:
        counts = rows.labels != ignore_index
        mask = counts if mask is None else mask & counts
    return rows._replace(labels=None, mask=mask)


def _z_scores(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Rows standardised; nothing flows back to what does not count, nor to NaN."""
    sound = (logits < math.inf).all(-1, keepdim=True)
    if mask is not None:
        sound = sound & mask.view(sound.shape)
    return torch.where(sound, standardized(torch.where(sound, logits, 0.0))[0], math.nan)


def _parts(
    name: str, student, teachers, width: int | None
) -> tuple[Sequence[Tensor], Tensor | None]:
    """The M teachers (..., C), and the tensor they are parts of if a gradient is to go there."""
    if isinstance(teachers, Tensor):
        checks.stacked(name, "teachers", teachers, student, width)
        parts = teachers.unbind(0)
        checks.logits(name, student, parts[0], width)
        return parts, teachers if teachers.requires_grad else None
    if not isinstance(teachers, Sequence) or not teachers:
        raise TypeError(
            f"{name}: teachers must be a tensor (M, ..., C) or a sequence of at least one tensor, "
            f"got {teachers!r:.40}."
        )
    for teacher in teachers:
        checks.logits(name, student, teacher, width)
        if teacher.dtype != teachers[0].dtype:
            raise TypeError(
                f"{name}: teachers must have one dtype, got {teachers[0].dtype} and "
                f"{teacher.dtype}."
            )
    return teachers, None


def _run(name, student, parts, stacked, weights, rows, mixture, numbers, choices) -> Tensor:
    if rows.backend == "reference":
        return reference.ensemble(student, parts, weights, rows, mixture, numbers, choices)
    try:
        return ops.ensemble.apply(
            name, student, parts, stacked, weights, rows, mixture, numbers, choices
        )
    except RuntimeError as error:
        checks.raise_for_labels(name, error)
        raise


rules.share(rowwise.__doc__, multi_teacher_kl_div)
