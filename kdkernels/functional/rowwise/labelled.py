# SPDX-License-Identifier: Apache-2.0
"""The losses that look at labels: KD with its cross-entropy, and those that treat the target class
of a row apart.

Their labels are class indices ``(...)`` or probabilities ``(..., C)``; the target of a row of
probabilities is its most probable class. All take ``ce_weight`` times the cross-entropy at
temperature 1 with the labels, smoothed by ``label_smoothing`` in [0, 1], in the same pass.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from kdkernels import checks
from kdkernels.functional.rowwise.call import run


class Parts(NamedTuple):
    """A loss, and what it is made of: reduced as it is, without weights, detached."""

    loss: Tensor
    target: Tensor
    non_target: Tensor


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    alpha: float | None = None,
    ce_weight: float | None = None,
    kd_weight: float | None = None,
    label_smoothing: float = 0.0,
    teacher_temperature: float | Tensor | None = None,
    scale: str = "t2",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    standardize: bool = False,
    class_range: tuple[int, int] | None = None,
    inplace: bool = False,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Distillation loss of Hinton et al. (arXiv 1503.02531) in one pass over the logits.

    ``(1 - alpha) CE(student, labels) + alpha T^2 KL(p_t || p_s)``, with alpha = 0.9 by default; or
    ``ce_weight CE + kd_weight T^2 KL`` where the weights are given (both, and then no ``alpha``,
    which is in [0, 1]; they may be any number).
    The cross-entropy is at temperature 1.

    ``labels`` are class indices ``(...)`` or probabilities ``(..., C)``, smoothed by
    ``label_smoothing`` in [0, 1] as in ``torch.nn.CrossEntropyLoss``. ``reduction="mean"`` divides
    both terms by C, or by the width of ``class_range``. The rest as in
    :mod:`kdkernels.functional.rowwise`.

    compat:
        ``"paper"`` (also ``"mdistiller"``, ``"repdistiller"``): as above.
        ``"torchdistill"``: ``alpha`` weighs the cross-entropy and ``1 - alpha`` the divergence.
        ``"takd"``: its ``nn.KLDivLoss()`` averages over classes too, which divides the
        divergence, and not the cross-entropy, by C.
    """
    name = "kd_loss"
    checks.choice(
        name, "compat", compat, ("paper", "mdistiller", "repdistiller", "torchdistill", "takd")
    )
    if labels is None:
        raise TypeError("kd_loss: labels must be a tensor, got None; kl_div needs no labels.")
    if ce_weight is None and kd_weight is None:
        alpha = 0.9 if alpha is None else checks.number(name, "alpha", alpha, 0.0, 1.0)
        ce_weight, kd_weight = 1.0 - alpha, alpha
        if compat == "torchdistill":
            ce_weight, kd_weight = kd_weight, ce_weight
    elif alpha is not None or ce_weight is None or kd_weight is None:
        raise ValueError(
            "kd_loss: give either alpha, or both ce_weight and kd_weight; "
            f"got alpha={alpha}, ce_weight={ce_weight}, kd_weight={kd_weight}."
        )
    if compat == "takd":
        checks.logits(name, student, teacher)
        kd_weight = kd_weight / student.shape[-1]
    return run(
        name, "forward_kl", student, teacher, labels, temperature, teacher_temperature, scale,
        reduction, mask, ignore_index, row_weight, standardize, class_range, inplace, backend,
        kd_weight=checks.number(name, "kd_weight", kd_weight),
        ce_weight=checks.number(name, "ce_weight", ce_weight),
        label_smoothing=checks.number(name, "label_smoothing", label_smoothing, 0.0, 1.0),
    )  # fmt: skip


def _weights(name: str, **weights) -> dict[str, float]:
    return {argument: checks.number(name, argument, value) for argument, value in weights.items()}


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    warmup: float = 1.0,
    ce_weight: float = 0.0,
    return_parts: bool = False,
    label_smoothing: float = 0.0,
    teacher_temperature: float | Tensor | None = None,
    scale: str = "t2",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    standardize: bool = False,
    class_range: tuple[int, int] | None = None,
    inplace: bool = False,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor | Parts:
    """Decoupled knowledge distillation (arXiv 2203.08679), ``alpha TCKD + beta NCKD``, times T^2.

    TCKD is the KL divergence between the probabilities (target, all others) of teacher and student;
    NCKD is that between their softmaxes over the other classes. So ``KL = TCKD + (1 - p_t) NCKD``.
    ``warmup`` multiplies both: the paper's ``min(epoch / 20, 1)``. Plus ``ce_weight`` times the
    cross-entropy (the paper's recipes: 1).

    ``return_parts``: a named tuple ``(loss, target, non_target)`` of the loss, TCKD and NCKD; the
    latter two times T^2, without
    alpha, beta and warmup, and detached. With no other class than the target both are 0.

    mdistiller, mmrazor, cls_KD and CTKD compute the same, by probabilities that run out at large
    logits, where this is finite. ``standardize`` is logit standardisation's LSDKD.
    """
    name = "dkd_loss"
    checks.choice(name, "compat", compat, ("paper", "mdistiller", "mmrazor", "cls_kd"))
    weights = _weights(name, alpha=alpha, beta=beta, ce_weight=ce_weight, warmup=warmup)
    result = run(
        name, "forward_kl", student, teacher, labels, temperature, teacher_temperature, scale,
        reduction, mask, ignore_index, row_weight, standardize, class_range, inplace, backend,
        kd_weight=weights["warmup"] * weights["beta"],
        ce_weight=weights["ce_weight"],
        label_smoothing=checks.number(name, "label_smoothing", label_smoothing, 0.0, 1.0),
        target="decoupled", target_weight=weights["warmup"] * weights["alpha"],
        parts=checks.flag(name, "return_parts", return_parts),
    )  # fmt: skip
    return Parts(*result) if return_parts else result


def nkd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    gamma: float = 1.5,
    ce_weight: float = 0.0,
    return_parts: bool = False,
    label_smoothing: float = 0.0,
    teacher_temperature: float | Tensor | None = None,
    scale: str = "t2",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    standardize: bool = False,
    class_range: tuple[int, int] | None = None,
    inplace: bool = False,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor | Parts:
    """Normalised knowledge distillation (arXiv 2303.13005).

    ``-q_y log p_y - gamma T^2 sum_{c != y} q'_c log p'_c``: p and q are the softmaxes of student
    and teacher at temperature 1, p' and q' those at T over the classes other than the target y. The
    gradient does not go through ``q_y``, as published. Plus ``ce_weight`` times the cross-entropy.

    ``return_parts``: a named tuple ``(loss, target, non_target)`` of the loss and its two terms,
    the latter with T^2, without gamma, both detached.
    """
    name = "nkd_loss"
    checks.choice(name, "compat", compat, ("paper", "cls_kd"))
    weights = _weights(name, gamma=gamma, ce_weight=ce_weight)
    result = run(
        name, "cross_entropy", student, teacher, labels, temperature, teacher_temperature, scale,
        reduction, mask, ignore_index, row_weight, standardize, class_range, inplace, backend,
        kd_weight=weights["gamma"], ce_weight=weights["ce_weight"],
        label_smoothing=checks.number(name, "label_smoothing", label_smoothing, 0.0, 1.0),
        target="separate", target_weight=1.0,
        parts=checks.flag(name, "return_parts", return_parts),
    )  # fmt: skip
    return Parts(*result) if return_parts else result


def ats_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    target_temperature: float = 4.0,
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
    teacher_temperature: float | Tensor = 2.0,
    scale: str = "t2",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    standardize: bool = False,
    class_range: tuple[int, int] | None = None,
    inplace: bool = False,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Asymmetric temperature scaling (arXiv 2210.04427).

    ``(1 - alpha) CE + alpha T^2 sum_c -q_c log p_c``: p is the student's softmax at its temperature
    T, and q the teacher's, whose target logit is divided by ``target_temperature`` (a number) and
    whose others by ``teacher_temperature``. ``standardize=True`` raises ``NotImplementedError``:
    nobody has said what it would mean here.
    """
    name = "ats_loss"
    checks.choice(name, "compat", compat, ("paper",))
    if standardize:
        raise NotImplementedError("ats_loss: standardize=True is not supported.")
    alpha = checks.number(name, "alpha", alpha, 0.0, 1.0)
    target_temperature = checks.number(name, "target_temperature", target_temperature)
    if target_temperature <= 0:
        raise ValueError(
            f"ats_loss: target_temperature must be positive, got {target_temperature}."
        )
    return run(
        name, "cross_entropy", student, teacher, labels, temperature, teacher_temperature, scale,
        reduction, mask, ignore_index, row_weight, standardize, class_range, inplace, backend,
        kd_weight=alpha, ce_weight=1.0 - alpha,
        label_smoothing=checks.number(name, "label_smoothing", label_smoothing, 0.0, 1.0),
        target="tempered", target_temperature=target_temperature,
    )  # fmt: skip


def wsld_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    alpha: float = 2.25,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    teacher_temperature: float | Tensor | None = None,
    scale: str = "t2",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    standardize: bool = False,
    class_range: tuple[int, int] | None = None,
    inplace: bool = False,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Weighted soft labels (arXiv 2102.00650), ``alpha T^2 w sum_c -q_c log p_c`` per row.

    p and q are the softmaxes at T. ``w = 1 - exp(-CE_s / (CE_t + 1e-7))`` of the cross-entropies of
    student and teacher with the target at temperature 1; the gradient does not go through it, as
    published. Plus ``ce_weight`` times the cross-entropy (the paper's recipes: 1). cls_KD and
    mmrazor compute the same.
    """
    name = "wsld_loss"
    checks.choice(name, "compat", compat, ("paper", "cls_kd", "mmrazor"))
    weights = _weights(name, alpha=alpha, ce_weight=ce_weight)
    return run(
        name, "cross_entropy", student, teacher, labels, temperature, teacher_temperature, scale,
        reduction, mask, ignore_index, row_weight, standardize, class_range, inplace, backend,
        kd_weight=weights["alpha"], ce_weight=weights["ce_weight"],
        label_smoothing=checks.number(name, "label_smoothing", label_smoothing, 0.0, 1.0),
        target="weighting",
    )  # fmt: skip
