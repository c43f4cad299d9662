# SPDX-License-Identifier: Apache-2.0
"""Losses between vectors, and the modules of methods that are made of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdkernels import functional as kd
from kdkernels import modules

distances = pytest.mark.parametrize("distance", ["mse", "l2", "cosine"])


def rows(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_cosine_does_not_cancel():
    """1 - cos of fp32 rows is at best 1e-7; between rows this near it is 5e-11."""
    student, noise = rows(64, 300)
    teacher = (student + 1e-5 * noise).requires_grad_()
    loss = kd.embedding_loss(student, teacher, distance="cosine")
    exact = (1 - F.cosine_similarity(student.double(), teacher.double(), -1)).mean()
    assert abs(loss.item() / exact.item() - 1) < 1e-2  # of the rounding of the rows themselves
    same = kd.embedding_loss(teacher, teacher.detach(), distance="cosine")
    assert same == 0 and not torch.autograd.grad(same, teacher)[0].any()


def test_rows_of_zeros_have_cosine_zero():
    student, teacher = rows(4, 6)
    student[0], student[1], teacher[1] = 0, 0, 0
    found = kd.embedding_loss(student[:2], teacher[:2], distance="cosine")
    assert found == F.cosine_similarity(student[:2], teacher[:2], -1).sub(1).neg().mean() == 1


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_cosine_of_any_size(size):
    student, teacher = rows(4, 6)
    expected = kd.embedding_loss(student, teacher, distance="cosine")
    student = (student * size).requires_grad_()
    loss = kd.embedding_loss(student, teacher * size, distance="cosine")
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()


def test_distance_of_equal_rows_has_a_zero_gradient():
    student, _ = rows(4, 6)
    student.requires_grad_()
    loss = kd.embedding_loss(student, student.detach(), distance="l2")
    assert loss == 0 and not torch.autograd.grad(loss, student)[0].any()


@distances
def test_masked_rows_are_as_if_not_there(distance):
    student, teacher = rows(3, 5, 6)
    mask = torch.rand(3, 5) < 0.6
    expected = kd.embedding_loss(student[mask], teacher[mask], distance=distance)
    student[~mask], teacher[~mask] = torch.nan, torch.inf
    student.requires_grad_()
    loss = kd.embedding_loss(student, teacher, distance=distance, mask=mask)
    torch.testing.assert_close(loss, expected)
    gradient = torch.autograd.grad(loss, student)[0]
    assert gradient.isfinite().all() and not gradient[~mask].any()
    nothing = kd.embedding_loss(student, teacher, distance=distance, mask=mask & ~mask)
    assert nothing == 0 and not torch.autograd.grad(nothing, student)[0].any()


@distances
def test_sums_and_sequences(distance):
    student, teacher = rows(3, 5, 6)
    mean, total = (
        kd.embedding_loss(student, teacher, distance=distance, reduction=r) for r in ("mean", "sum")
    )
    torch.testing.assert_close(total, mean * (90 if distance == "mse" else 15))
    both = kd.embedding_loss([student, teacher], [teacher, teacher], distance=distance)
    torch.testing.assert_close(both, mean / 2)


@distances
def test_second_derivatives(distance):
    student, teacher = (x.double().requires_grad_() for x in rows(3, 4))

    def function(student, teacher):
        return kd.embedding_loss(student, teacher, distance=distance)

    assert torch.autograd.gradgradcheck(function, (student, teacher))


def test_attention_of_the_student():
    """Weights of the ``quantile`` above, with and without a gradient through them."""
    student, _ = rows(4, 8)
    teacher = torch.randn(4, 20, 8)
    student.requires_grad_()
    loss, free = (kd.sgkd_loss(student, teacher, detach_weights=d) for d in (True, False))
    assert torch.equal(loss, free)
    scores = (student.unsqueeze(1) * teacher).sum(-1)
    kept = scores >= scores.quantile(0.9, dim=-1, keepdim=True)
    assert (kept.sum(-1) == 2).all()
    weights = torch.where(kept, (scores / 5).softmax(-1), 0.0).detach()
    target = (weights.unsqueeze(-1) * teacher).sum(1) / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(loss, F.mse_loss(student, target))
    wanted = 2 * (student - target) / student.numel()
    torch.testing.assert_close(torch.autograd.grad(loss, student)[0], wanted)
    everything = kd.sgkd_loss(student, teacher, quantile=0.0, temperature=1e9)
    torch.testing.assert_close(everything, F.mse_loss(student, teacher.mean(1)), rtol=1e-5, atol=0)


def test_srrl_of_maps_and_of_pooled_features():
    student, teacher = rows(3, 8, 4, 4)
    logits = rows(3, 5, seed=1)
    of_maps = kd.srrl_loss(student, teacher, *logits, alpha=2.0, beta=5.0)
    pooled = (x.mean((2, 3)) for x in (student, teacher))
    torch.testing.assert_close(of_maps, kd.srrl_loss(*pooled, *logits, alpha=2.0, beta=5.0))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, t: kd.embedding_loss(s, t, distance="l1"), ValueError, "distance must be one"),
        (lambda s, t: kd.embedding_loss(s, t, reduction="none"), ValueError, "reduction must be"),
        (lambda s, t: kd.embedding_loss(s, t, mask=torch.ones(3)), ValueError, "mask must have"),
        (lambda s, t: kd.embedding_loss([s], [t, t]), ValueError, "number of stages"),
        (lambda s, t: kd.embedding_loss(s, t, backend="cpu"), RuntimeError, "composite by design"),
        (lambda s, t: kd.sgkd_loss(s, t), ValueError, "teacher must have the student's samples"),
        (lambda s, t: kd.sgkd_loss(s, t, quantile=2.0), ValueError, "quantile must be in"),
        (lambda s, t: kd.sgkd_loss(s, t, temperature=0.0), ValueError, "temperature must be pos"),
        (lambda s, t: kd.srrl_loss(s, t, s, t[:, 1:]), ValueError, "teacher_logits must have"),
        (lambda s, t: kd.srrl_loss(s, t, s.int(), t), TypeError, "student_logits must be"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(*rows(4, 6))


def test_projections():
    student, teacher = torch.randn(3, 5, 4), torch.randn(3, 5, 6)
    each = modules.EmbeddingLoss(4, 6, num_layers=2, bias=False, distance="cosine")
    projected = [p(student) for p in each.projections]
    expected = kd.embedding_loss(projected, [teacher] * 2, distance="cosine")
    assert torch.equal(each([student] * 2, [teacher] * 2), expected)
    with pytest.raises(ValueError, match="student must be 2 tensors"):
        each(student, teacher)
    assert not modules.EmbeddingLoss(6, 6).projections
    plain = modules.EmbeddingLoss(6, 6)(teacher, teacher + 1)
    torch.testing.assert_close(plain, torch.tensor(1.0))
    assert len(modules.EmbeddingLoss(6, 6, project=True).projections) == 1


def test_classifiers_are_frozen_copies():
    classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))
    student, teacher = torch.randn(4, 5, 4, 4), torch.randn(4, 6, 4, 4)
    for module in (modules.SRRLLoss(5, 6, classifier), modules.SimKDLoss(5, 6, classifier)):
        module.train()
        assert not module.classifier.training and classifier.training
        assert all(p.requires_grad for p in classifier.parameters())
        assert not any(p.requires_grad for p in module.classifier.parameters())
    srrl, simkd = modules.SRRLLoss(5, 6, classifier), modules.SimKDLoss(5, 6, classifier)
    loss = srrl(student, teacher, torch.randn(4, 3)) + simkd(student, teacher)
    loss.backward()
    for part in (srrl.connector, simkd.transfer):
        assert all(p.grad.isfinite().all() for p in part.parameters())
    assert srrl.connector[0].weight.grad.any() and simkd.transfer[0].weight.grad.any()
    assert simkd.eval().predict(student).shape == (4, 3)


def test_review_takes_sizes_as_they_come():
    """Student stages larger and smaller than the teacher's, an odd size, pooled features."""
    torch.manual_seed(0)
    student = [torch.randn(2, 4, 9, 7), torch.randn(2, 6, 4, 4), torch.randn(2, 6)]
    teacher = [torch.randn(2, 5, 8, 8), torch.randn(2, 7, 7, 5), torch.randn(2, 8)]
    channels = [[x.shape[1] for x in stages] for stages in (student, teacher)]
    module = modules.ReviewKDLoss(*channels)
    fused, residual = [], None
    for abf, x, target in zip(module.abfs, student[::-1], teacher[::-1], strict=True):
        x, target = (y[..., None, None] if y.dim() == 2 else y for y in (x, target))
        feature, residual = abf(x, residual, target.shape[2:])
        assert feature.shape == target.shape and residual.shape[2:] == target.shape[2:]
        fused.append(feature)
    module(student, teacher).backward()
    assert all(p.grad is not None for p in module.parameters())
    with pytest.raises(ValueError, match="must be 3 stages each"):
        module(student[:2], teacher)
    with pytest.raises(ValueError, match="teacher_channels must be"):
        modules.ReviewKDLoss([4, 6], [5])


def test_semckd_learns_from_each_stage_as_attention_says():
    torch.manual_seed(0)
    student = [torch.randn(8, 3, 6, 6), torch.randn(8, 4, 3, 3).requires_grad_()]
    teacher = [torch.randn(8, 5, 4, 4).requires_grad_(), torch.randn(8, 2, 9, 9)]
    module = modules.SemCKDLoss([3, 4], [5, 2], batch_size=8)
    attention = module.attention(student, teacher)
    assert attention.shape == (8, 2, 2)
    torch.testing.assert_close(attention.sum(-1), torch.ones(8, 2))
    module(student, teacher).backward()
    assert all(p.grad is not None for p in module.parameters())
    assert student[1].grad.any() and teacher[0].grad is None
    sharp = modules.SemCKDLoss([3, 4], [5, 2], batch_size=8, soft=1e-4)
    assert sharp.attention(student, teacher).amax(-1).min() > 0.9
    with pytest.raises(ValueError, match="student must be 2 stages, got 1"):
        module(student[:1], teacher)
    with pytest.raises(ValueError, match=r"maps of shape \(8, 3, H, W\), got \(7, 3, 6, 6\)"):
        module([x[:7] for x in student], [x[:7] for x in teacher])
    with pytest.raises(ValueError, match=r"teacher must be maps of shape \(8, 5, H, W\)"):
        module(student, teacher[::-1])
    for wrong, what in (({"factor": 9}, "factor"), ({"soft": 0.0}, "soft must be positive")):
        with pytest.raises(ValueError, match=what):
            modules.SemCKDLoss([3], [5], batch_size=8, **wrong)
    with pytest.raises(ValueError, match="at least one stage each"):
        modules.SemCKDLoss([3], [], batch_size=8)


def test_factors():
    paraphraser, translator = modules.Paraphraser(8), modules.Translator(6, 8)
    student, teacher = torch.randn(2, 6, 5, 5), torch.randn(2, 8, 5, 5)
    assert paraphraser(teacher).shape == translator(student).shape == (2, 4, 5, 5)
    assert paraphraser.reconstruct(teacher).shape == teacher.shape
    assert len([m for m in paraphraser.modules() if isinstance(m, nn.LeakyReLU)]) == 6
    with pytest.raises(ValueError, match="rate must leave at least one channel"):
        modules.Translator(6, 8, rate=0.1)
