# SPDX-License-Identifier: Apache-2.0
"""What methods share that compare inner features of student and teacher."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from kdkernels.train.errors import InputError
from kdkernels.train.methods.base import Method, Output
from kdkernels.train.models import Taps, usual_taps

# Modules of a network that an error names.
MOST_NAMED = 12


class FeatureMethod(Method):
    """A method that compares features of the student with as many of the first teacher.

    They are named by taps, those of :meth:`usual` where the user names none.
    """

    def __init__(
        self,
        student_taps: list[str] | None = None,
        teacher_taps: list[str] | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(backend)
        self.student_taps, self.teacher_taps = student_taps, teacher_taps

    @staticmethod
    @abstractmethod
    def usual(taps: Taps) -> Sequence[str]:
        """Which of a network's usual places are compared."""

    def taps(self, student: nn.Module, teachers: Sequence[nn.Module]) -> list[Sequence[str]]:
        student_taps = self._places("student", self.student_taps, student)
        teacher_taps = self._places("teacher", self.teacher_taps, teachers[0])
        if len(student_taps) != len(teacher_taps):
            raise InputError(
                f"the student's features {student_taps} and the teacher's {teacher_taps} do not "
                f"pair: name as many of either by --student-taps and --teacher-taps"
            )
        if not student_taps:
            raise InputError(
                "student and teacher have no features where the literature compares them: name "
                "those wanted by --student-taps and --teacher-taps"
            )
        self.student_taps, self.teacher_taps = student_taps, teacher_taps
        return [student_taps, teacher_taps, *[()] * (len(teachers) - 1)]

    def _places(self, side: str, given: list[str] | None, network: nn.Module) -> list[str]:
        if given:
            return list(given)
        try:
            return list(self.usual(usual_taps(network)))
        except InputError as error:
            names = sorted((name for name, _ in network.named_modules() if name), key=_depth)
            more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
            raise InputError(
                f"{side}: {error} to compare, as many of either network: options="
                f"{{'student_taps': [...], 'teacher_taps': [...]}} (--student-taps and "
                f"--teacher-taps). It has {', '.join(names[:MOST_NAMED])}{more}; "
                f"'NAME:input' is what one takes"
            ) from error

    def features(
        self, student_out: Output, teacher_out: Sequence[Output]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Those compared, of the student and of the teacher."""
        return (
            [student_out.features[path] for path in self.student_taps],
            [teacher_out[0].features[path] for path in self.teacher_taps],
        )


def _depth(name: str) -> int:
    return name.count(".")
