# SPDX-License-Identifier: Apache-2.0
"""The learning simplifier as modules: its own, and the loss around it."""

from __future__ import annotations

import pytest
import torch

import kdkernels
from kdkernels.functional import learning_simplifier


def test_simplifier():
    simplifier = kdkernels.LearningSimplifier(10, 8, num_heads=2)
    teacher = torch.randn(4, 10)
    assert torch.equal(simplifier(teacher), teacher)
    torch.nn.init.normal_(simplifier.output_weight)
    weights = dict(simplifier.named_parameters())
    wanted = learning_simplifier(teacher, **weights, num_heads=2)
    assert torch.equal(simplifier(teacher), wanted)
    again = kdkernels.LearningSimplifier(10, 8, num_heads=2)
    again.load_state_dict(simplifier.state_dict())
    assert torch.equal(again(teacher), wanted)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_heads": 3}, r"num_heads must divide dim \(8\), got 3"),
        ({"dim": 0}, "dim must be at least 1"),
        ({"tokens": "row"}, "tokens must be one of"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"backend": "gpu"}, "backend must be one of"),
    ],
)
def test_refused_at_construction(changed, message):
    with pytest.raises(ValueError, match=message):
        kdkernels.LearningSimplifier(**{"num_classes": 10, "dim": 8} | changed)


@pytest.mark.parametrize("tokens", ["class", "batch"])
def test_loss(tokens):
    """Cross-entropy and divergence from the simplified teacher, learning the simplifier too."""
    loss = kdkernels.StudentFriendlyKDLoss(
        10, 8, tokens=tokens, temperature=torch.nn.Parameter(torch.tensor(3.0))
    )
    torch.nn.init.normal_(loss.simplifier.output_weight, std=0.1)
    student, teacher = torch.randn(2, 4, 10)
    student.requires_grad_()
    labels = torch.randint(10, (4,))
    value = loss(student, teacher, labels)
    soft = (loss.simplifier(teacher) / 3).log_softmax(-1)
    kl = (soft.exp() * (soft - (student / 3).log_softmax(-1))).sum(-1).mean()
    wanted = torch.nn.functional.cross_entropy(student, labels) + 9 * kl
    torch.testing.assert_close(value, wanted)
    value.backward()
    assert all(p.grad.any() for p in [student, *loss.parameters()])


def test_around_a_loss_with_labels():
    dkd = kdkernels.DKDLoss(temperature=4.0)
    loss = kdkernels.StudentFriendlyKDLoss(10, 8, loss=dkd, ce_weight=0.0)
    student, teacher = torch.randn(2, 4, 10)
    labels = torch.randint(10, (4,))
    torch.testing.assert_close(loss(student, teacher, labels), dkd(student, teacher, labels))


@pytest.mark.parametrize("inner", [kdkernels.ReverseKLDivLoss(), torch.nn.MSELoss()], ids=str)
def test_around_another_loss(inner):
    loss = kdkernels.StudentFriendlyKDLoss(10, 8, loss=lambda s, t, *_: inner(s, t))
    student, teacher = torch.randn(2, 4, 10)
    labels = torch.randint(10, (4,))
    wanted = inner(student, teacher)  # the target before the first step
    wanted = wanted + torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(loss(student, teacher, labels), wanted)


def test_detached_student():
    """The distillation loss then trains the simplifier alone, towards the student."""
    loss = kdkernels.StudentFriendlyKDLoss(10, 8, detach_student=True)
    torch.nn.init.normal_(loss.simplifier.output_weight)
    student, teacher = torch.randn(2, 4, 10)
    student.requires_grad_()
    labels = torch.randint(10, (4,))
    loss(student, teacher, labels).backward()
    ce = torch.nn.functional.cross_entropy(student, labels)
    torch.testing.assert_close(student.grad, torch.autograd.grad(ce, student)[0])
    assert all(p.grad.any() for p in loss.parameters())


def test_needs_labels():
    student, teacher = torch.randn(2, 4, 10)
    with pytest.raises(ValueError, match="labels must be given"):
        kdkernels.StudentFriendlyKDLoss(10)(student, teacher)
    kdkernels.StudentFriendlyKDLoss(10, ce_weight=0.0)(student, teacher)
