# SPDX-License-Identifier: Apache-2.0
"""Divergences from a teacher that is stored as its top-k values."""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels import checks, divergences, ops, reference
from kdkernels.divergences import KINDS, MISSING, TopKChoices, TopKNumbers
from kdkernels.functional import rowwise, rules
from kdkernels.functional.rows import Rows, prepare
from kdkernels.ops.rowwise import compute_dtype

__all__ = ["topk_divergence"]


# No log-probability is above 0; but one that is stored coarsely may be, a little.
MOST_LOG_PROB = 0.5
_KINDS = ("forward_kl", "reverse_kl", "js", "tv")


def topk_divergence(
    student: Tensor,
    topk_values: Tensor,
    topk_indices: Tensor,
    labels: Tensor | None = None,
    *,
    kind: str = "forward_kl",
    beta: float | None = None,
    values: str = "log_probs",
    missing: str = "tail",
    teacher_logsumexp: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale: str = "t2",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Divergence of the student from a teacher of whom k values a row are known, times ``T^2``.

    student: logits ``(..., C)``.
    topk_values: ``(..., k)``, the teacher's log-probabilities or logits, at temperature 1 and in
        any order; -inf where a row has fewer than k.
    topk_indices: ``(..., k)`` integers, the classes of the values; distinct in a row. Those of
        absent values are not looked at.
    labels: class indices ``(...)``; they only mask, by ``ignore_index``.
    kind: ``"forward_kl"``, ``"reverse_kl"``, ``"js"`` (with ``beta``, .5 by default, as in
        :func:`js_div`) or ``"tv"``.
    values: ``"log_probs"`` over all classes, or ``"logits"``, known up to a constant a row. The
        tail cannot be told from the latter: a finite log-probability above 0.5, which no rounding
        explains, raises ``ValueError`` on the CPU where it would be.
    missing: what becomes of the other classes, the tail:

        ==================  ====================================================================
        ``"tail"``          one more class on both sides. The teacher's mass there is what the
                            stored probabilities leave of 1 (nothing, if they exceed it: they are
                            then renormalised).
        ``"zero"``          the teacher has nothing there, and is renormalised over its k classes;
                            the student keeps its softmax over all. ``reverse_kl`` would be
                            infinite: not allowed.
        ``"renormalize"``   both softmaxes are over the k classes; the student's other logits are
                            not read, and get no gradient.
        ==================  ====================================================================

    teacher_logsumexp: ``(...)``, of all the teacher's values over ``teacher_temperature``; only
        with ``missing="tail"``. It makes the tail exact at any temperature, and known for logits,
        which need it there.

    What a temperature does to the tail depends on how its mass is distributed. Unless
    ``teacher_logsumexp`` tells, it is taken to be spread evenly over the other classes:
    ``(C - k)^(1-1/T) tail^(1/T)``, before normalising. At temperature 1 nothing is assumed.

    The other arguments, the result and the errors are those of :mod:`kdkernels.functional.rowwise`
    (there is no ``inplace``). It differentiates to student, topk_values, teacher_logsumexp, the
    temperatures and row_weight. On the CPU an index out of range, or repeated in a row, raises
    ``ValueError``; on a GPU its row is NaN. A tail that is empty on both sides is none: with all C
    classes stored this is the dense divergence. Where rounding has left the teacher no tail, it
    counts as 1e-7 in reverse KL, which would be infinite. A row without values is 0 where its whole
    mass is the tail, and NaN otherwise.

    compat:
        ``"paper"``: as above.
        ``"trl"``: the same, with ``missing="tail"``; TRL keeps both tails above 1e-7.
        ``"distillkit"``: its ``ZERO`` is ``missing="zero"``, its ``SYMMETRIC_UNIFORM`` is
        ``"tail"``, where a temperature acts on the tail as if it were one class:
        ``tail^(1/T)``. It gives the teacher no gradient, and bounds tails by 1e-8.
    """
    name = "topk_divergence"
    checks.choice(name, "kind", kind, _KINDS)
    checks.choice(name, "values", values, ("log_probs", "logits"))
    checks.choice(name, "missing", missing, MISSING)
    checks.choice(name, "compat", compat, ("paper", "trl", "distillkit"))
    kind, _, beta, _ = divergences.resolve(name, kind, None, beta)
    if missing == "zero" and kind == "reverse_kl":
        raise ValueError(
            f"{name}: reverse KL is infinite with missing='zero', which leaves the teacher nothing "
            "where the student has something; use 'tail' or 'renormalize'."
        )
    if missing == "tail" and values == "logits" and teacher_logsumexp is None:
        raise ValueError(
            f"{name}: missing='tail' needs teacher_logsumexp with values='logits', which do not "
            "tell what mass they leave; or use 'renormalize' or 'zero'."
        )
    if missing != "tail" and teacher_logsumexp is not None:
        raise ValueError(f"{name}: teacher_logsumexp has no use with missing={missing!r}.")
    _check_topk(name, student, topk_values, topk_indices)
    dtype = compute_dtype(student, topk_values)
    rows = prepare(
        name, "sparse", student, dtype, labels, temperature, teacher_temperature, scale, reduction,
        mask, ignore_index, row_weight, backend,
    )  # fmt: skip
    indices = _flat_indices(
        name, topk_indices, topk_values, student, rows.labels, rows.mask, ignore_index,
        read=rows.backend != "cpu",
    )  # fmt: skip
    if teacher_logsumexp is not None:
        teacher_logsumexp = checks.per_row(
            name, "teacher_logsumexp", teacher_logsumexp, student, dtype
        )
    if values == "log_probs" and missing == "tail" and teacher_logsumexp is None:
        _check_log_probs(name, topk_values.detach(), rows, ignore_index)
    numbers = TopKNumbers(rows.temperature, rows.teacher_temperature, beta)
    choices = TopKChoices(
        KINDS.index(kind), rows.t2, rows.reduction, ignore_index, MISSING.index(missing),
        compat != "distillkit",
    )  # fmt: skip
    if rows.backend == "reference":
        return reference.sparse(
            student, topk_values, indices, teacher_logsumexp, rows, numbers, choices
        )
    try:
        return ops.sparse.apply(
            name, rows.backend, student, topk_values, indices, teacher_logsumexp, rows, numbers,
            choices,
        )  # fmt: skip
    except RuntimeError as error:
        checks.raise_for_labels(name, error)
        checks.raise_for_labels(name, error, "topk_indices")
        raise


def _check_topk(name: str, student: Tensor, values: Tensor, indices: Tensor) -> None:
    """Logits (..., C), floats (..., k) with k >= 1, and integers of the latter's shape."""
    checks.logits(name, student, student)
    for argument, value in (("topk_values", values), ("topk_indices", indices)):
        checks.tensor(name, argument, value)
        if value.dim() != student.dim() or value.shape[:-1] != student.shape[:-1]:
            raise ValueError(
                f"{name}: {argument} must have shape {(*student.shape[:-1], 'k')}, "
                f"got {tuple(value.shape)}."
            )
        checks.same_device(name, argument, value, student)
    if values.dtype not in checks.FLOATS:
        raise TypeError(
            f"{name}: topk_values must be float64, float32, bfloat16 or float16, "
            f"got {values.dtype}."
        )
    if indices.dtype not in checks.INTEGERS:
        raise TypeError(f"{name}: topk_indices must be integers, got {indices.dtype}.")
    if values.shape != indices.shape or values.shape[-1] == 0:
        raise ValueError(
            f"{name}: topk_values and topk_indices must have one shape (..., k) with k >= 1, "
            f"got {tuple(values.shape)} and {tuple(indices.shape)}."
        )
    if values.shape[-1] > student.shape[-1]:
        raise ValueError(
            f"{name}: topk_values must have at most as many values a row as there are classes "
            f"({student.shape[-1]}), got {values.shape[-1]}."
        )


def _check_log_probs(name: str, values: Tensor, rows: Rows, ignore_index: int) -> None:
    """None is too large for a log-probability, as logits and probabilities would be."""
    if not checks.readable(values) or not values.numel() or values.max() <= MOST_LOG_PROB:
        return
    values = values.reshape(-1, values.shape[-1])
    values = values[_counts(values[:, 0], rows.labels, rows.mask, ignore_index)]
    bad = values[(values > MOST_LOG_PROB) & values.isfinite()]
    if bad.numel():
        raise ValueError(
            f"{name}: topk_values must be log-probabilities, at most 0, with values='log_probs', "
            f"got {bad[0].item():g}; for logits there is values='logits'."
        )


def _counts(like: Tensor, labels, mask, ignore_index: int) -> Tensor:
    """Which of the N rows count."""
    counts = torch.ones_like(like, dtype=torch.bool)
    if mask is not None:
        counts &= mask
    if labels is not None and labels.dtype == torch.int64:
        counts &= labels != ignore_index
    return counts


def _flat_indices(
    name: str, indices, values, student, labels, mask, ignore_index: int, read: bool
) -> Tensor:
    """The indices as contiguous int64 (N, k).

    Without ``read`` their values are left to the kernel to check.
    """
    indices = indices.reshape(-1, indices.shape[-1]).to(torch.int64).contiguous()
    if read and checks.readable(indices) and indices.numel():
        classes, k = student.shape[-1], indices.shape[-1]
        looked_at = ~torch.isneginf(values.detach().reshape(-1, k))
        looked_at &= _counts(indices[:, 0], labels, mask, ignore_index).unsqueeze(-1)
        if (looked_at & ((indices < 0) | (indices >= classes))).any():
            raise ValueError(
                f"{name}: topk_indices must be in [0, {classes}) where topk_values is not -inf."
            )
        apart = torch.where(looked_at, indices, -1 - torch.arange(k, device=indices.device))
        apart = apart.sort(-1).values
        if (apart[:, 1:] == apart[:, :-1]).any():
            raise ValueError(
                f"{name}: topk_indices must be distinct in a row where topk_values is not -inf."
            )
    return indices


rules.share(rowwise.__doc__, topk_divergence)
