# SPDX-License-Identifier: Apache-2.0
"""The losses of other packages on the fused kernels: same signature, same default value.

Change the import, and nothing else:

==================================  ===============================================================
here                                replaces
==================================  ===============================================================
``kl_div_from_logits``              ``F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1))``
``KLDivFromLogits``                 ``torch.nn.KLDivLoss`` fed likewise
``DistillKL``                       RepDistiller's ``distiller_zoo.KD.DistillKL``
``kd_loss``, ``dkd_loss``           mdistiller's ``distillers.KD.kd_loss``, ``DKD.dkd_loss``, and
                                    those of its fork with logit standardisation
``DIST``                            ``losses.dist_kd.DIST`` of DIST's authors
``NKDLoss``                         cls_KD's ``dis_losses.nkd.NKDLoss``
``generalized_jsd_loss``            TRL's ``GKDTrainer.generalized_jsd_loss``
``LigerKLDIVLoss``, ``LigerJSD``    Liger's modules of these names
``LogitDistillationTask``           timm's ``timm.task.LogitDistillationTask`` (needs timm)
==================================  ===============================================================

What differs, everywhere: the loss is fp32 for half-precision logits; ``reduction="none"`` of the
packages that return one number per class raises (a fused loss has none; the functions of
:mod:`kdkernels.functional` give one per row); an empty or fully masked batch gives 0 where the
original gives NaN. The backend is the one :func:`kdkernels.set_backend` prefers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdkernels import checks, functional

__all__ = [
    "DIST",
    "DistillKL",
    "KLDivFromLogits",
    "LigerJSD",
    "LigerKLDIVLoss",
    "NKDLoss",
    "dkd_loss",
    "generalized_jsd_loss",
    "kd_loss",
    "kl_div_from_logits",
]


def _row_reduction(name: str, reduction: str) -> str:
    checks.choice(name, "reduction", reduction, ("none", "mean", "batchmean", "sum"))
    if reduction == "none":
        raise NotImplementedError(
            f"{name}: reduction must be 'mean', 'batchmean' or 'sum', got 'none', which has one "
            "value per class; kdkernels.functional gives one per row."
        )
    return "sum" if reduction == "batchmean" else reduction


def kl_div_from_logits(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """``F.kl_div(F.log_softmax(input, -1), F.softmax(target, -1), reduction=...)`` from logits.

    So ``F.kl_div(F.log_softmax(s / T, -1), F.softmax(t / T, -1), reduction="batchmean")`` becomes
    ``kl_div_from_logits(s / T, t / T, reduction="batchmean")``, and without a division by T in
    memory ``kdkernels.functional.kl_div(s, t, temperature=T, scale="none")``.

    Args:
        input: the student's logits ``(..., C)``.
        target: the teacher's, of the same shape. Differentiated where they require it.
        size_average, reduce: deprecated by torch; as there.
        reduction: ``"mean"`` (the default: over classes too), ``"batchmean"`` (the sum over
            ``input.size(0)``, whatever follows it), or ``"sum"``.
        log_target: whether the call replaced had ``F.log_softmax(target, -1)`` as its target. The
            value is the same.
    """
    loss = KLDivFromLogits(size_average, reduce, reduction, log_target)
    return loss(input, target)


class KLDivFromLogits(nn.KLDivLoss):
    """``torch.nn.KLDivLoss`` that takes logits on both sides; see :func:`kl_div_from_logits`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        reduction = _row_reduction(type(self).__name__, self.reduction)
        loss = functional.kl_div(input, target, scale="none", reduction=reduction)
        return loss / max(input.size(0), 1) if self.reduction == "batchmean" else loss


class DistillKL(nn.Module):
    """RepDistiller's softened KL, ``T^2 KL(p_t || p_s)`` averaged over rows."""

    def __init__(self, T: float) -> None:
        super().__init__()
        self.T = T

    def forward(self, y_s: Tensor, y_t: Tensor) -> Tensor:
        return functional.kl_div(y_s, y_t, temperature=self.T, compat="repdistiller")


def kd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    temperature: float,
    logit_stand: bool = False,
) -> Tensor:
    """mdistiller's softened KL: as :class:`DistillKL`; of z-scored logits if ``logit_stand``.

    (Cross-entropy and KL together are :func:`kdkernels.functional.kd_loss`.)
    """
    return functional.kl_div(
        logits_student,
        logits_teacher,
        temperature=temperature,
        standardize=bool(logit_stand),
        compat="mdistiller",
    )


def dkd_loss(
    logits_student: Tensor,
    logits_teacher: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
    logit_stand: bool = False,
) -> Tensor:
    """mdistiller's decoupled KD, where that is finite; of z-scored logits if ``logit_stand``."""
    return functional.dkd_loss(
        logits_student,
        logits_teacher,
        target.reshape(-1),
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        standardize=bool(logit_stand),
        compat="mdistiller",
    )


class NKDLoss(nn.Module):
    """cls_KD's normalised KD. ``name`` and ``use_this`` are its registry's, and not looked at."""

    def __init__(self, name=None, use_this=None, temp: float = 1.0, gamma: float = 1.5) -> None:
        super().__init__()
        self.temp = temp
        self.gamma = gamma

    def forward(self, logit_s: Tensor, logit_t: Tensor, gt_label: Tensor) -> Tensor:
        label = gt_label.argmax(1) if gt_label.dim() > 1 else gt_label
        return functional.nkd_loss(
            logit_s, logit_t, label, temperature=self.temp, gamma=self.gamma, compat="cls_kd"
        )


class DIST(nn.Module):
    """DIST of its authors, on logits ``(N, C)`` (``tau^2`` included)."""

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, tau: float = 1.0) -> None:
        super().__init__()
        self.beta = beta
        self.gamma = gamma
        self.tau = tau

    def forward(self, z_s: Tensor, z_t: Tensor) -> Tensor:
        return functional.dist_loss(
            z_s, z_t, temperature=self.tau, beta=self.beta, gamma=self.gamma
        )


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """TRL's generalised Jensen-Shannon divergence (no ``T^2``).

    ``reduction="batchmean"`` divides by the tokens that count, or without ``labels`` by the first
    dimension alone; ``num_items_in_batch`` by that number instead, whatever the reduction. Labels
    of -100 mask their token; others are not looked at.
    """
    name = "generalized_jsd_loss"
    row_reduction = _row_reduction(name, reduction)
    if num_items_in_batch is not None:
        row_reduction = "sum"
    elif labels is not None:
        row_reduction = reduction
    loss = functional.js_div(
        student_logits,
        teacher_logits,
        beta=beta,
        temperature=temperature,
        scale="none",
        reduction=row_reduction,
        mask=None if labels is None else labels != -100,
    )
    if num_items_in_batch is not None:
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch
    if labels is None and reduction == "batchmean":
        return loss / max(student_logits.size(0), 1)
    return loss


class LigerKLDIVLoss(KLDivFromLogits):
    """Liger's KL divergence of log-probabilities from probabilities (or, ``log_target``, theirs).

    Log-probabilities are logits, which the softmax leaves as they are. The gradient to ``y_pred``
    is Liger's less its projection on the softmax, so that behind a ``log_softmax`` the gradient to
    the logits is the same; that ``log_softmax`` can be dropped. As in Liger, ``y_true`` gets no
    gradient. ``eps`` has nothing to do: 0 log 0 is 0.
    """

    def __init__(self, eps: float = 1e-10, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: Tensor, y_true: Tensor) -> Tensor:
        y_true = y_true.detach()
        return super().forward(y_pred, y_true if self.log_target else y_true.log())


class LigerJSD(nn.Module):
    """Liger's generalised Jensen-Shannon divergence of log-probabilities, per row that counts.

    Of the gradients holds what :class:`LigerKLDIVLoss` says. ``shift_labels`` only mask.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: Tensor, log_p: Tensor, shift_labels: Tensor | None = None) -> Tensor:
        mask = None if shift_labels is None else shift_labels != self.ignore_index
        return functional.js_div(log_q, log_p.detach(), beta=self.beta, scale="none", mask=mask)


def _distillation_forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
    output = self.trainable_module(input)
    task_loss = self.criterion(output, target)
    with torch.no_grad():
        input = self.teacher.normalize_input(input, self.student_mean, self.student_std)
        teacher = self.teacher(input.detach(), return_features=False)
    distillation = functional.kl_div(output, teacher, temperature=self.temperature)
    loss = self.task_loss_weight * task_loss + self.distill_loss_weight * distillation
    return {"loss": loss, "output": output, "task_loss": task_loss, "kd_loss": distillation}


def __getattr__(name: str):
    # Made on first use: timm is no dependency, and slow to import.
    if name != "LogitDistillationTask":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from timm.task import LogitDistillationTask

    members = {
        "__doc__": "timm's task of this name with its divergence fused.",
        "__module__": __name__,
        "forward": _distillation_forward,
    }
    task = globals()[name] = type(name, (LogitDistillationTask,), members)
    return task
