# SPDX-License-Identifier: Apache-2.0
"""The rowwise family's divergences by name, and the numbers a kernel call takes; knows no torch."""

from __future__ import annotations

from typing import NamedTuple

from kdkernels.scalars import choice, number

# The order is that of the `Kind` enumeration of csrc/kd/rowwise.h.
KINDS = (
    "forward_kl",
    "reverse_kl",
    "js",
    "tv",
    "skew_forward",
    "skew_reverse",
    "jeffreys",
    "ab",
    "renyi",
    "cross_entropy",
)
# What a loss does with the row's target class; the order is that of `Target` there.
TARGETS = ("ordinary", "decoupled", "separate", "tempered", "weighting")
REDUCTIONS = ("none", "sum", "batchmean", "mean")
SCALES = ("t2", "none")
STANDARD_EPS = 1e-7  # added to the deviation of a standardised row
# Added to the teacher's cross-entropy, by which WSLD (arXiv 2102.00650) divides the student's.
WEIGHTING_EPS = 1e-7


class Numbers(NamedTuple):
    """Fields in the order of `RowwiseNumbers` in csrc/kd/rowwise.h."""

    temperature: float = 1.0
    teacher_temperature: float = 0.0  # 0: the student's, be that a number or a tensor
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    label_smoothing: float = 0.0
    alpha: float = 0.0
    beta: float = 0.0
    target_weight: float = 0.0
    target_temperature: float = 0.0


class Choices(NamedTuple):
    """Fields in the order of `RowwiseChoices`; strings are given by their index."""

    kind: int = 0
    t2: bool = True
    reduction: int = 0
    ignore_index: int = -100
    target: int = 0
    standardize: bool = False
    first: int = 0  # the classes of the divergence
    width: int = 0  # 0: all of them


# What a top-k teacher says of the other classes, in the order of `Missing` in csrc/kd/sparse.h.
MISSING = ("tail", "zero", "renormalize")
# The teacher's tail, of which rounding has left nothing, where reverse KL would be infinite.
LEAST_TAIL = 1e-7


class TopKNumbers(NamedTuple):
    """Fields in the order of `TopKNumbers` in csrc/kd/sparse.h."""

    temperature: float = 1.0
    teacher_temperature: float = 0.0  # 0: the student's, be that a number or a tensor
    beta: float = 0.0


class TopKChoices(NamedTuple):
    """Fields in the order of `TopKChoices`; missing indexes MISSING."""

    kind: int = 0
    t2: bool = True
    reduction: int = 0
    ignore_index: int = -100
    missing: int = 0
    spread: bool = True  # a temperature acts on the tail as on classes of equal mass


# Default alpha and beta of each kind that takes them.
_PARAMETERS = {
    "js": (None, 0.5),
    "skew_forward": (0.1, None),
    "skew_reverse": (0.1, None),
    "alpha": (0.5, None),
    "renyi": (0.5, None),
    "ab": (0.2, 0.7),
}
DIVERGENCES = (
    "forward_kl", "reverse_kl", "js", "tv", "skew_forward", "skew_reverse", "jeffreys", "alpha",
    "renyi", "hellinger", "chi2", "ab",
)  # fmt: skip


def resolve(name: str, kind: str, alpha, beta) -> tuple[str, float, float, float]:
    """The kernel's kind, parameters and weight: limits and special cases share kernels."""
    choice(name, "kind", kind, DIVERGENCES)
    values = []
    for argument, value, default in zip(
        ("alpha", "beta"), (alpha, beta), _PARAMETERS.get(kind, (None, None)), strict=True
    ):
        if default is None and value is not None:
            raise ValueError(f"{name}: kind={kind!r} takes no {argument}, got {value}.")
        values.append(number(name, argument, default or 0.0 if value is None else value))
    alpha, beta = values
    if kind == "js":
        number(name, "beta", beta, 0.0, 1.0)
        return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, kind), alpha, beta, 1.0
    if kind in ("skew_forward", "skew_reverse"):
        if not 0.0 <= alpha < 1.0:
            raise ValueError(f"{name}: alpha must be in [0, 1) for kind={kind!r}, got {alpha}.")
        if alpha == 0.0:
            kind = kind.removeprefix("skew_") + "_kl"
    elif kind == "hellinger":
        return "ab", 0.5, 0.5, 0.25
    elif kind == "chi2":
        return "ab", 2.0, -1.0, 2.0
    elif kind in ("alpha", "renyi"):
        if kind == "renyi" and alpha <= 0:
            raise ValueError(f"{name}: alpha must be positive for kind='renyi', got {alpha}.")
        kind = {1.0: "forward_kl", 0.0: "reverse_kl"}.get(alpha, "ab" if kind == "alpha" else kind)
        return kind, alpha, 1.0 - alpha, 1.0
    elif kind == "ab" and (alpha == 0 or beta == 0 or alpha + beta == 0):
        raise ValueError(
            f"{name}: alpha, beta and alpha + beta must be non-zero for kind='ab', "
            f"got alpha={alpha}, beta={beta}."
        )
    return kind, alpha, beta, 1.0
