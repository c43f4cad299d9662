# SPDX-License-Identifier: Apache-2.0
"""Losses between vectors: embeddings of samples, hidden states of tokens, raw logits.

They are composite by design: plain torch, which ``backend="auto"`` and ``"reference"`` both mean,
differentiable to any order. fp64, fp32, bf16 and fp16, any strides; computed in fp32 (fp64 if a
side is), returned so, 0-d. Gradients to all tensors that require one. No rows: 0.

Raises ``ValueError`` for a shape or value out of range, ``TypeError`` for a dtype, ``RuntimeError``
for any other ``backend``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdkernels import backends, checks, reference
from kdkernels.functional import rules
from kdkernels.functional.features import REDUCTIONS, pair, stages
from kdkernels.ops.features import compute_dtype

__all__ = ["embedding_loss", "sgkd_loss", "srrl_loss"]


DISTANCES = ("mse", "l2", "cosine")


def embedding_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    distance: str = "mse",
    mask: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Distance of vectors (..., D): the mean over rows, and over the tensors of a sequence.

    distance:
        ``"mse"``: ``|s - t|^2 / D``, as between hidden states (DistillKit, TextBrewer).
        ``"l2"``: ``|s - t|``, as EmbedDistill (arXiv 2301.12005) has it for queries and documents.
        ``"cosine"``: ``1 - <s, t> / (|s| |t|)``, between hidden states (DistillKit) or, with
        ``reduction="sum"``, logits (Liger). Without cancellation: equal directions give exactly
        0. A row of zeros has cosine 0.

    Args:
        student, teacher: of one shape, or a sequence of them: layers, queries and documents. Where
            the widths differ a projection comes first, as in :class:`kdkernels.EmbeddingLoss`.
        mask: bool (...), True where the row counts, in every tensor.
        reduction: ``"mean"``, or the ``"sum"`` over rows, dimensions and tensors.
    """
    name = "embedding_loss"
    checks.choice(name, "distance", distance, DISTANCES)
    checks.choice(name, "reduction", reduction, REDUCTIONS)
    total, pairs = 0.0, stages(name, student, teacher)
    for s, t in pairs:
        pair(name, s, t, shape="(..., D)")
        _composite(name, s, backend)
        rows = None
        if mask is not None:
            rows = checks.per_row(name, "mask", mask, s, None).view(mask.shape)
        with _exactly(s):
            total = total + reference.embedding(s, t, rows, distance, reduction == "mean")
    return total / len(pairs) if reduction == "mean" else total


def srrl_loss(
    student: Tensor,
    teacher: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """SRRL (ICLR 2021): softmax regression by the teacher's own classifier.

    ``alpha MSE(pool(student), pool(teacher)) + beta MSE(student_logits, teacher_logits)``.

    Args:
        student, teacher: feature maps (B, C, H, W), which are averaged over positions, or features
            (B, C); the student's after a connector to the teacher's width.
        student_logits: (B, K) the teacher's classifier of the pooled ``student``.
        teacher_logits: (B, K).
        alpha, beta: numbers; 1 and 1 in SimKD's repository, 1 and 5 in cls_KD.
        reduction: ``"mean"`` over all elements, in each term, or the ``"sum"``.
    """
    name = "srrl_loss"
    alpha, beta = checks.number(name, "alpha", alpha), checks.number(name, "beta", beta)
    checks.choice(name, "reduction", reduction, REDUCTIONS)
    pair(name, student, teacher, shape="(B, C, ...)", same=(0, 1))
    for argument, value in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        checks.floats(name, argument, value)
        if value.dim() != 2 or len(value) != len(student) or value.shape != student_logits.shape:
            raise ValueError(
                f"{name}: {argument} must have shape ({len(student)}, K), alike on both sides, got "
                f"{tuple(value.shape)}."
            )
        checks.same_device(name, argument, value, student)
    _composite(name, student, backend)
    dtype = compute_dtype(student, teacher, student_logits, teacher_logits)
    pooled = (x.to(dtype).flatten(2).mean(-1) if x.dim() > 2 else x for x in (student, teacher))
    mean = reduction == "mean"
    with _exactly(student):
        return alpha * reference.embedding(*pooled, None, "mse", mean) + beta * (
            reference.embedding(student_logits, teacher_logits, None, "mse", mean)
        )


def sgkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 5.0,
    quantile: float = 0.9,
    detach_weights: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Student-guided distillation (SSD, arXiv 2504.14307): MSE to what the student attends to.

    Of n stochastic representations f_i of a sample, ``w = softmax(<f, f_i> / temperature)`` over i,
    those below the ``quantile`` of a sample's weights set to 0, the rest normalised to 1. The loss
    is the mean over all elements of ``(f - sum_i w_i f_i)^2``.

    Args:
        student: f, (B, D).
        teacher: (B, n, D), of n passes of the teacher with its dropout active.
        temperature: a positive number, called h there.
        quantile: in [0, 1], by linear interpolation.
        detach_weights: the weights are constants to the gradient. In the published code they are
            not: the student's gradient passes through its own attention.
        reduction: ``"mean"``, or the ``"sum"`` over samples and dimensions.
    """
    name = "sgkd_loss"
    checks.number(name, "quantile", quantile, 0.0, 1.0)
    if checks.number(name, "temperature", temperature) <= 0:
        raise ValueError(f"{name}: temperature must be positive, got {temperature}.")
    checks.flag(name, "detach_weights", detach_weights)
    checks.choice(name, "reduction", reduction, REDUCTIONS)
    checks.floats(name, "student", student)
    checks.floats(name, "teacher", teacher)
    if student.dim() != 2 or not student.shape[1]:
        raise ValueError(f"{name}: student must have shape (B, D), got {tuple(student.shape)}.")
    if teacher.dim() != 3 or teacher.shape[::2] != student.shape or not teacher.shape[1]:
        raise ValueError(
            f"{name}: teacher must have the student's samples and width, "
            f"({student.shape[0]}, n, {student.shape[1]}), got {tuple(teacher.shape)}."
        )
    checks.same_device(name, "teacher", teacher, student)
    _composite(name, student, backend)
    dtype = compute_dtype(student, teacher)
    student, teacher = student.to(dtype), teacher.to(dtype)
    with _exactly(student):
        target = reference.attended(student, teacher, temperature, quantile, detach_weights)
        return reference.embedding(student, target, None, "mse", reduction == "mean")


def _composite(name: str, student: Tensor, backend: str) -> None:
    backends.select("embeddings", student.device.type, backend, name)


def _exactly(student: Tensor):
    return torch.autocast(student.device.type, enabled=False)


rules.share(__doc__, embedding_loss, srrl_loss, sgkd_loss)
