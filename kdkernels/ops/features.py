# SPDX-License-Identifier: Apache-2.0
"""One form for the operators of losses over features: schema, fake and autograd are stated here.

An operator takes its tensors, the factor of the loss, its numbers and choices, and which tensors
need a gradient, and returns the loss with the gradient to each of its tensors:

    name(Tensor a, Tensor b, ..., float factor, float[] numbers, int[] choices, int grads)
        -> (Tensor loss, Tensor grad_a, Tensor grad_b, ...)

Bit i of ``grads`` asks for the gradient of tensor i; others are of size 0. ``factor`` is what the
loss and its gradients are multiplied by, its normalisation included.

A gradient lies in memory as its tensor does, which is contiguous or channels-last, and is of its
dtype, but for fp16: before the upstream gradient, with the scale of a GradScaler, is known, no
scale of it suits fp16 (features of 1e-4 have gradients 1e4 times larger than those of 1, averaging
makes them 1e6 times smaller), so it is kept in fp32 and rounded in backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdkernels.ops import NAMESPACE, register_triton
from kdkernels.ops.autograd import refuse_higher_order, refuse_transforms, scaled


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """What losses are accumulated and returned in: fp64 if anything is, else fp32."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def gradient_dtype(tensor: Tensor) -> torch.dtype:
    """Of the gradient that an operator returns for ``tensor``."""
    return torch.float32 if tensor.dtype == torch.float16 else tensor.dtype


def gradient_like(tensor: Tensor) -> Tensor:
    """Where an operator writes the gradient of ``tensor``."""
    return torch.empty_like(tensor, dtype=gradient_dtype(tensor))


def define(name: str, *tensors: str, triton: bool = True) -> None:
    """Define ``kdkernels::name`` and, unless there is none, ``kdkernels::name_triton``.

    ``tensors`` are names of arguments, with "?" after those that may be None.
    """
    arguments = ", ".join(f"Tensor{'?' * t.endswith('?')} {t.rstrip('?')}" for t in tensors)
    results = ", ".join(f"Tensor grad_{t.rstrip('?')}" for t in tensors)
    schema = (
        f"({arguments}, float factor, float[] numbers, int[] choices, int grads)"
        f" -> (Tensor loss, {results})"
    )

    def fake(*arguments):
        given, grads = arguments[: len(tensors)], arguments[-1]
        first = next(t for t in given if t is not None)
        return (
            first.new_empty((), dtype=compute_dtype(*given)),
            *(
                gradient_like(t) if grads >> i & 1 else first.new_empty(0)
                for i, t in enumerate(given)
            ),
        )

    for suffix in ("", "_triton") if triton else ("",):
        torch.library.define(f"{NAMESPACE}::{name}{suffix}", schema)
        torch.library.register_fake(f"{NAMESPACE}::{name}{suffix}", fake)


class _Feature(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, *tensors):
        ctx.function, operator, factor, numbers, choices = call
        grads = sum(1 << i for i, need in enumerate(ctx.needs_input_grad[1:]) if need)
        loss, *gradients = operator(*tensors, factor, numbers, choices, grads)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        return loss

    @staticmethod
    def backward(ctx, upstream):
        refuse_higher_order(ctx.function)
        needed = zip(ctx.needs_input_grad[1:], ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, *(
            _scaled(grad, upstream).to(dtype) if need else None for need, grad, dtype in needed
        )


def _scaled(grad: Tensor, upstream: Tensor) -> Tensor:
    """``scaled`` by samples: rows that are long and few, in either layout."""
    if not grad.numel():
        return grad
    if grad.dim() < 3:
        return scaled(grad, upstream, None)
    channels_last = not grad.is_contiguous()
    dense = grad.movedim(1, -1) if channels_last else grad
    result = scaled(dense.view(grad.shape[0], -1), upstream, None).view(dense.shape)
    return result.movedim(-1, 1) if channels_last else result


def call(
    function: str,
    kernel: str,
    backend: str,
    tensors: Sequence[Tensor | None],
    factor: float = 1.0,
    numbers: Sequence[float] = (),
    choices: Sequence[int] = (),
) -> Tensor:
    """The loss of validated ``tensors`` by the operator ``kernel`` ("family.operator")."""
    family, _, name = kernel.partition(".")
    if backend == "triton":
        register_triton(family)
        name += "_triton"
    operator = getattr(torch.ops.kdkernels, name).default
    return differentiable(function, operator, tensors, factor, numbers, choices)


def differentiable(
    function: str,
    operator: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    factor: float = 1.0,
    numbers: Sequence[float] = (),
    choices: Sequence[int] = (),
) -> Tensor:
    """The loss by ``operator``, or by a function that takes and returns what one does."""
    refuse_transforms(function, tuple(tensors))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Feature.apply((function, operator, factor, numbers, choices), *tensors)
    return operator(*tensors, factor, numbers, choices, 0)[0]
