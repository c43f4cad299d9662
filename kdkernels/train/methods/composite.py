# SPDX-License-Identifier: Apache-2.0
"""Several methods at once: ``skd+dkd``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from kdkernels.train.data import Batch
from kdkernels.train.errors import InputError
from kdkernels.train.methods.base import Method, Output
from kdkernels.train.methods.course import Course, Run


class Composite(Method):
    """The sum of its methods' terms, named ``method.term``.

    The cross-entropy counts once, with the weight of the first method. What one of them makes of
    the teachers' outputs (``skd``: simplified logits) all of them learn from.
    """

    def __init__(self, methods: Mapping[str, Method]) -> None:
        super().__init__()
        alone = [name for name, method in methods.items() if type(method.course) is not Course]
        if alone:
            raise InputError(f"--method: {alone[0]} goes with no other method")
        self.methods = nn.ModuleDict(methods)
        self.needs_teacher = any(method.needs_teacher for method in methods.values())
        self.needs_numbers = any(method.needs_numbers for method in methods.values())
        self.course = Course(self.needs_teacher)
        for method in list(methods.values())[1:]:
            method.ce_weight = 0.0
        temperatures = {method.top_k_temperature for method in methods.values()}
        self.top_k_temperature = temperatures.pop() if len(temperatures) == 1 else None

    def begin(self, run: Run) -> None:
        super().begin(run)
        for method in self.methods.values():
            method.begin(run)

    def taps(self, student: nn.Module, teachers: Sequence[nn.Module]) -> list[Sequence[str]]:
        wanted = [method.taps(student, teachers) for method in self.methods.values()]
        return [tuple(dict.fromkeys(chain(*paths))) for paths in zip(*wanted, strict=True)]

    def setup(self, student_out: Output, teacher_out: Sequence[Output]) -> None:
        for method in self.methods.values():
            method.setup(student_out, teacher_out)

    def teach(self, batch: Batch, teacher_out: Sequence[Output]) -> Sequence[Output]:
        for method in self.methods.values():
            teacher_out = method.teach(batch, teacher_out)
        return teacher_out

    def losses(
        self, batch: Batch, student_out: Output, teacher_out: Sequence[Output]
    ) -> dict[str, Tensor]:
        return {
            f"{name}.{term}": value
            for name, method in self.methods.items()
            for term, value in method.losses(batch, student_out, teacher_out).items()
        }

    def weights(self, step: int) -> Mapping[str, float]:
        return {
            f"{name}.{term}": weight
            for name, method in self.methods.items()
            for term, weight in method.weights(step).items()
        }

    def measure(self, student: Tensor, labels: Tensor, teacher: Tensor | None) -> dict[str, float]:
        return {
            f"{name}.{key}": value
            for name, method in self.methods.items()
            for key, value in method.measure(student, labels, teacher).items()
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [group for method in self.methods.values() for group in method.parameter_groups()]
