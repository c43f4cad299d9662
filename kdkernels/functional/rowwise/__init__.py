# SPDX-License-Identifier: Apache-2.0
"""Row-wise softmax divergences between student and teacher logits, alone or mixed with CE.

Arguments that every function here shares:

    student: logits ``(..., C)``, not probabilities (log-probabilities are logits too, at
        temperature 1); the leading dimensions are rows. fp64, fp32, bf16 or fp16, any strides.
    teacher: logits of the same shape; its dtype may differ.
    labels: class indices ``(...)``. In a divergence they only mask, by ``ignore_index``. In the
        losses with labels they may be probabilities ``(..., C)``: the cross-entropy takes them all,
        and the target class of DKD, NKD, ATS and WSLD is the most probable one.
    temperature: a number, or a tensor of one element or of shape ``(...)``; positive.
    teacher_temperature: likewise; the student's by default.
    scale: ``"t2"`` multiplies each row by its student temperature squared, ``"none"`` does not.
    reduction: ``"batchmean"`` (sum over rows / number of rows that count), ``"mean"`` (that / C,
        or / the width of class_range, terms of all classes included), ``"sum"``, or ``"none"``
        (per row, 0 where masked).
    mask: bool ``(...)``, True where the row counts.
    ignore_index: rows with this label do not count.
    row_weight: float ``(...)``; multiplies its row, and does not enter the number of rows.
    standardize: the softmaxes at the temperatures are of z-scored rows (arXiv 2403.01427): less
        their mean, over their standard deviation (unbiased) plus 1e-7, over the finite classes. A
        constant row becomes 0, with a zero gradient. What is at temperature 1 (cross-entropies
        with labels, the target's term of NKD, WSLD's weights) is of the logits as they are.
    class_range: ``(m, n)``, the softmaxes are over classes m to n - 1 alone; the teacher may have
        all C classes or only these. What is at temperature 1 sees every class. Where the target
        class is a term of its own (DKD, NKD, ATS), labels must lie in the range.
    label_smoothing: in [0, 1], of the labels of the cross-entropy; in the losses with labels.
    inplace: the gradient overwrites the student's logits (eager only, non-leaf, one backward).
    backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; anything but
        ``"auto"`` raises where it cannot run.
    compat: whose form of the loss is meant, where suites disagree; each function says which.

They return the loss in nats, fp32 (fp64 if either side is), 0-d unless ``reduction="none"``, and
differentiate to student, teacher, both temperatures and row_weight, in each input's dtype, where
these require a gradient. A second derivative, or a ``torch.func`` transform, needs
``backend="reference"``.

No row counts: 0, with zero gradients. A class at -inf on both sides contributes nothing. Where the
divergence is infinite the row is +inf and its gradient zero; forward KL's and the cross-entropies'
stay what they are at finite logits. NaN only from NaN or +inf logits, or a row that has no finite
class. Identical logits (and temperatures) give exactly 0 and a zero gradient.

Raises ``ValueError`` for a shape or value out of range, ``TypeError`` for a dtype,
``NotImplementedError`` for a meaningful combination that is not supported, ``RuntimeError`` where
the demanded backend cannot run.
"""

from __future__ import annotations

from kdkernels.functional import rules
from kdkernels.functional.rowwise.divergences import (
    divergence,
    js_div,
    kl_div,
    reverse_kl_div,
    tv_distance,
)
from kdkernels.functional.rowwise.labelled import ats_loss, dkd_loss, kd_loss, nkd_loss, wsld_loss

__all__ = [
    "ats_loss",
    "divergence",
    "dkd_loss",
    "js_div",
    "kd_loss",
    "kl_div",
    "nkd_loss",
    "reverse_kl_div",
    "tv_distance",
    "wsld_loss",
]

rules.share(__doc__, *(globals()[name] for name in __all__))
