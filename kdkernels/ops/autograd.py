# SPDX-License-Identifier: Apache-2.0
"""What every family's autograd function does with the gradient its forward has saved."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from kdkernels.ops import NAMESPACE

torch.library.define(
    f"{NAMESPACE}::scale_rows_",
    "(Tensor(a!) grad, Tensor upstream, Tensor? row_factor) -> ()",
)


@torch.library.register_fake(f"{NAMESPACE}::scale_rows_")
def _(grad, upstream, row_factor):
    return None


def refuse_higher_order(function: str) -> None:
    """Raise where a second derivative is being asked of a kernel (``create_graph=True``).

    The saved gradient is a constant to autograd, so a gradient penalty would silently lose its
    second-order term.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{function}: the fused kernels have no second derivative (create_graph=True); "
            'use backend="reference", which supports any order.'
        )


def refuse_transforms(function: str, tensors: tuple[torch.Tensor | None, ...]) -> None:
    """Raise under ``torch.func`` transforms and forward-mode AD, which need the reference."""
    if forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    ):
        raise RuntimeError(
            f"{function}: the fused kernels have no forward-mode derivative; compute it in plain "
            "torch."
        )
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{function}: torch.func transforms (grad, vjp, vmap, ...) do not work through the "
            'fused kernels; use backend="reference".'
        )


def row_gradients(ctx, rows: torch.Tensor, upstream: torch.Tensor, need) -> list:
    """Gradients to the row weight, the temperatures and what else has one number a row.

    ``rows`` (k, N): those of the loss, in the order of ``need``. ``ctx.one_tau``: the teacher's
    temperature is the student's; ``ctx.one_temperature``: which of the two is one number for all.
    """
    upstream = upstream.reshape(-1)
    gradients = [None] * len(need)
    for i, wanted in enumerate(need):
        if wanted:
            grad = (rows[1] + rows[2] if i == 1 and ctx.one_tau else rows[i]) * upstream
            summed = i in (1, 2) and ctx.one_temperature[i - 1]
            gradients[i] = grad.sum().reshape(1) if summed else grad
    return gradients


def scale_in_place(grad: torch.Tensor, upstream: torch.Tensor, row_factor: torch.Tensor | None):
    """``grad`` (..., C) times ``upstream`` (0-d or (...)) times ``row_factor`` (rows,), in place.

    Free where ``upstream`` is 1 and there is no ``row_factor``. On a GPU it is the kernel that
    finds this out, since the host would have to wait for the value.
    """
    if row_factor is None and upstream.dim() == 0 and upstream.is_cpu and upstream.item() == 1:
        return
    torch.ops.kdkernels.scale_rows_.default(grad, upstream.contiguous(), row_factor)


def scaled(saved: torch.Tensor, upstream: torch.Tensor, row_factor: torch.Tensor | None):
    """The same, of a saved gradient.

    In place unless the graph is kept: then on a copy, since autograd may hand the result on as
    somebody's ``.grad``.
    """
    if torch.compiler.is_compiling():
        factor = upstream if row_factor is None else upstream * row_factor.view(saved.shape[:-1])
        return (saved * factor.unsqueeze(-1)).to(saved.dtype)
    grad = saved.clone() if torch._C._autograd._get_current_graph_task_keep_graph() else saved
    scale_in_place(grad, upstream, row_factor)
    return grad
