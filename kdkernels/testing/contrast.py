# SPDX-License-Identifier: Apache-2.0
"""The contrast family's entries. Shapes are (B, D, K, n)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kdkernels import functional
from kdkernels.testing.loss import Loss


def _embeddings(shape, generator, device, dtype):
    """Embeddings and banks of a student on its way to the teacher, and rows to contrast with."""
    samples, dim, negatives, n = shape
    bank = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    banks = {"student_bank": F.normalize(bank + noise), "teacher_bank": F.normalize(bank)}
    index = torch.randperm(n, generator=generator)[:samples]
    moved = torch.randn(2, samples, dim, generator=generator, dtype=torch.float64)
    student, teacher = 2 * banks["student_bank"][index], 2 * banks["teacher_bank"][index]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    floats = {
        "student": (student + 0.1 * moved[0]).to(device, dtype),
        "teacher": (teacher + 0.1 * moved[1]).to(device, dtype),
        **{name: rows.to(device, wide) for name, rows in banks.items()},
        "normalizer": torch.tensor([2.0 * n, 3.0 * n], dtype=wide, device=device),
    }
    others = torch.randint(n - 1, (samples, negatives), generator=generator)
    others += others >= index.unsqueeze(1)
    return floats | {"index": index.to(device), "negatives": others.to(device)}


def _no_more(shape, generator, device, dtype):
    return {}


def crd_published(
    student, teacher, student_bank, teacher_bank, normalizer, index, negatives, *,
    temperature=0.07, momentum=None,
):  # fmt: skip
    """As the suites have it, the update of the banks included where there is a momentum."""
    (samples, dim), (n, k) = student.shape, (len(student_bank), negatives.shape[1])
    student, teacher = (x / x.pow(2).sum(1, keepdim=True).pow(0.5) for x in (student, teacher))
    chosen = torch.cat([index.unsqueeze(1), negatives], 1).view(-1)

    def contrasted(bank, anchors, z):
        rows = torch.index_select(bank, 0, chosen).view(samples, k + 1, dim)
        scores = torch.exp(torch.div(torch.bmm(rows, anchors.view(samples, dim, 1)), temperature))
        return torch.div(scores, z).contiguous()

    def criterion(x):
        uniform = 1 / float(n)
        positive = x.select(1, 0)
        of_positive = torch.div(positive, positive.add(k * uniform + 1e-7)).log_()
        others = x.narrow(1, 1, k)
        constant = others.clone().fill_(k * uniform)
        of_others = torch.div(constant, others.add(k * uniform + 1e-7)).log_()
        return -(of_positive.sum(0) + of_others.view(-1, 1).sum(0)) / samples

    kept = student_bank, teacher_bank
    wide = student_bank.dtype
    of_student = contrasted(teacher_bank, student.to(wide), normalizer[0])
    of_teacher = contrasted(student_bank, teacher.to(wide), normalizer[1])
    loss = criterion(of_student) + criterion(of_teacher)
    with torch.no_grad():
        for bank, anchors in zip(kept, (student, teacher), strict=True):
            if momentum is None:
                continue
            moved = torch.index_select(bank, 0, index.view(-1))
            moved.mul_(momentum)
            moved.add_(torch.mul(anchors, 1 - momentum))
            norm = moved.pow(2).sum(1, keepdim=True).pow(0.5)
            bank.index_copy_(0, index, moved.div(norm))
    return loss.squeeze()


def _dense(student, teacher, student_bank, teacher_bank, normalizer, index, negatives):
    """Scores of the whole bank, by a matrix product, of which the chosen ones are gathered."""
    share = negatives.shape[1] / len(student_bank)
    loss = 0.0
    for x, bank, z in (
        (student, teacher_bank, normalizer[0]),
        (teacher, student_bank, normalizer[1]),
    ):
        scores = F.normalize(x.to(bank.dtype)) @ bank.T / 0.07 - ((share + 1e-7) * z).log()
        positive = scores.gather(1, index.unsqueeze(1))
        loss = (
            loss - F.logsigmoid(positive).sum() - F.logsigmoid(-scores.gather(1, negatives)).sum()
        )
    return loss / len(student)


LOSSES = (
    Loss(
        name="crd_loss",
        family="contrast.crd",
        function=functional.crd_loss,
        eager=crd_published,
        make=_embeddings,
        make_optional=_no_more,
        differentiable=("student", "teacher"),
        shapes={"cifar100_b64": (64, 128, 16384, 50000)},
        small=(6, 20, 37, 50),
        by_row=False,
        features=True,
        divergence=False,
        learned=("teacher",),
        others={"dense": _dense},
        rows_repeat=False,
    ),
)
