# SPDX-License-Identifier: Apache-2.0
"""Relations among the embeddings of a batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdkernels import backends, checks, ops, reference
from kdkernels.functional.features import REDUCTIONS, pair
from kdkernels.ops.relation import MOST_COEFFICIENTS, RKDChoices, RKDNumbers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _prepare(name, operator, student, teacher, reduction, group, backend, same=(0,)):
    """Validated embeddings of all ranks, and the backend."""
    checks.choice(name, "reduction", reduction, REDUCTIONS)
    pair(name, student, teacher, shape="(B, D)", same=same)
    backend = backends.select(f"relation.{operator}", student.device.type, backend, name)
    if group is not None:
        from kdkernels.distributed import gather_rows

        student, teacher = gather_rows(group, student, teacher)
    return student, teacher, backend


def _reference(operator, student, teacher, *options) -> Tensor:
    with torch.autocast(student.device.type, enabled=False):
        return getattr(reference.relation, operator)(student, teacher, *options)


def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    squared: bool = False,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Relational KD (arXiv 1904.05068) of embeddings (B, D) and (B, D').

    ``distance_weight`` times :func:`rkd_distance` plus ``angle_weight`` times :func:`rkd_angle`, in
    one pass over pairs and triples of samples. Distances and angles come from one B x B Gram matrix
    of the centred embeddings in fp64, and nothing of size B^3 is stored. ``squared`` is that of
    distances. The default weights are mdistiller's and RepDistiller's; torchdistill's are 1 and 2.
    """
    weights = distance_weight, angle_weight
    return _rkd("rkd_loss", student, teacher, weights, squared, reduction, group, backend)


def rkd_distance(
    student: Tensor,
    teacher: Tensor,
    *,
    squared: bool = False,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """The distances of relational KD (arXiv 1904.05068) of embeddings (B, D) and (B, D').

    The mean over all B^2 pairs of ``smooth_l1(d_ij^s / mu^s, d_ij^t / mu^t)``, where mu is the mean
    of the positive distances, which is differentiated too. As in the suites, ``d_ij`` of two
    samples is at least 1e-6; there its gradient is 0. ``squared`` takes squared distances, which
    are at least 1e-12.
    """
    return _rkd("rkd_distance", student, teacher, (1.0, 0.0), squared, reduction, group, backend)


def rkd_angle(
    student: Tensor,
    teacher: Tensor,
    *,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """The angles of relational KD (arXiv 1904.05068) of embeddings (B, D) and (B, D').

    The mean over all B^3 triples of ``smooth_l1(u_ij . u_ik)`` between student and teacher, with
    ``u_ij`` the unit vector from sample i to j. Samples that coincide (at under 3e-7 of their
    distances from the centre) have ``u_ij = 0`` and no gradient from it; the suites' explodes.
    """
    return _rkd("rkd_angle", student, teacher, (0.0, 1.0), False, reduction, group, backend)


def _rkd(name, student, teacher, weights, squared, reduction, group, backend):
    weights = [
        checks.number(name, argument, value)
        for argument, value in zip(("distance_weight", "angle_weight"), weights, strict=True)
    ]
    choices = RKDChoices(checks.flag(name, "squared", squared))
    student, teacher, backend = _prepare(name, "rkd", student, teacher, reduction, group, backend)
    # A row's part in pairs over their number is about 1 / B, in triples as well.
    rows = max(student.shape[0], 1)
    if reduction == "mean":
        factor, divisors = 1 / rows, (rows, rows**2)
    else:
        factor, divisors = float(rows**2), (rows**2, rows**2)
    numbers = RKDNumbers(*(w / n for w, n in zip(weights, divisors, strict=True)))
    if backend == "reference":
        return _reference("rkd", student, teacher, numbers, choices) * factor
    return ops.relation.embeddings(name, "rkd", backend, student, teacher, factor, numbers, choices)


def pkt_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    eps: float = 1e-7,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Probabilistic knowledge transfer (arXiv 1803.10837) of embeddings (B, D) and (B, D').

    With ``S = (x x' + 1) / 2`` of the rows ``x / (|x| + eps)`` and P = S with rows over their sums,
    the mean over all B^2 pairs of ``P^t log((P^t + eps) / (P^s + eps))``. torchdistill's ``eps`` is
    1e-6. A row of zeros has the gradient of the formula, ``1 / eps`` times its direction's.
    """
    name = "pkt_loss"
    eps = checks.number(name, "eps", eps)
    if not 0 < eps < 1:
        raise ValueError(f"{name}: eps must be in (0, 1), got {eps}.")
    student, teacher, backend = _prepare(name, "pkt", student, teacher, reduction, group, backend)
    factor = 1 / max(student.shape[0], 1) ** 2 if reduction == "mean" else 1.0
    if backend == "reference":
        return _reference("pkt", student, teacher, eps) * factor
    return ops.relation.embeddings(name, "pkt", backend, student, teacher, factor, (eps,))


def cc_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: str = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    backend: str = "auto",
    compat: str = "paper",
) -> Tensor:
    """Correlation congruence (arXiv 1904.01802) of embeddings (B, D) and (B, D').

    ``||K(student) - K(teacher)||_F^2 / B^2`` of the samples' correlations K: of the "gaussian"
    kernel, its Taylor series ``exp(-2 gamma) sum_{p=0..order} (2 gamma)^p / p! (x_i . x_j)^p``, for
    rows of length 1, which are not made so here; or "bilinear", ``x_i . x_j``. Both sides are
    differentiated, for the embeddings of either may be learned (:class:`kdkernels.CCLoss`).

    compat:
        ``"paper"``: as above.
        ``"torchdistill"``: the norm, not squared.
        ``"repdistiller"``: no correlations, but of neighbours in the batch: the mean over
        consecutive samples of ``sum_k d_ik d_(i+1)k`` with ``d = |student - teacher|``, of one
        width; ``kernel``, ``gamma`` and ``order`` mean nothing there.
    """
    name = "cc_loss"
    checks.choice(name, "compat", compat, ("paper", "torchdistill", "repdistiller"))
    checks.choice(name, "kernel", kernel, ("gaussian", "bilinear"))
    gamma = checks.number(name, "gamma", gamma)
    if not 0 < checks.integer(name, "order", order) < MOST_COEFFICIENTS:
        raise ValueError(f"{name}: order must be in [1, {MOST_COEFFICIENTS}), got {order}.")
    beside = compat == "repdistiller"
    operator, same = ("neighbours", None) if beside else ("polynomial", (0,))
    student, teacher, backend = _prepare(
        name, operator, student, teacher, reduction, group, backend, same
    )
    rows = student.shape[0]
    if beside:
        factor = 1 / max(rows - 1, 1) if reduction == "mean" else 1.0
        numbers, choices, of_reference = (), (), ()
    else:
        factor = 1 / max(rows, 1) ** 2 if reduction == "mean" else 1.0
        norm = compat == "torchdistill"
        numbers, choices = _series(kernel, gamma, order), (norm,)
        of_reference = numbers, norm
    if backend == "reference":
        return _reference(operator, student, teacher, *of_reference) * factor
    return ops.relation.embeddings(
        name, operator, backend, student, teacher, factor, numbers, choices
    )


def _series(kernel: str, gamma: float, order: int) -> tuple[float, ...]:
    """The kernel as coefficients by rising power."""
    if kernel == "bilinear":
        return 0.0, 1.0
    return tuple(
        math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) for p in range(order + 1)
    )
