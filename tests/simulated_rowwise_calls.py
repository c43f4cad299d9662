# SPDX-License-Identifier: Apache-2.0
"""Calls of the rowwise family's CUDA kernels under the simulator, and what they have to give."""

from __future__ import annotations

import numpy as np
import torch

from kdkernels import functional
from kdkernels.divergences import KINDS, Choices, Numbers, resolve

DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip


def array(x: torch.Tensor) -> np.ndarray:
    """Sharing memory; bfloat16 as its bits."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def simulate(
    module, student, teacher, kind="forward_kl", *, alpha=None, beta=None, labels=None, mask=None,
    row_weight=None, temperature=1.0, teacher_temperature=None, ce_weight=0.0, kd_weight=1.0,
    label_smoothing=0.0, reduction="batchmean", inplace=False, gradient=True, seed=0,
):  # fmt: skip
    """Loss and gradient of a (N, C) call, complete as autograd would hand them on; the plan."""
    kernel_kind, alpha, beta, weight = resolve("simulate", kind, alpha, beta)
    rows, classes = student.shape
    in_double = torch.float64 in (student.dtype, teacher.dtype)
    number = np.float64 if in_double else np.float32
    loss = np.full(rows if reduction == "none" else 1, 7, number)
    loss_out = loss if reduction == "none" else loss.reshape(())
    if inplace:
        grad = student
    else:  # misaligned as the student is
        base = torch.full((rows * classes + 8,), 7, dtype=student.dtype)
        skip = student.data_ptr() % 16 // student.element_size()
        skip = (skip - base.data_ptr() // base.element_size()) % 8
        grad = base[skip : skip + rows * classes].view(rows, classes)
    half = student.dtype == torch.float16
    row_grads = np.full((4, rows), 7, number)
    per_row = [None if x is None else np.atleast_1d(np.asarray(x, np.float64)) for x in (
        row_weight, temperature, temperature if teacher_temperature is None else teacher_temperature
    )]  # fmt: skip
    plan = module.rowwise(
        array(student), array(teacher),
        Numbers(kd_weight=weight * kd_weight, ce_weight=ce_weight, alpha=alpha, beta=beta,
                label_smoothing=label_smoothing),
        Choices(kind=KINDS.index(kernel_kind)), None if labels is None else labels.numpy(),
        None if mask is None else mask.numpy(), *per_row,
        reduction == "batchmean", loss_out, array(grad) if gradient else None,
        row_grads if half else None, seed,
    )  # fmt: skip
    value = torch.from_numpy(loss).view(loss_out.shape)
    if not gradient:
        return value, None, plan
    grad = grad.double()
    if half:  # times the factor that it lacks
        grad *= torch.from_numpy(row_grads[3]).double()[:, None]
    return value, grad, plan


def expected(student, teacher, kind="forward_kl", *, ce_weight=0.0, kd_weight=1.0,
             label_smoothing=0.0, alpha=None, beta=None, **options):  # fmt: skip
    student, teacher = student.double().clone().requires_grad_(), teacher.double()
    for name in ("row_weight", "temperature", "teacher_temperature"):
        if options.get(name) is not None:
            options[name] = torch.as_tensor(options[name], dtype=torch.float64)
    if ce_weight:
        value = functional.kd_loss(
            student, teacher, kd_weight=kd_weight, ce_weight=ce_weight, backend="reference",
            label_smoothing=label_smoothing, **options,
        )  # fmt: skip
    else:
        value = functional.divergence(
            student, teacher, kind=kind, alpha=alpha, beta=beta, backend="reference", **options
        )
    (grad,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), grad.detach()
