# SPDX-License-Identifier: Apache-2.0
"""Student-friendly Knowledge Distillation (arXiv 2305.10893): a reconstruction.

What is verified of the paper, and what is this package's, is said in
:func:`kdkernels.functional.learning_simplifier`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kdkernels import backends, checks, functional

__all__ = ["LearningSimplifier", "StudentFriendlyKDLoss"]


_HELD = tuple(inspect.signature(functional.learning_simplifier).parameters)[1:]


class LearningSimplifier(nn.Module):
    """:func:`kdkernels.functional.learning_simplifier` with its weights.

    Embeddings are drawn from N(0, 1) and weights from N(0, 1 / width of a token), except that the
    output weight starts at zero where there is a residual: the first target is the teacher itself.

    Args:
        num_classes: K.
        dim: columns of each weight, all heads together, and of the class embedding.
        temperature: a number, a tensor, or an ``nn.Parameter``, which is learned.
        tokens, num_heads, residual, group, backend: as in the function.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int = 32,
        *,
        temperature: float | Tensor = 4.0,
        tokens: str = "class",
        num_heads: int = 1,
        residual: bool = True,
        group=None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        checks.choice(name, "tokens", tokens, functional.attention.TOKENS)
        for argument, value in (("num_classes", num_classes), ("dim", dim)):
            checks.integer(name, argument, value)
            if value < 1:
                raise ValueError(f"{name}: {argument} must be at least 1, got {value}.")
        checks.integer(name, "num_heads", num_heads)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{name}: num_heads must divide dim ({dim}), got {num_heads}.")
        by_class = tokens == "class"
        width, outputs = (dim + 1, 1) if by_class else (num_classes, num_classes)
        self.query_weight = nn.Parameter(torch.empty(width, dim))
        self.key_weight = nn.Parameter(torch.empty(width, dim))
        self.value_weight = nn.Parameter(torch.empty(width, dim))
        self.output_weight = nn.Parameter(torch.empty(dim, outputs))
        embedding = nn.Parameter(torch.empty(num_classes, dim)) if by_class else None
        self.register_parameter("class_embedding", embedding)
        if isinstance(temperature, Tensor) and not isinstance(temperature, nn.Parameter):
            self.register_buffer("temperature", temperature)
        else:
            self.temperature = temperature
        self.tokens, self.num_heads, self.residual = tokens, num_heads, residual
        self.group, self.backend = group, backend
        self.reset_parameters()
        # The function itself judges the rest, on one row.
        checks.choice(name, "backend", backend, backends.BACKENDS)
        row = torch.zeros_like(self.output_weight[:1]).expand(1, num_classes)
        number = 1.0 if isinstance(temperature, Tensor) else temperature
        held = {"temperature": number, "backend": "reference", "group": None}
        functional.learning_simplifier(row, **self._held() | held)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for weight in (self.query_weight, self.key_weight, self.value_weight):
            nn.init.normal_(weight, std=weight.shape[0] ** -0.5)
        if self.class_embedding is not None:
            nn.init.normal_(self.class_embedding)
        if self.residual:
            nn.init.zeros_(self.output_weight)
        else:
            nn.init.normal_(self.output_weight, std=self.output_weight.shape[0] ** -0.5)

    def forward(self, teacher_logits: Tensor) -> Tensor:
        """Simplified logits (..., K) at the scale of ``teacher_logits`` (..., K)."""
        weight = self.query_weight if self.class_embedding is None else self.class_embedding
        if teacher_logits.shape[-1:] != weight.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}: teacher_logits must have shape (..., {len(weight)}), got "
                f"{tuple(teacher_logits.shape)}."
            )
        return functional.learning_simplifier(teacher_logits, **self._held())

    def _held(self) -> dict:
        return {name: getattr(self, name) for name in _HELD}

    def extra_repr(self) -> str:
        rows, dim = self.query_weight.shape
        classes = rows if self.class_embedding is None else len(self.class_embedding)
        return f"{classes}, {dim}, tokens={self.tokens!r}, num_heads={self.num_heads}"


class StudentFriendlyKDLoss(nn.Module):
    """``ce_weight CE(student, labels) + kd_weight L(student, simplified teacher)``.

    The simplifier is a submodule (``.simplifier``) and learns from the same loss as the student:
    give its parameters to the optimiser too, without weight decay, and discard it after training.
    The cross-entropy is what keeps student and target from agreeing on something trivial, and L is
    16 times as steep at the default temperature, so its weight is 1 here and not 0.1: watch the
    target's entropy, and how often its argmax is the teacher's.

    Args:
        num_classes, dim, temperature, tokens, num_heads, residual, group, backend: of
            :class:`LearningSimplifier`.
        loss: L, called as ``loss(student, target)``, with the labels as third argument where
            ``forward`` is given any: any loss of this package, or a function. By default the
            softened KL divergence at ``temperature``, which with the cross-entropy is one pass.
        ce_weight, kd_weight: numbers. With ``ce_weight=0`` no labels are needed.
        detach_student: L trains the simplifier alone, and the student has the cross-entropy only.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int = 32,
        *,
        temperature: float | Tensor = 4.0,
        loss: Callable[..., Tensor] | None = None,
        ce_weight: float = 1.0,
        kd_weight: float = 1.0,
        detach_student: bool = False,
        tokens: str = "class",
        num_heads: int = 1,
        residual: bool = True,
        group=None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.ce_weight = checks.number(name, "ce_weight", ce_weight)
        self.kd_weight = checks.number(name, "kd_weight", kd_weight)
        if loss is not None and not callable(loss):
            raise TypeError(f"{name}: loss must be callable, got {type(loss).__name__}.")
        self.loss, self.detach_student, self.backend = loss, detach_student, backend
        self.simplifier = LearningSimplifier(
            num_classes, dim, temperature=temperature, tokens=tokens, num_heads=num_heads,
            residual=residual, group=group, backend=backend,
        )  # fmt: skip

    def forward(
        self, student: Tensor, teacher: Tensor, labels: Tensor | None = None, **per_row: Tensor
    ) -> Tensor:
        """The loss of ``student`` (..., K) against ``teacher`` (..., K), simplified.

        ``per_row``: what L and the cross-entropy take of a call besides, such as ``mask`` and
        ``row_weight``.
        """
        if labels is None and self.ce_weight:
            raise ValueError(
                f"{type(self).__name__}: labels must be given unless ce_weight is 0, got None."
            )
        target = self.simplifier(teacher)
        if self.loss is None and not self.detach_student and labels is not None:
            return self._softened(student, target, labels, self.ce_weight, self.kd_weight, per_row)
        imitator = student.detach() if self.detach_student else student
        if self.loss is None:
            value = functional.kl_div(
                imitator, target, labels, temperature=self.simplifier.temperature,
                backend=self.backend, **per_row,
            )  # fmt: skip
        else:
            value = self.loss(imitator, target, *([] if labels is None else [labels]), **per_row)
        value = self.kd_weight * value
        if self.ce_weight:
            value = value + self._softened(student, teacher, labels, self.ce_weight, 0.0, per_row)
        return value

    def _softened(self, student, teacher, labels, ce_weight, kd_weight, per_row) -> Tensor:
        return functional.kd_loss(
            student, teacher, labels, temperature=self.simplifier.temperature,
            ce_weight=ce_weight, kd_weight=kd_weight, backend=self.backend, **per_row,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"ce_weight={self.ce_weight}, kd_weight={self.kd_weight}"
