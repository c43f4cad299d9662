# SPDX-License-Identifier: Apache-2.0
"""The contrast losses as modules, with their embedding layers and memory banks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kdkernels import backends, checks, functional
from kdkernels.modules.base import embedded

__all__ = ["CRDLoss"]


def _integers(name: str, argument: str, value, shape: tuple[int, ...]) -> None:
    checks.tensor(name, argument, value)
    if value.dtype not in checks.INTEGERS:
        raise TypeError(f"{name}: {argument} must be integers, got {value.dtype}.")
    if value.shape != shape:
        raise ValueError(
            f"{name}: {argument} must have shape {tuple(shape)}, got {tuple(value.shape)}."
        )


_HELD = ("temperature", "eps", "reduction", "group", "backend")


class CRDLoss(nn.Module):
    """Contrastive representation distillation: :func:`kdkernels.functional.crd_loss`.

    Either side's features go through a linear layer, ``student_embed`` and ``teacher_embed``, which
    learn from the loss: give the module's parameters to the optimiser. In training mode every call
    moves the banks, once, whatever becomes of its gradient, and the first one fixes ``normalizer``
    (Z; -1 before); in evaluation mode nothing changes. These are buffers, and in checkpoints.

    ``half()`` and ``bfloat16()`` leave them as they are.

    With ``group`` the banks must start alike on all ranks (seed them alike, or let
    DistributedDataParallel broadcast them), and stay so.

    Args:
        student_dim, teacher_dim: sizes of a sample's features.
        num_samples: n, samples of the data set.
        labels: (n,) their classes, of which the negatives are drawn, by
            :func:`kdkernels.functional.sample_negatives`. Needed unless ``forward`` is given them.
        dim: width of the embeddings and banks.
        num_negatives: K.
        generator: draws the negatives, on the device of ``labels``.
        momentum, temperature, eps, reduction, group, backend: as in the function.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_samples: int,
        labels: Tensor | None = None,
        *,
        dim: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        eps: float = 1e-7,
        reduction: str = "mean",
        generator: torch.Generator | None = None,
        group=None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        sizes = {
            "student_dim": student_dim, "teacher_dim": teacher_dim, "num_samples": num_samples,
            "dim": dim, "num_negatives": num_negatives,
        }  # fmt: skip
        for argument, value in sizes.items():
            if checks.integer(name, argument, value) < 1:
                raise ValueError(f"{name}: {argument} must be at least 1, got {value}.")
        if labels is not None:
            _integers(name, "labels", labels, (num_samples,))
        checks.choice(name, "backend", backend, backends.BACKENDS)
        self.num_negatives, self.momentum, self.generator = num_negatives, momentum, generator
        self.temperature, self.eps, self.reduction = temperature, eps, reduction
        self.group, self.backend = group, backend
        self.student_embed = nn.Linear(student_dim, dim)
        self.teacher_embed = nn.Linear(teacher_dim, dim)
        self.register_buffer("labels", labels, persistent=False)
        for bank in ("student_bank", "teacher_bank"):
            self.register_buffer(bank, torch.empty(num_samples, dim))
        self.register_buffer("normalizer", torch.empty(2))
        self.reset_banks()
        # The function itself judges the rest, on one sample.
        row, zero = torch.zeros(1, 1, device="cpu"), torch.zeros(1, 1, dtype=torch.int64)
        held = {"backend": "reference", "group": None, "momentum": momentum}
        functional.crd_loss(row, row, row, row, zero[0], zero, **self._held() | held)

    def reset_banks(self) -> None:
        """Draw both banks from U(-sqrt(3 / dim), sqrt(3 / dim)), and forget ``normalizer``."""
        for bank in (self.student_bank, self.teacher_bank):
            bound = math.sqrt(3 / bank.shape[1])
            nn.init.uniform_(bank, -bound, bound)
        self.normalizer.fill_(-1)
        self._normalized = False  # on the host, which so need not read it

    def forward(
        self, student: Tensor, teacher: Tensor, index: Tensor, negatives: Tensor | None = None
    ) -> Tensor:
        """The loss of features ``student`` and ``teacher`` (B, ...) of the samples ``index`` (B,).

        ``negatives`` (B, K) are drawn where they are not given.
        """
        name = type(self).__name__
        anchors = (
            embedded(name, "student", student, self.student_embed),
            embedded(name, "teacher", teacher, self.teacher_embed),
        )
        _integers(name, "index", index, student.shape[:1])
        if negatives is None:
            checks.indices(name, "index", index, len(self.student_bank))
            if self.labels is None:
                raise ValueError(f"{name}: negatives must be given, or labels to the constructor.")
            backend = "reference" if self.backend == "reference" else "auto"
            narrow = backend == "auto" and index.device.type == "cpu"
            negatives = functional.sample_negatives(
                self.labels,
                index,
                self.num_negatives,
                generator=self.generator,
                dtype=torch.int32 if narrow else torch.int64,
                backend=backend,
            )
        samples = (self.student_bank, self.teacher_bank, index, negatives)
        if self._normalized:
            normalizer = self.normalizer
        else:
            normalizer = functional.crd_normalizer(
                *anchors, *samples, temperature=self.temperature, group=self.group
            )
            if self.training:
                self.normalizer.copy_(normalizer)
                self._normalized = True
        momentum = self.momentum if self.training else None
        return functional.crd_loss(
            *anchors, *samples, normalizer, momentum=momentum, **self._held()
        )

    def _held(self) -> dict:
        return {name: getattr(self, name) for name in _HELD}

    def _apply(self, fn, *args):
        # Of half precision the layers alone: banks would lose their steps there, and Z overflow.
        kept = {
            name: getattr(self, name) for name in ("student_bank", "teacher_bank", "normalizer")
        }
        super()._apply(fn, *args)
        for name, before in kept.items():
            now = getattr(self, name)
            if now.dtype not in (torch.float32, torch.float64):
                setattr(self, name, before.to(now.device))
        return self

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._normalized = bool((self.normalizer > 0).all())

    def extra_repr(self) -> str:
        n, dim = self.student_bank.shape
        return f"num_samples={n}, dim={dim}, num_negatives={self.num_negatives}"
