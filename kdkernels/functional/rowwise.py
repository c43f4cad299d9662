# SPDX-License-Identifier: Apache-2.0
"""Row-wise softmax divergences between student and teacher logits, alone or mixed with CE.

Arguments that every function here shares:

    student: logits ``(..., C)``, not probabilities (log-probabilities are logits too, at
        temperature 1); the leading dimensions are rows. fp64, fp32, bf16 or fp16, any strides.
    teacher: logits of the same shape; its dtype may differ.
    labels: class indices ``(...)``. In a divergence they only mask, by ``ignore_index``.
    temperature: a number, or a tensor of one element or of shape ``(...)``; positive.
    teacher_temperature: likewise; the student's by default.
    scale: ``"t2"`` multiplies each row by its student temperature squared, ``"none"`` does not.
    reduction: ``"batchmean"`` (sum over rows / number of rows that count), ``"mean"`` (that / C),
        ``"sum"``, or ``"none"`` (per row, 0 where masked).
    mask: bool ``(...)``, True where the row counts.
    ignore_index: rows with this label do not count.
    row_weight: float ``(...)``; multiplies its row, and does not enter the number of rows.
    inplace: the gradient overwrites the student's logits (eager only, non-leaf, one backward).
    backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; anything but
        ``"auto"`` raises where it cannot run.

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

import inspect

from torch import Tensor

from kdkernels import checks, divergences, ops, reference
from kdkernels.divergences import Choices, Numbers
from kdkernels.functional.rows import prepare
from kdkernels.ops.rowwise import compute_dtype

# Suites whose KL is the paper's up to `scale` and `reduction`, and suites that leave out the
# teacher's entropy (the student's gradient is the same).
_KL_COMPAT = dict.fromkeys(
    ("paper", "mdistiller", "repdistiller", "torchdistill", "mmrazor", "trl", "distillkit"),
    "forward_kl",
) | dict.fromkeys(("textbrewer", "cls_kd", "torchtune"), "cross_entropy")


def kl_div(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale: str = "t2",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Softened KL divergence of Hinton et al. (arXiv 1503.02531), ``T^2 KL(p_t || p_s)``.

    With ``p_s = softmax(student / T)``, ``p_t = softmax(teacher / T)``, per row
    ``T^2 sum_c p_t (log p_t - log p_s)``. Arguments, result and errors as in
    :mod:`kdkernels.functional.rowwise`.

    The suites differ in what surrounds the divergence:

    =================================  ==========================================================
    mdistiller, repdistiller           the default
    mmrazor                            ``reduction`` as given
    torchdistill without CE, trl       ``scale="none"``
    TAKD, DGKD                         ``reduction="mean"``
    ``compat="cls_kd"``                cross-entropy ``-sum_c p_t log p_s``: same student gradient
    ``compat="textbrewer"``            cross-entropy; use ``scale="none"``
    ``compat="torchtune"``             cross-entropy (its "forward KL"); ``normalize=False`` is
                                       ``reduction="sum"``
    =================================  ==========================================================
    """
    kind = _KL_COMPAT[checks.choice("kl_div", "compat", compat, tuple(_KL_COMPAT))]
    return _rowwise(
        "kl_div", kind, student, teacher, labels, temperature, teacher_temperature, scale,
        reduction, mask, ignore_index, row_weight, inplace, backend,
    )  # fmt: skip


def reverse_kl_div(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale: str = "t2",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Reverse KL divergence of MiniLLM (arXiv 2306.08543), ``T^2 KL(p_s || p_t)``.

    Arguments, result and errors as in :mod:`kdkernels.functional.rowwise`. torchtune and TRL do not
    multiply by ``T^2``: ``scale="none"``.
    """
    checks.choice("reverse_kl_div", "compat", compat, ("paper", "torchtune", "trl"))
    return _rowwise(
        "reverse_kl_div", "reverse_kl", student, teacher, labels, temperature,
        teacher_temperature, scale, reduction, mask, ignore_index, row_weight, inplace, backend,
    )  # fmt: skip


def js_div(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale: str = "t2",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649).

    With ``m = (1 - beta) p_s + beta p_t``: ``beta KL(p_t || m) + (1 - beta) KL(p_s || m)``, times
    ``T^2``. As in TRL, ``beta=0`` is forward KL and ``beta=1`` reverse KL (the limits of the
    formula over its scale). TRL, Liger and DistillKit (which does multiply by ``T^2``) agree
    otherwise. ``beta`` is in [0, 1]; the rest as in :mod:`kdkernels.functional.rowwise`.
    """
    checks.choice("js_div", "compat", compat, ("paper", "trl", "liger", "distillkit"))
    kind, _, beta, _ = divergences.resolve("js_div", "js", None, beta)
    return _rowwise(
        "js_div", kind, student, teacher, labels, temperature, teacher_temperature, scale,
        reduction, mask, ignore_index, row_weight, inplace, backend, beta=beta,
    )  # fmt: skip


def tv_distance(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale: str = "t2",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Total variation distance (f-distill, arXiv 2307.15190), ``T^2 / 2 sum_c |p_t - p_s|``.

    Where ``p_t = p_s`` the subgradient 0 is used. Arguments, result and errors as in
    :mod:`kdkernels.functional.rowwise`.
    """
    checks.choice("tv_distance", "compat", compat, ("paper", "distillkit"))
    return _rowwise(
        "tv_distance", "tv", student, teacher, labels, temperature, teacher_temperature, scale,
        reduction, mask, ignore_index, row_weight, inplace, backend,
    )  # fmt: skip


def divergence(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    kind: str,
    alpha: float | None = None,
    beta: float | None = None,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    scale: str = "t2",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    inplace: bool = False,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Any divergence of the family by name, times ``T^2``; ``s = p_s``, ``t = p_t``.

    ==================  ==============================================================  ==========
    kind                per row                                                         parameters
    ==================  ==============================================================  ==========
    ``forward_kl``      KL(t || s)
    ``reverse_kl``      KL(s || t)
    ``js``              as :func:`js_div`                                               beta .5
    ``tv``              as :func:`tv_distance`
    ``skew_forward``    KL(t || alpha t + (1-alpha) s)            (arXiv 2402.03898)    alpha .1
    ``skew_reverse``    KL(s || alpha s + (1-alpha) t)                                  alpha .1
    ``jeffreys``        KL(t || s) + KL(s || t)
    ``alpha``           (sum t^alpha s^(1-alpha) - 1) / (alpha (alpha-1)); 1 and 0 are
                        forward and reverse KL                                          alpha .5
    ``renyi``           log(sum t^alpha s^(1-alpha)) / (alpha-1); 1 is forward KL       alpha .5
    ``hellinger``       1 - sum sqrt(t s)
    ``chi2``            sum (t-s)^2 / s
    ``ab``              -(sum t^alpha s^beta - alpha/(alpha+beta) t^(alpha+beta)
                        - beta/(alpha+beta) s^(alpha+beta)) / (alpha beta)
                        (ABKD, arXiv 2505.04560)                                        .2, .7
    ==================  ==============================================================  ==========

    ``alpha`` and ``beta`` raise ``ValueError`` where the kind does not take them or they are out of
    range: skew in [0, 1), renyi > 0, ab with alpha, beta and their sum non-zero. The rest as in
    :mod:`kdkernels.functional.rowwise`.
    """
    checks.choice("divergence", "compat", compat, ("paper",))
    kernel_kind, alpha, beta, weight = divergences.resolve("divergence", kind, alpha, beta)
    return _rowwise(
        "divergence", kernel_kind, student, teacher, labels, temperature, teacher_temperature,
        scale, reduction, mask, ignore_index, row_weight, inplace, backend, alpha=alpha, beta=beta,
        kd_weight=weight,
    )  # fmt: skip


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
    inplace: bool = False,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Distillation loss of Hinton et al. (arXiv 1503.02531) in one pass over the logits.

    ``(1 - alpha) CE(student, labels) + alpha T^2 KL(p_t || p_s)``, with alpha = 0.9 by default; or
    ``ce_weight CE + kd_weight T^2 KL`` where the weights are given (both, and then no ``alpha``).
    The cross-entropy is at temperature 1.

    ``labels`` are class indices ``(...)`` or probabilities ``(..., C)``, smoothed by
    ``label_smoothing`` in [0, 1] as in ``torch.nn.CrossEntropyLoss``. ``reduction="mean"`` divides
    both terms by C. The rest as in :mod:`kdkernels.functional.rowwise`.

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
        alpha = 0.9 if alpha is None else checks.number(name, "alpha", alpha)
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
    return _rowwise(
        name, "forward_kl", student, teacher, labels, temperature, teacher_temperature, scale,
        reduction, mask, ignore_index, row_weight, inplace, backend,
        kd_weight=checks.number(name, "kd_weight", kd_weight),
        ce_weight=checks.number(name, "ce_weight", ce_weight),
        label_smoothing=checks.number(name, "label_smoothing", label_smoothing, 0.0, 1.0),
    )  # fmt: skip


def _rowwise(
    name, kind, student, teacher, labels, temperature, teacher_temperature, scale, reduction,
    mask, ignore_index, row_weight, inplace, backend, *, alpha=0.0, beta=0.0, kd_weight=1.0,
    ce_weight=0.0, label_smoothing=0.0,
) -> Tensor:  # fmt: skip
    """Validate, choose the backend, call."""
    checks.logits(name, student, teacher)
    rows = prepare(
        name, "rowwise", student, compute_dtype(student, teacher), labels, temperature,
        teacher_temperature, scale, reduction, mask, ignore_index, row_weight, backend,
    )  # fmt: skip
    numbers = Numbers(
        rows.temperature, rows.teacher_temperature, kd_weight, ce_weight, label_smoothing, alpha,
        beta,
    )  # fmt: skip
    choices = Choices(divergences.KINDS.index(kind), rows.t2, rows.reduction, ignore_index)
    if inplace:
        others = {"teacher": teacher, "labels": labels, "mask": mask, "row_weight": row_weight}
        checks.inplace(name, student, others)
    if rows.backend == "reference":
        if inplace:
            raise NotImplementedError(f"{name}: inplace=True needs a kernel, not the reference.")
        return reference.rowwise(student, teacher, rows, numbers, choices)
    try:
        return ops.rowwise.apply(
            name, rows.backend, student, teacher, rows, numbers, choices, inplace
        )
    except RuntimeError as error:
        checks.raise_for_labels(name, error)
        raise


for _function in (kl_div, reverse_kl_div, js_div, tv_distance, divergence, kd_loss):
    # help() shows the rules that the functions share, which the module states once.
    _function.__doc__ = f"{inspect.cleandoc(_function.__doc__)}\n\n{__doc__}"
