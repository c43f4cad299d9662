# SPDX-License-Identifier: Apache-2.0
"""List-wise losses: the student is to rank the classes as the teacher does."""

from __future__ import annotations

from torch import Tensor

from kdkernels import checks, reference
from kdkernels.functional import rowwise, rules
from kdkernels.functional.rows import prepare
from kdkernels.ops.rowwise import compute_dtype

__all__ = ["pld_loss"]


def pld_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale: str = "none",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Plackett-Luce distillation (arXiv 2506.12542).

    Per row ``-sum_k w_k (s_k - log sum_{l >= k} exp s_l)``, in nats, over the classes in the order
    of the label first and then by falling teacher logit (ties by class): ``s`` are the student's
    logits over ``temperature``, ``w`` the teacher's softmax at ``teacher_temperature``, through
    which, and not through the order, a gradient flows. No cross-entropy is added: the first term
    is one.

    Student and teacher ``(..., C)``, labels class indices ``(...)``; other arguments, result and
    errors as in :mod:`kdkernels.functional.rowwise`. Composite by design: it runs on torch's own
    operators, and differentiates to any order. A row at +inf (teacher mass on a class that the
    student excludes) has a zero gradient. No code of the authors' was at hand: from the
    formula.
    """
    name = "pld_loss"
    checks.choice(name, "compat", compat, ("paper",))
    checks.logits(name, student, teacher)
    if labels is None:
        raise TypeError(f"{name}: labels must be a tensor, got None.")
    rows = prepare(
        name, "listwise", student, compute_dtype(student, teacher), labels, temperature,
        teacher_temperature, scale, reduction, mask, ignore_index, row_weight, backend,
    )  # fmt: skip
    if rows.labels.is_floating_point():
        raise NotImplementedError(f"{name}: labels must be class indices, got probabilities.")
    return reference.pld(student, teacher, rows, ignore_index)


rules.share(rowwise.__doc__, pld_loss)
