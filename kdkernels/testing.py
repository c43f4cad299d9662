# SPDX-License-Identifier: Apache-2.0
"""The registry of losses that tests, benchmarks and the self-check iterate over.

One :class:`Loss` says how to call a loss, how to make inputs for it and how it is written in plain
torch. To add a loss, add one entry; whatever walks over :data:`LOSSES` then covers it.

The pass rule for a kernel (:func:`assert_close_to_oracle`): against the reference in float64 on the
same rounded inputs, its error is at most twice that of plain torch in the same dtype plus a floor,
and below a cap; both by the largest deviation and by relative L2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import backends, functional


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


def _logits(shape, generator, device, dtype):
    """A student on its way to the teacher: correlated rows, as trained models have."""
    teacher = 3.0 * torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    student = 0.5 * teacher + 1.5 * noise
    return {"student": student.to(device, dtype), "teacher": teacher.to(device, dtype)}


def _labelled_logits(shape, generator, device, dtype):
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    return _logits(shape, generator, device, dtype) | {"labels": labels.to(device)}


def _per_row(shape, generator, device, dtype):
    """Temperatures and weights per row, in the precision rows are accumulated in."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def uniform(low, high):
        values = torch.rand(shape[:-1], generator=generator, dtype=torch.float64)
        return (low + (high - low) * values).to(device, wide)

    return {
        "temperature": uniform(1.0, 4.0),
        "teacher_temperature": uniform(1.0, 4.0),
        "row_weight": uniform(0.0, 2.0),
    }


def _t2_mean(rows):
    """From a divergence per row of tempered logits to the loss: mean over rows, times T^2."""

    def loss(student, teacher, *, temperature, **parameters):
        value = rows(student / temperature, teacher / temperature, **parameters)
        return value.mean() * temperature**2

    return loss


def _kl(s, t):
    return F.kl_div(F.log_softmax(s, -1), F.softmax(t, -1), reduction="none").sum(-1)


def _reverse_kl(s, t):
    return F.kl_div(
        F.log_softmax(t, -1), F.log_softmax(s, -1), reduction="none", log_target=True
    ).sum(-1)


def _js(s, t, beta):
    log_s, log_t = F.log_softmax(s, -1), F.log_softmax(t, -1)
    log_m = torch.logsumexp(
        torch.stack([log_s + math.log(1 - beta), log_t + math.log(beta)]), dim=0
    )
    teacher = F.kl_div(log_m, log_t, reduction="none", log_target=True)
    student = F.kl_div(log_m, log_s, reduction="none", log_target=True)
    return (beta * teacher + (1 - beta) * student).sum(-1)


def _tv(s, t):
    return 0.5 * (F.softmax(t, -1) - F.softmax(s, -1)).abs().sum(-1)


def _skew_forward(s, t, alpha):
    s, t = F.softmax(s, -1), F.softmax(t, -1)
    return F.kl_div((alpha * t + (1 - alpha) * s).log(), t, reduction="none").sum(-1)


def _skew_reverse(s, t, alpha):
    return _skew_forward(t, s, alpha)


def _jeffreys(s, t):
    log_s, log_t = F.log_softmax(s, -1), F.log_softmax(t, -1)
    return ((log_t.exp() - log_s.exp()) * (log_t - log_s)).sum(-1)


def _affinity(s, t, alpha):
    return torch.exp(alpha * F.log_softmax(t, -1) + (1 - alpha) * F.log_softmax(s, -1)).sum(-1)


def _alpha(s, t, alpha):
    return (_affinity(s, t, alpha) - 1) / (alpha * (alpha - 1))


def _renyi(s, t, alpha):
    return _affinity(s, t, alpha).log() / (alpha - 1)


def _hellinger(s, t):
    return 1 - _affinity(s, t, 0.5)


def _chi2(s, t):
    s, t = F.softmax(s, -1), F.softmax(t, -1)
    return ((t - s) ** 2 / s).sum(-1)


def _ab(s, t, alpha, beta):
    s, t = F.softmax(s, -1), F.softmax(t, -1)
    total = alpha + beta
    terms = t**alpha * s**beta - alpha / total * t**total - beta / total * s**total
    return -terms.sum(-1) / (alpha * beta)


def _soft_cross_entropy(student, teacher, *, temperature, compat):
    log_s = F.log_softmax(student / temperature, -1)
    return -(F.softmax(teacher / temperature, -1) * log_s).sum(-1).mean() * temperature**2


def _kd(student, teacher, labels, *, temperature, alpha):
    soft = _t2_mean(_kl)(student, teacher, temperature=temperature)
    return (1 - alpha) * F.cross_entropy(student, labels) + alpha * soft


_ROWWISE = {
    "family": "rowwise",
    "make": _logits,
    "make_optional": _per_row,
    "differentiable": ("student", "teacher", "temperature", "teacher_temperature", "row_weight"),
    "shapes": {
        "cifar100_b64": (64, 100),
        "imagenet_b256": (256, 1000),
        "llama2_vocab": (512, 32000),
        "gpt2_vocab": (256, 50257),
        "llama3_vocab": (128, 128256),
    },
}


def _divergence(kind: str, rows, **parameters) -> Loss:
    def eager(student, teacher, *, kind, **hyper):
        return _t2_mean(rows)(student, teacher, **hyper)

    return Loss(
        name=f"divergence_{kind}",
        function=functional.divergence,
        eager=eager,
        hyper={"kind": kind, "temperature": 2.0, **parameters},
        **_ROWWISE,
    )


# Kinds of `divergence` that have a function of their own are entered once, by that.
LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss(
            name="kl_div",
            function=functional.kl_div,
            eager=_t2_mean(_kl),
            hyper={"temperature": 4.0},
            **_ROWWISE,
        ),
        Loss(
            name="reverse_kl_div",
            function=functional.reverse_kl_div,
            eager=_t2_mean(_reverse_kl),
            hyper={"temperature": 2.0},
            **_ROWWISE,
        ),
        Loss(
            name="js_div",
            function=functional.js_div,
            eager=_t2_mean(_js),
            hyper={"temperature": 2.0, "beta": 0.3},
            **_ROWWISE,
        ),
        Loss(
            name="tv_distance",
            function=functional.tv_distance,
            eager=_t2_mean(_tv),
            hyper={"temperature": 2.0},
            **_ROWWISE,
        ),
        _divergence("skew_forward", _skew_forward, alpha=0.1),
        _divergence("skew_reverse", _skew_reverse, alpha=0.1),
        _divergence("jeffreys", _jeffreys),
        _divergence("alpha", _alpha, alpha=0.3),
        _divergence("renyi", _renyi, alpha=0.5),
        _divergence("hellinger", _hellinger),
        _divergence("chi2", _chi2),
        _divergence("ab", _ab, alpha=0.2, beta=0.7),
        Loss(
            name="soft_cross_entropy",
            function=functional.kl_div,
            eager=_soft_cross_entropy,
            hyper={"temperature": 4.0, "compat": "cls_kd"},
            **_ROWWISE,
        ),
        Loss(
            name="kd_loss",
            function=functional.kd_loss,
            eager=_kd,
            hyper={"temperature": 4.0, "alpha": 0.9},
            **(_ROWWISE | {"make": _labelled_logits}),
        ),
    )
}
