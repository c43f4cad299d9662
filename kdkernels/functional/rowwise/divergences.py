# SPDX-License-Identifier: Apache-2.0
"""The divergences of two rows of logits."""

from __future__ import annotations

from torch import Tensor

from kdkernels import checks, divergences
from kdkernels.functional.rowwise.call import run

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
    standardize: bool = False,
    class_range: tuple[int, int] | None = None,
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
    return run(
        "kl_div", kind, student, teacher, labels, temperature, teacher_temperature, scale,
        reduction, mask, ignore_index, row_weight, standardize, class_range, inplace, backend,
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
    standardize: bool = False,
    class_range: tuple[int, int] | None = None,
    inplace: bool = False,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Reverse KL divergence of MiniLLM (arXiv 2306.08543), ``T^2 KL(p_s || p_t)``.

    Arguments, result and errors as in :mod:`kdkernels.functional.rowwise`. torchtune and TRL do not
    multiply by ``T^2``: ``scale="none"``.
    """
    checks.choice("reverse_kl_div", "compat", compat, ("paper", "torchtune", "trl"))
    return run(
        "reverse_kl_div", "reverse_kl", student, teacher, labels, temperature,
        teacher_temperature, scale, reduction, mask, ignore_index, row_weight, standardize,
        class_range, inplace, backend,
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
    standardize: bool = False,
    class_range: tuple[int, int] | None = None,
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
    return run(
        "js_div", kind, student, teacher, labels, temperature, teacher_temperature, scale,
        reduction, mask, ignore_index, row_weight, standardize, class_range, inplace, backend,
        beta=beta,
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
    standardize: bool = False,
    class_range: tuple[int, int] | None = None,
    inplace: bool = False,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Total variation distance (f-distill, arXiv 2307.15190), ``T^2 / 2 sum_c |p_t - p_s|``.

    Where ``p_t = p_s`` the subgradient 0 is used. Arguments, result and errors as in
    :mod:`kdkernels.functional.rowwise`.
    """
    checks.choice("tv_distance", "compat", compat, ("paper", "distillkit"))
    return run(
        "tv_distance", "tv", student, teacher, labels, temperature, teacher_temperature, scale,
        reduction, mask, ignore_index, row_weight, standardize, class_range, inplace, backend,
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
    standardize: bool = False,
    class_range: tuple[int, int] | None = None,
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
    return run(
        "divergence", kernel_kind, student, teacher, labels, temperature, teacher_temperature,
        scale, reduction, mask, ignore_index, row_weight, standardize, class_range, inplace,
        backend, alpha=alpha, beta=beta, kd_weight=weight,
    )  # fmt: skip
