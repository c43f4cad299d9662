# SPDX-License-Identifier: Apache-2.0
"""The entries of losses between vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kdkernels import functional
from kdkernels.testing.loss import Loss


def _normal(shape, generator):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _rows(shape, generator, device, dtype):
    teacher = _normal(shape, generator)
    student = 0.7 * teacher + 0.7 * _normal(shape, generator)
    return {"student": student.to(device, dtype), "teacher": teacher.to(device, dtype)}


def _classified(shape, generator, device, dtype):
    """Feature maps (B, C, H, W) and logits of as many classes as channels."""
    logits = _rows(shape[:2], generator, device, dtype)
    named = {f"{side}_logits": x for side, x in logits.items()}
    return _rows(shape, generator, device, dtype) | named


def _stochastic(shape, generator, device, dtype):
    """(B, D, n): one representation of the student's, n of the teacher's."""
    samples, dim, passes = shape
    student = _normal((samples, dim), generator)
    noise = _normal((samples, passes, dim), generator)
    teacher = 0.7 * student.unsqueeze(1) + 0.7 * noise
    return {"student": student.to(device, dtype), "teacher": teacher.to(device, dtype)}


def _masks(shape, generator, device, dtype):
    rows = torch.arange(torch.Size(shape[:-1]).numel()).reshape(shape[:-1])
    return {"mask": (rows % 5 != 3).to(device)}


def _nothing(shape, generator, device, dtype):
    return {}


def _mse(student, teacher, *, distance):
    return F.mse_loss(student, teacher)


def _l2(student, teacher, *, distance):
    return torch.norm(student - teacher, p=2, dim=-1).mean()


def _cosine(student, teacher, *, distance):
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def _srrl(student, teacher, student_logits, teacher_logits, *, beta):
    pooled = (F.adaptive_avg_pool2d(x, 1).flatten(1) for x in (student, teacher))
    return F.mse_loss(*pooled) + beta * F.mse_loss(student_logits, teacher_logits)


def _sgkd(student, teacher, *, temperature):
    weights = ((student.unsqueeze(1) * teacher).sum(-1) / temperature).softmax(-1)
    least = weights.float().quantile(0.9, dim=-1, keepdim=True)
    kept = torch.where(weights >= least, weights, torch.zeros_like(weights))
    kept = kept / kept.sum(-1, keepdim=True)
    return F.mse_loss((kept.unsqueeze(-1) * teacher).sum(1), student)


_EMBEDDINGS = {
    "family": "embeddings",
    "make": _rows,
    "make_optional": _masks,
    "differentiable": ("student", "teacher"),
    "shapes": {"embedding_b256": (256, 768), "gpt2_hidden": (8, 1024, 768)},
    "small": (3, 5, 12),
    "by_row": False,
    "features": True,
    "divergence": False,
}

LOSSES = (
    *(
        Loss(
            name=f"embedding_{distance}",
            function=functional.embedding_loss,
            eager=eager,
            hyper={"distance": distance},
            **_EMBEDDINGS,
        )
        for distance, eager in (("mse", _mse), ("l2", _l2), ("cosine", _cosine))
    ),
    Loss(
        name="srrl_loss",
        function=functional.srrl_loss,
        eager=_srrl,
        hyper={"beta": 5.0},
        **_EMBEDDINGS
        | {
            "make": _classified,
            "make_optional": _nothing,
            "differentiable": ("student", "teacher", "student_logits", "teacher_logits"),
            "learned": ("student_logits",),
            "shapes": {"cifar100_b64": (64, 256, 8, 8)},
            "small": (3, 5, 4, 4),
        },
    ),
    Loss(
        name="sgkd_loss",
        function=functional.sgkd_loss,
        eager=_sgkd,
        hyper={"temperature": 5.0},
        **_EMBEDDINGS
        | {
            "make": _stochastic,
            "make_optional": _nothing,
            "shapes": {"cifar100_b64": (64, 512, 30)},
            "small": (4, 6, 20),
        },
    ),
)
