# SPDX-License-Identifier: Apache-2.0
"""What is trained, as one module: the student and the method's own parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from kdkernels.train.clock import StepClock
from kdkernels.train.data import Batch, Dataset, LoaderData
from kdkernels.train.errors import InputError
from kdkernels.train.methods import Course, Method, Output
from kdkernels.train.taps import Tapped, shown_two
from kdkernels.train.teachers import Teachers


class Learner(nn.Module):
    """The student's answer to images, and what comes of it: the losses.

    One module, within whose ``forward`` all is computed that gradients come from: a wrapper for
    several processes sees the method's parameters too. The student runs at Fabric's precision.
    """

    def __init__(self, fabric: Fabric, student: Tapped, method: Method) -> None:
        super().__init__()
        self.student, self.method = student, method
        self.precision, self.device_type = fabric.strategy.precision, fabric.device.type

    def forward(self, images: Tensor, then: Callable[[Output], Any] | None = None) -> Any:
        """The student's output, or what ``then`` makes of it."""
        out = self.student(images)
        return then(out) if then else out

    def losses(
        self,
        batch: Batch,
        teacher_out: Sequence[Output],
        step: int,
        clock: StepClock,
        measured: bool,
        student_out: Output,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """The loss and its terms in float32 or better, for ``forward`` to call.

        And if the step is ``measured``, :func:`gradient_norms`. Not arguments of ``forward``, where
        Fabric would round the teacher to the student's precision.
        """
        batch, teacher_out, student_out = self.precision.convert_output(
            (batch, teacher_out, student_out)
        )
        clock.loss_starts(student_out.logits)
        if measured:  # Views: the clock waits for the gradient to the logits themselves.
            student_out = tree_map_only(Tensor, lambda x: x.view_as(x), student_out)
        with torch.autocast(self.device_type, enabled=False):
            teacher_out = self.method.teach(batch, teacher_out)
            terms = self.method.losses(batch, student_out, teacher_out)
            weights = self.method.weights(step)
            norms = {}
            if measured:
                with clock.loss_paused():
                    norms = gradient_norms(terms, weights, student_out)
            return weighted_sum(terms, weights), terms, norms


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of the terms; a lone term of weight 1 is handed on as it is, without an operation."""
    weighted = [weights[name] * term if name in weights else term for name, term in terms.items()]
    return functools.reduce(torch.add, weighted)


def gradient_norms(
    terms: Mapping[str, Tensor], weights: Mapping[str, float], student_out: Output
) -> dict[str, Tensor]:
    """Norms of the weighted terms' gradients to what the student gives out, its taps included.

    A term that the student has no part in has none. The graph is kept, and the network behind the
    outputs is not gone through.
    """
    outputs = [x for x in tree_leaves(student_out) if isinstance(x, Tensor) and x.requires_grad]
    norms = {}
    for name, term in terms.items():
        if not term.requires_grad:
            continue
        gradients = torch.autograd.grad(term, outputs, retain_graph=True, allow_unused=True)
        if own := [gradient.norm() for gradient in gradients if gradient is not None]:
            norms[name] = weights.get(name, 1.0) * torch.stack(own).norm()
    return norms


def acquaint(
    fabric: Fabric,
    method: Method,
    trained: nn.Module,
    networks: Sequence[nn.Module],
    data: Dataset | LoaderData,
) -> tuple[Tapped, Teachers]:
    """The student and its teachers tapped where the method wants, which has seen their outputs."""
    student_taps, *teacher_taps = method.taps(trained, networks)
    student = Tapped(trained, student_taps, what="student")
    teachers = Teachers(fabric, networks, teacher_taps)
    dry_run(method, student, teachers, data)
    return student, teachers


def dry_run(
    method: Method, student: nn.Module, teachers: Teachers, data: Dataset | LoaderData
) -> None:
    """Show the method two images' outputs, for what it makes of their shapes."""
    outputs = [shown_two(student, data.shape, what="student")]
    outputs += [shown_two(teacher, data.shape, what="teacher") for teacher in teachers]
    if not outputs[0].logits.requires_grad:
        raise InputError(
            "student: expected logits to train, but they depend on no parameter that requires a "
            "gradient: is it frozen?"
        )
    classes = len(data.classes)
    # What a course wraps a student in may know some of the classes only.
    wrapped = type(method.course).wrap is not Course.wrap
    own = outputs[0].logits.shape[-1] if wrapped else classes
    expected = (own, *map(len, method.course.specialities(classes)))
    for index, (out, count) in enumerate(zip(outputs, expected, strict=False)):
        if out.logits.shape != (2, count):
            who = "student" if index == 0 else "teacher"
            raise InputError(
                f"{who}: expected logits (2, {count}) for two images, the data having {classes} "
                f"classes; got {tuple(out.logits.shape)}"
            )
    method.setup(outputs[0], outputs[1:])
