# SPDX-License-Identifier: Apache-2.0
"""Losses that contrast a sample's embedding with a memory bank of all samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdkernels import backends, checks, ops, reference
from kdkernels.functional.features import REDUCTIONS, pair
from kdkernels.ops.contrast import CrdNumbers
from kdkernels.ops.features import compute_dtype
from kdkernels.reference.embeddings import unit_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["crd_loss", "crd_normalizer", "sample_negatives"]


def crd_loss(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    index: Tensor,
    negatives: Tensor,
    normalizer: Tensor | None = None,
    *,
    temperature: float = 0.07,
    eps: float = 1e-7,
    normalize: bool = True,
    momentum: float | None = None,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Contrastive representation distillation (arXiv 1910.10699) against memory banks.

    The student's embedding is scored against the teacher's bank, ``P_k = exp(<v, w_k> / T) / Z``,
    at its own row (k = 0) and those of K negatives, and the teacher's against the student's bank.
    With ``c = K / n + eps``, each adds
    ``-log(P_0 / (P_0 + c)) - sum_k log((K / n) / (P_k + c))``, in nats.

    Args:
        student, teacher: embeddings (B, D); fp64, fp32, bf16 or fp16, any strides, whose rows are
            divided by their norms unless ``normalize=False`` (they have unit norm already). Both
            get a gradient where they require one: each side's embedding layer is trained.
        student_bank, teacher_bank: (n, D) fp32 or fp64, an embedding of each sample of the data
            set. They have no gradient.
        index: (B,) the samples' rows in the banks.
        negatives: (B, K) rows of samples to contrast them with, K >= 1, as
            :func:`sample_negatives` draws them; ascending int32 spares the CPU's kernel a copy.
        normalizer: (2,) the Z of the student's and of the teacher's scores, constants to the
            gradient. By default those of this batch, :func:`crd_normalizer`; the method keeps its
            first batch's.
        temperature: T, a number.
        momentum: where given, both banks are updated in place once the scores are known,
            ``w <- unit(momentum w + (1 - momentum) v)``. Of samples that occur several times in
            ``index``, the last counts.
        reduction: ``"mean"`` over the B samples or their ``"sum"``; over the scores it is a sum.
        group: the loss is that of all ranks' samples, on every rank, and its gradient the one that
            DDP's averaging turns into that of one process. All ranks' embeddings enter the update,
            so banks that are equal on all ranks stay so. Not under
            ``torch.compile(fullgraph=True)``.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``; anything but
            ``"auto"`` raises where it cannot run.

    Returns the loss, fp32 (fp64 if any of the tensors is), 0-d; of no samples 0. Nothing of size
    B K D is stored. An embedding of zeros scores 0 everywhere. Finite scores of any size are finite
    losses: P itself is never formed. The suites agree; torchdistill's embeddings come normalised.

    Raises ``ValueError`` for a shape or value out of range (on a GPU a row outside the bank gives
    NaN instead, and its update fails there), ``TypeError`` for a dtype, ``RuntimeError`` where the
    demanded backend cannot run.
    A second derivative, or a ``torch.func`` transform, needs ``backend="reference"``.
    """
    name = "crd_loss"
    numbers = CrdNumbers(_temperature(name, temperature), checks.number(name, "eps", eps, 0.0))
    checks.choice(name, "reduction", reduction, REDUCTIONS)
    if momentum is not None:
        checks.number(name, "momentum", momentum, 0.0, 1.0)
    pair(name, student, teacher, shape="(B, D)")
    backend = backends.select("contrast.crd", student.device.type, backend, name)
    # The compiled kernel looks at every index itself.
    read = backend != "cpu" or normalizer is None
    index, negatives = _prepare(name, student, student_bank, teacher_bank, index, negatives, read)
    if backend != "cpu":  # whose kernel reads int32, too
        negatives = negatives.long()
    student, teacher = _anchors(student, teacher, student_bank, teacher_bank, normalize)
    dtype = student.dtype
    if normalizer is None:
        normalizer = _normalizer(
            student, teacher, student_bank, teacher_bank, index, negatives, temperature, group
        )
    else:
        checks.floats(name, "normalizer", normalizer)
        if normalizer.shape != (2,) or normalizer.requires_grad:
            raise ValueError(
                f"{name}: normalizer must have shape (2,) and no gradient, got "
                f"{tuple(normalizer.shape)}."
            )
        checks.same_device(name, "normalizer", normalizer, student)
    samples = len(student) if group is None else _total(group, student)
    factor = 1 / max(samples, 1) if reduction == "mean" else 1.0
    banks = [bank.to(dtype).contiguous() for bank in (student_bank, teacher_bank)]
    tensors = (student, teacher, *banks, normalizer.to(dtype).contiguous(), index, negatives)
    if backend == "reference":
        if momentum is not None:  # autograd keeps the banks for the backward
            tensors = (student, teacher, *(b.clone() for b in banks), *tensors[4:])
        with torch.autocast(student.device.type, enabled=False):
            loss = reference.crd(*tensors, factor, numbers)
    else:
        try:
            loss = ops.features.call(name, "contrast.crd", backend, tensors, factor, numbers)
        except RuntimeError as error:
            checks.raise_for_labels(name, error, "index and negatives")
            raise
    if momentum is not None:
        _update(student, teacher, student_bank, teacher_bank, index, momentum, group)
    if group is not None:
        from kdkernels.distributed import sum_ranks

        loss = sum_ranks(group, loss)
    return loss


def crd_normalizer(
    student: Tensor,
    teacher: Tensor,
    student_bank: Tensor,
    teacher_bank: Tensor,
    index: Tensor,
    negatives: Tensor,
    *,
    temperature: float = 0.07,
    normalize: bool = True,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The Z (2,) of :func:`crd_loss` from a first batch: n times the mean of ``exp(<v, w> / T)``.

    Arguments as there; plain torch, no gradient, nothing of size B K D stored. With ``group`` the
    mean is over all ranks' scores. No samples: 1.
    """
    name = "crd_normalizer"
    pair(name, student, teacher, shape="(B, D)")
    temperature = _temperature(name, temperature)
    index, negatives = _prepare(
        name, student, student_bank, teacher_bank, index, negatives, read=True
    )
    negatives = negatives.long()
    student, teacher = _anchors(student, teacher, student_bank, teacher_bank, normalize)
    return _normalizer(
        student, teacher, student_bank, teacher_bank, index, negatives, temperature, group
    )


@torch.no_grad()
def sample_negatives(
    labels: Tensor,
    index: Tensor,
    num_negatives: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.int64,
    backend: str = "auto",
) -> Tensor:
    """``num_negatives`` samples of other classes (B, K) for each of the samples ``index`` (B,).

    ``labels`` (n,) are the classes of the whole data set. Each row is drawn without replacement,
    uniformly; where there are fewer other samples than K, each of them occurs K / their number
    times, rounded up or down. The rows of one call are windows of one shuffle of the data set: each
    by itself is random, but they are not independent of each other.

    ``generator`` (on the labels' device) makes it reproducible. ``dtype`` is int64, or int32, which
    the CPU's kernels write and read without a conversion. The order within a row is the backend's
    (``"auto"``, ``"reference"`` or ``"cpu"``). The host does not wait for a GPU. Raises
    ``ValueError`` where all samples are of one class, or their numbers not of the dtype.
    """
    name = "sample_negatives"
    labels = _integers(name, "labels", labels, 1).long()
    index = _integers(name, "index", index, 1).long()
    if checks.integer(name, "num_negatives", num_negatives) < 1:
        raise ValueError(f"{name}: num_negatives must be at least 1, got {num_negatives}.")
    if dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: dtype must be torch.int64 or torch.int32, got {dtype}.")
    checks.same_device(name, "index", index, labels)
    n, device = len(labels), labels.device
    checks.indices(name, "index", index, n)
    if n > torch.iinfo(dtype).max:
        raise ValueError(f"{name}: dtype must hold the numbers of {n} samples, got {dtype}.")
    backend = backends.select("contrast.sample_negatives", device.type, backend, name)
    if backend != "cpu" and len(index) and checks.readable(labels) and (labels == labels[0]).all():
        raise ValueError(f"{name}: labels must be of more than one class.")
    shuffle = torch.randperm(n, generator=generator, device=device)
    # Where in the shuffle each window begins.
    begin = torch.rand(len(index), generator=generator, device=device, dtype=torch.float64)
    begin = (begin * n).long()
    draw = torch.ops.kdkernels.sample_negatives if backend == "cpu" else reference.negatives
    try:
        drawn = draw(labels.contiguous(), index.contiguous(), shuffle, begin, num_negatives)
    except RuntimeError as error:
        checks.raise_for_labels(name, error)
        raise
    return drawn.to(dtype)


def _temperature(name, temperature) -> float:
    value = checks.number(name, "temperature", temperature)
    if value <= 0:
        raise ValueError(f"{name}: temperature must be positive, got {value}.")
    return value


def _integers(name, argument, value, dims) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(value).__name__}.")
    if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"{name}: {argument} must be integers, got {value.dtype}.")
    if value.dim() != dims:
        shape = "(n,)" if dims == 1 else "(B, K)"
        raise ValueError(f"{name}: {argument} must have shape {shape}, got {tuple(value.shape)}.")
    return value


def _prepare(name, student, student_bank, teacher_bank, index, negatives, read):
    """Check banks and indices, whose values where ``read``; int64, negatives also int32."""
    for argument, bank in (("student_bank", student_bank), ("teacher_bank", teacher_bank)):
        checks.floats(name, argument, bank)
        if bank.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: {argument} must be float32 or float64, got {bank.dtype}.")
        if bank.dim() != 2 or bank.shape[1] != student.shape[1] or not len(bank):
            raise ValueError(
                f"{name}: {argument} must have shape (n, {student.shape[1]}) with n >= 1, got "
                f"{tuple(bank.shape)}."
            )
        if bank.requires_grad:
            raise ValueError(f"{name}: {argument} must not require a gradient.")
        checks.same_device(name, argument, bank, student)
    n = len(student_bank)
    if len(teacher_bank) != n:
        raise ValueError(
            f"{name}: teacher_bank must have the student_bank's {n} rows, got {len(teacher_bank)}."
        )
    index = _integers(name, "index", index, 1).long()
    negatives = _integers(name, "negatives", negatives, 2)
    if negatives.dtype != torch.int32:
        negatives = negatives.long()
    for argument, value in (("index", index), ("negatives", negatives)):
        if len(value) != len(student) or (value.dim() > 1 and not value.shape[1]):
            raise ValueError(
                f"{name}: {argument} must be of the student's {len(student)} samples, got shape "
                f"{tuple(value.shape)}."
            )
        checks.same_device(name, argument, value, student)
        if read:
            checks.indices(name, argument, value, n)
    if negatives.stride(1) != 1:
        negatives = negatives.contiguous()
    return index.contiguous(), negatives


def _anchors(student, teacher, student_bank, teacher_bank, normalize):
    """The embeddings as they are scored, in the dtype that is accumulated in."""
    dtype = compute_dtype(student, teacher, student_bank, teacher_bank)
    both = (student.to(dtype), teacher.to(dtype))
    return [(unit_rows(x) if normalize else x).contiguous() for x in both]


@torch.no_grad()
def _normalizer(student, teacher, student_bank, teacher_bank, index, negatives, temperature, group):
    chosen = torch.cat([index.unsqueeze(1), negatives], 1)
    sums, rows = [], max(2**22 // len(student_bank), 1)
    with torch.autocast(student.device.type, enabled=False):
        for anchors, bank in ((student, teacher_bank), (teacher, student_bank)):
            bank = bank.to(anchors.dtype)
            scores = (
                (v @ bank.T / temperature).exp().gather(1, at).sum()
                for v, at in zip(anchors.split(rows), chosen.split(rows), strict=True)
            )
            sums.append(sum(scores, anchors.new_zeros(())))
    found = torch.stack([*sums, sums[0].new_tensor(chosen.numel())])
    if group is not None:
        from kdkernels.distributed import sum_ranks

        found = sum_ranks(group, found)
    return torch.where(found[2] > 0, found[:2] * (len(student_bank) / found[2]), 1.0)


def _total(group, student) -> int:
    from kdkernels.distributed import sum_ranks

    return int(sum_ranks(group, torch.tensor(len(student), device=student.device)))


@torch.no_grad()
def _update(student, teacher, student_bank, teacher_bank, index, momentum, group) -> None:
    student, teacher = student.detach(), teacher.detach()
    if group is not None:
        from kdkernels.distributed import gather_rows

        student, teacher, index = gather_rows(group, student, teacher, index)
    index, order = index.sort(stable=True)
    # Every occurrence writes what the last one does: the result depends on no order of writes.
    last = order[torch.searchsorted(index, index, right=True) - 1]
    banks, anchors = (student_bank, teacher_bank), torch.stack([student, teacher])
    kept = torch.stack([bank[index].to(anchors.dtype) for bank in banks])
    moved = unit_rows(momentum * kept + (1 - momentum) * anchors[:, last])
    for bank, rows in zip(banks, moved, strict=True):
        bank.index_copy_(0, index, rows.to(bank.dtype))
