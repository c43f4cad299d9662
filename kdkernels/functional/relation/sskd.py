# SPDX-License-Identifier: Apache-2.0
"""Self-supervision as knowledge: which view belongs to which sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import checks
from kdkernels.functional.features import REDUCTIONS, pair
from kdkernels.functional.rowwise import kl_div
from kdkernels.ops.features import compute_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def least_wrong(scores: Tensor, labels: Tensor, ratio: float) -> Tensor:
    """Rows to learn from: bool (N,), True where ``scores`` (N, C) are right or least wrong.

    A row is right where no class's score is above its label's. Of the others the fraction ``ratio``
    is kept, rounded down, by rising rank of the label; among equal ranks, earlier rows first.
    """
    name = "least_wrong"
    checks.floats(name, "scores", scores)
    ratio = checks.number(name, "ratio", ratio)
    if not 0 <= ratio <= 1:
        raise ValueError(f"{name}: ratio must be in [0, 1], got {ratio}.")
    order = scores.argsort(dim=1, descending=True)
    rank = (order == labels.unsqueeze(1)).to(torch.uint8).argmax(1)
    wrong = (rank > 0).sum()
    kept = len(rank) - wrong + (wrong * ratio).long()
    place = torch.empty_like(rank)
    place[rank.argsort(stable=True)] = torch.arange(len(rank), device=rank.device)
    return place < kept


def sskd_similarity(
    student: Tensor,
    teacher: Tensor,
    *,
    views: int = 4,
    temperature: float = 0.5,
    ratio: float = 0.75,
    scale: str = "t2",
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """The similarity term of SSKD (arXiv 2006.07114), of embeddings (B, D) and (B, D').

    Rows are samples in turn, each with its ``views``: the plain one, then transformed ones. Every
    transformed view has cosine similarities to all plain ones; the loss is ``T^2 KL(teacher ||
    student)`` of their softmaxes at ``temperature`` T, the mean over the rows in which the teacher
    finds the view's own sample, or is :func:`least_wrong` by ``ratio``. ``reduction="sum"`` is the
    sum over these rows, ``scale="none"`` leaves out ``T^2``.
    """
    name = "sskd_similarity"
    checks.choice(name, "reduction", reduction, REDUCTIONS)
    pair(name, student, teacher, shape="(B, D)", same=(0,))
    if checks.integer(name, "views", views) < 2 or student.shape[0] % views:
        raise ValueError(
            f"{name}: views must be at least 2 and divide the batch of {student.shape[0]}, "
            f"got {views}."
        )
    if group is not None:
        from kdkernels.distributed import gather_rows

        student, teacher = gather_rows(group, student, teacher)
    dtype, samples = compute_dtype(student, teacher), student.shape[0] // views
    if not samples:
        return (student.sum() + teacher.sum()).to(dtype)
    with torch.autocast(student.device.type, enabled=False):
        s, t = (_similarities(x.to(dtype), views) for x in (student, teacher))
    own = torch.arange(samples, device=s.device).repeat_interleave(views - 1)
    return kl_div(
        s, t, temperature=temperature, scale=scale, mask=least_wrong(t, own, ratio),
        reduction="batchmean" if reduction == "mean" else "sum", backend=backend,
    )  # fmt: skip


def _similarities(x: Tensor, views: int) -> Tensor:
    """Cosines (samples * (views - 1), samples) of transformed views to plain ones."""
    plain, others = x.unflatten(0, (-1, views)).split([1, views - 1], dim=1)
    return F.normalize(others.flatten(0, 1), dim=1) @ F.normalize(plain.squeeze(1), dim=1).mT
