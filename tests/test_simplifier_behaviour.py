# SPDX-License-Identifier: Apache-2.0
"""What the learning simplifier does in training, on a toy: no figure of the paper is at stake.

The protocol: 20 Gaussian classes in 4 groups of 5 in 32 dimensions; a teacher of 256 hidden units;
students of 64, which learn the task, and of 8, which do not; Adam at 1e-3 for student and
simplifier, 600 steps of 128 samples, T = 4, weights and sizes at the modules' defaults.

It is the second one. The first had the small student only, and weights 0.1 and 0.9, as in
``kd_loss``: entropy rose and the divergence fell, but the target's argmax was the teacher's for a
third of the samples, with a student of 0.3 accuracy where cross-entropy alone gives 0.67. Hence the
defaults of 1 and 1. With these the target of the small student still agrees on 0.76 to 0.81 only,
which is not asserted: a target follows its student, and this one is no better. Nor is what class
tokens do without cross-entropy: agreement of 0.06 to 0.13 with the small student, 0.59 to 0.72 with
the able one, whose accuracy falls from 0.9 to 0.6 or 0.7.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdkernels

CLASSES, DIMENSIONS, STEPS, BATCH, T = 20, 32, 600, 128, 4.0


class Outcome(NamedTuple):
    teacher_entropy: float  # of softmax(. / T), in nats
    target_entropy: float
    agreement: float  # of the target's argmax with the teacher's
    kl_to_teacher: float
    kl_to_target: float
    accuracy: float  # of the student on fresh samples


@functools.cache
def task():
    """A sampler of labelled points, and a trained teacher."""
    generator = torch.Generator().manual_seed(0)
    groups = 2 * torch.randn(4, 1, DIMENSIONS, generator=generator)
    means = (groups + torch.randn(4, 5, DIMENSIONS, generator=generator)).view(CLASSES, -1)

    def sample(size):
        labels = torch.randint(CLASSES, (size,), generator=generator)
        noise = 2 * torch.randn(size, DIMENSIONS, generator=generator)
        return means[labels] + noise, labels

    torch.manual_seed(1)
    teacher = network(256)
    optimiser = torch.optim.Adam(teacher.parameters(), 1e-3)
    for _ in range(STEPS):
        points, labels = sample(BATCH)
        optimiser.zero_grad()
        F.cross_entropy(teacher(points), labels).backward()
        optimiser.step()
    return sample, teacher


def network(width):
    return nn.Sequential(nn.Linear(DIMENSIONS, width), nn.ReLU(), nn.Linear(width, CLASSES))


@functools.cache
def train(tokens: str, width: int, ce_weight: float = 1.0, seed: int = 2) -> Outcome:
    sample, teacher = task()
    torch.manual_seed(seed)
    student = network(width)
    loss = kdkernels.StudentFriendlyKDLoss(
        CLASSES, temperature=T, tokens=tokens, ce_weight=ce_weight
    )
    optimiser = torch.optim.Adam([*student.parameters(), *loss.parameters()], 1e-3)
    for _ in range(STEPS):
        points, labels = sample(BATCH)
        with torch.no_grad():
            known = teacher(points)
        optimiser.zero_grad()
        loss(student(points), known, labels).backward()
        optimiser.step()
    with torch.no_grad():
        points, labels = sample(1024)
        guess, known = student(points), teacher(points)
        target = torch.cat([loss.simplifier(part) for part in known.split(BATCH)])

        def entropy(logits):
            return torch.distributions.Categorical(logits=logits / T).entropy().mean().item()

        def kl(towards):
            return kdkernels.functional.kl_div(guess, towards, temperature=T, scale="none").item()

        return Outcome(
            entropy(known), entropy(target),
            (target.argmax(-1) == known.argmax(-1)).float().mean().item(),
            kl(known), kl(target),
            (guess.argmax(-1) == labels).float().mean().item(),
        )  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("tokens", ["class", "batch"])
def test_target_is_simpler_and_nearer(tokens, width):
    outcome = train(tokens, width)
    print(outcome)
    assert outcome.target_entropy > outcome.teacher_entropy
    assert outcome.kl_to_target < outcome.kl_to_teacher


@pytest.mark.parametrize("tokens", ["class", "batch"])
def test_target_of_an_able_student_agrees_with_the_teacher(tokens):
    assert train(tokens, 64).agreement >= 0.9


@pytest.mark.parametrize("width", [8, 64])
def test_batch_tokens_collapse_without_cross_entropy(width):
    """Student and target still agree, on something that is no longer the teacher."""
    alone, guided = train("batch", width, ce_weight=0.0), train("batch", width)
    print(alone)
    assert alone.kl_to_target < alone.kl_to_teacher
    assert alone.agreement < 0.75 * guided.agreement
    assert alone.accuracy < 0.75 * guided.accuracy
