# SPDX-License-Identifier: Apache-2.0
"""What an entry of the registry is, and the rule by which a kernel passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdkernels import backends


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss:
    """A public loss with fixed hyperparameters, and what is needed to exercise it."""

    name: str
    family: str
    function: Callable[..., Tensor]
    # The same value in plain torch, written as users write it: the baseline of the benchmarks, and
    # by its error in each dtype the yardstick of the tests. Takes `make`'s tensors and `hyper`.
    eager: Callable[..., Tensor]
    # (shape, generator, device, dtype) -> the tensor arguments; floats are made in float64 and
    # rounded once.
    make: Callable[..., dict[str, Tensor]]
    # Likewise: the tensor arguments that one may give on top.
    make_optional: Callable[..., dict[str, Tensor]]
    differentiable: tuple[str, ...]
    # Benchmark shapes, named for where they occur.
    shapes: Mapping[str, tuple[int, ...]]
    hyper: Mapping[str, Any] = field(default_factory=dict)
    # Student and teacher are features, not logits.
    features: bool = False
    # One that tests and the self-check can afford.
    small: tuple[int, ...] = (16, 100)
    # It has the rowwise functions' arguments and semantics: student and teacher (..., C), reduced
    # over rows with mask, row_weight and temperatures.
    by_row: bool = True
    # A divergence of the softmaxes of two rows, which needs no labels: 0 for identical logits.
    divergence: bool = True
    # Its published formula stops the gradient of a part: not the derivative of its value.
    stops: bool = False
    # With fewer classes it is constant, and what is left is rounding.
    fewest_classes: int = 1
    # What benchmarks differentiate to beside the student, as training does.
    learned: tuple[str, ...] = ()
    # Further formulations in plain torch, each a baseline of the benchmarks.
    others: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    # Plain torch holds C numbers for every logit.
    pairwise: bool = False
    # In large inputs of the benchmarks, rows may repeat.
    rows_repeat: bool = True

    def inputs(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        seed: int = 0,
        optional: bool = False,
        requires_grad: bool = False,
    ) -> dict[str, Tensor]:
        """Tensor arguments by name; ``requires_grad`` marks the differentiable ones as leaves."""
        generator = torch.Generator().manual_seed(seed)
        tensors = self.make(shape, generator, device, dtype)
        if optional:
            tensors |= self.make_optional(shape, generator, device, dtype)
        if requires_grad:
            for name in self.differentiable:
                if name in tensors:
                    tensors[name].requires_grad_()
        return tensors

    def __call__(self, inputs: Mapping[str, Any], *, backend: str = "auto", **options) -> Tensor:
        """The loss of ``inputs``; these and ``options`` go before the entry's hyperparameters."""
        return self.function(**{**self.hyper, **inputs, **options}, backend=backend)

    def backends(self, device_type: str = "cpu") -> list[str]:
        """The backends that can run this loss here, the reference first."""
        return [
            backend
            for backend in ("reference", "cpu", "triton", "cuda")
            if backends.verdict(self.family, backend, device_type).ok
        ]


def compiled_when_used(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.compile`` of a formulation that `others` names, not before somebody runs it."""
    compiled = []

    def call(*args, **kwargs):
        if not compiled:
            compiled.append(torch.compile(function, fullgraph=True, dynamic=False))
        return compiled[0](*args, **kwargs)

    return call


def leaves(inputs: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """``inputs`` cut from their graph, the floats in ``dtype`` if given; leaves stay leaves."""

    def copy(value):
        if not isinstance(value, Tensor):
            return value
        cast = dtype if dtype is not None and value.is_floating_point() else value.dtype
        return value.detach().to(cast).requires_grad_(value.requires_grad)

    return {name: copy(value) for name, value in inputs.items()}


def gradients(value: Tensor, inputs: Mapping[str, Any], upstream=None) -> dict[str, Tensor]:
    """Gradients of ``value`` to every input that requires one (``upstream``: 1 by default)."""
    named = {
        name: tensor
        for name, tensor in inputs.items()
        if isinstance(tensor, Tensor) and tensor.requires_grad
    }
    upstream = torch.ones_like(value) if upstream is None else upstream
    return dict(zip(named, torch.autograd.grad(value, list(named.values()), upstream), strict=True))


# Relative to the largest element, by the dtype of what is compared: an error that passes whatever
# plain torch does, and one that never passes.
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}
CAP = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def relative_errors(value: Tensor, oracle: Tensor) -> tuple[float, float]:
    """Largest deviation over ``max|oracle|``, and relative L2; inf where non-finites differ."""
    value, oracle = value.detach().to(torch.float64), oracle.detach().to(torch.float64)
    finite = oracle.isfinite()
    if not torch.equal(finite, value.isfinite()) or not torch.equal(
        value[~finite].nan_to_num(nan=0.5), oracle[~finite].nan_to_num(nan=0.5)
    ):
        return math.inf, math.inf
    difference, oracle = (value - oracle)[finite], oracle[finite]
    if not difference.numel() or not difference.any():
        return 0.0, 0.0
    largest, norm = oracle.abs().max().item() or 1.0, oracle.norm().item() or 1.0
    return difference.abs().max().item() / largest, difference.norm().item() / norm


def error_ratio(kernel: Tensor, eager: Tensor, oracle: Tensor) -> float:
    """The kernel's error over the error it may have: passes up to 1."""
    dtype = kernel.dtype
    info = torch.finfo(dtype)
    finite = oracle.detach()[oracle.isfinite()].double()
    # Nobody can be asked to beat the rounding of the result, nor to represent anything below the
    # smallest subnormal.
    smallest = info.smallest_normal * info.eps
    size = finite.abs().max().item() if finite.any() else 1.0, finite.norm().item() or 1.0
    grain = smallest / size[0], smallest * finite.numel() ** 0.5 / size[1]
    return max(
        ours / (min(2 * max(theirs, info.eps / 2) + FLOOR[dtype], CAP[dtype]) + lost)
        for ours, theirs, lost in zip(
            relative_errors(kernel, oracle), relative_errors(eager, oracle), grain, strict=True
        )
    )


def assert_close_to_oracle(kernel: Tensor, eager: Tensor, oracle: Tensor, what: str = "") -> None:
    """The pass rule of the module, for a value or a gradient."""
    assert kernel.shape == oracle.shape, (
        f"{what}: expected shape {tuple(oracle.shape)}, got {tuple(kernel.shape)}"
    )
    ratio = error_ratio(kernel, eager, oracle)
    assert ratio <= 1, (
        f"{what}: {ratio:.3g} times the allowed error; (largest, L2) relative to the oracle: "
        f"{relative_errors(kernel, oracle)}, plain torch {relative_errors(eager, oracle)}"
    )
