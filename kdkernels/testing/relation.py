# SPDX-License-Identifier: Apache-2.0
"""The relation family's entries. Their eager formulations are those of the suites."""

from __future__ import annotations

import functools
import math
from itertools import pairwise

import torch
import torch.nn.functional as F

from kdkernels import functional
from kdkernels.testing.loss import Loss


def _no_options(shape, generator, device, dtype):
    return {}


def _pair(shape, generator, device, dtype):
    """A student on its way to the teacher."""
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    student = 0.6 * teacher + 0.8 * noise
    return {"student": student.to(device, dtype), "teacher": teacher.to(device, dtype)}


def _maps(shape, generator, device, dtype):
    """What is left of them after a ReLU, the student's smaller."""
    return {name: x.clamp(min=-0.1) for name, x in _pair(shape, generator, device, dtype).items()}


def _views(shape, generator, device, dtype):
    """Four of each sample."""
    return _pair((4 * shape[0], shape[1]), generator, device, dtype)


def _staged(number: int, stem: bool):
    """Stages of half the size and twice the channels each, as those of a ResNet.

    With its ``stem``, the first two are of one size.
    """

    def make(shape, generator, device, dtype):
        rows, channels, height, width = shape
        tensors = {}
        for i in range(number):
            by = max(i - stem, 0)
            size = rows, channels << i, max(height >> by, 1), max(width >> by, 1)
            for name, x in _maps(size, generator, device, dtype).items():
                tensors[f"{name}_{i}" if i else name] = x
        return tensors

    return make


def _on_stages(function):
    """A function of sequences, of the tensors that `_staged` makes."""

    @functools.wraps(function)
    def call(student, teacher, *, backend=None, **given):
        options = {} if backend is None else {"backend": backend}
        number = 1 + sum(name.startswith("student_") for name in given)
        sides = [
            [first, *(given.pop(f"{side}_{i}") for i in range(1, number))]
            for side, first in (("student", student), ("teacher", teacher))
        ]
        return function(*sides, **given, **options)

    return call


def _pool(a, b):
    if a.shape[2] > b.shape[2]:
        return F.adaptive_avg_pool2d(a, b.shape[2:]), b
    if a.shape[2] < b.shape[2]:
        return a, F.adaptive_avg_pool2d(b, a.shape[2:])
    return a, b


def _polynomial_kernel(a, b):
    return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).pow(2)


def _nst_stage(student, teacher):
    s, t = (F.normalize(x.flatten(2), dim=2) for x in _pool(student, teacher))
    own = _polynomial_kernel(t, t).mean().detach() + _polynomial_kernel(s, s).mean()
    return own - 2 * _polynomial_kernel(s, t).mean()


def _nst(student, teacher):
    return sum(_nst_stage(s, t) for s, t in zip(student, teacher, strict=True))


def _sp(student, teacher):
    def similarities(x):
        x = x.flatten(1)
        return F.normalize(x @ x.t())

    difference = similarities(teacher) - similarities(student)
    return (difference * difference).view(-1, 1).sum(0).div(len(student) ** 2).squeeze(0)


def _fsp_matrices(maps):
    found = []
    for low, high in pairwise(maps):
        low, high = _pool(low, high)
        product = low.unsqueeze(2) * high.unsqueeze(1)
        found.append(product.view(*product.shape[:3], -1).mean(-1))
    return found


def _fsp(student, teacher):
    pairs = zip(_fsp_matrices(student), _fsp_matrices(teacher), strict=True)
    return sum((s - t).pow(2).mean() for s, t in pairs)


def _pairwise(x):
    square = x.pow(2).sum(1)
    distance = (square.unsqueeze(1) + square.unsqueeze(0) - 2 * (x @ x.t())).clamp(min=1e-12).sqrt()
    distance = distance.clone()
    rows = range(len(x))
    distance[rows, rows] = 0
    return distance / distance[distance > 0].mean()


def _angle(x):
    unit = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), p=2, dim=2)
    return torch.bmm(unit, unit.transpose(1, 2)).view(-1)


def _rkd(student, teacher, *, distance_weight=25.0, angle_weight=50.0):
    loss = 0
    if distance_weight:
        t, s = _pairwise(teacher), _pairwise(student)
        loss = loss + distance_weight * F.smooth_l1_loss(s, t)
    if angle_weight:
        t, s = _angle(teacher), _angle(student)
        loss = loss + angle_weight * F.smooth_l1_loss(s, t)
    return loss


def _pkt(student, teacher):
    eps = 1e-7

    def unit(x):
        x = x / (x.pow(2).sum(1, keepdim=True).sqrt() + eps)
        x[x != x] = 0
        return x

    def probabilities(x):
        similarity = (torch.mm(x, x.t()) + 1.0) / 2.0
        return similarity / similarity.sum(1, keepdim=True)

    s, t = unit(student), unit(teacher)
    p, q = probabilities(s), probabilities(t)
    return (q * torch.log((q + eps) / (p + eps))).mean()


def _neighbours(student, teacher, *, compat):
    difference = torch.abs(student - teacher)
    return (difference[:-1] * difference[1:]).sum(1).mean()


def _correlations(x, gamma=0.4, order=2):
    rows = [
        sum(
            math.exp(-2 * gamma) * (2 * gamma) ** p / math.factorial(p) * (x @ row) ** p
            for p in range(order + 1)
        )
        for row in x
    ]
    return torch.stack(rows) if rows else x @ x.t()


def _cc(student, teacher, *, compat="paper"):
    s, t = _correlations(student), _correlations(teacher)
    distance = torch.dist(s, t) if compat == "torchdistill" else (s - t).pow(2).sum()
    return distance / len(student) ** 2


def _ickd(student, teacher):
    def correlations(x):
        x = x.flatten(2)
        return F.normalize(torch.bmm(x, x.transpose(1, 2)), dim=2)

    difference = correlations(student) - correlations(teacher)
    return difference.pow(2).sum() / (student.shape[1] * len(student) ** 2)


def _gram(student, teacher):
    s, t = (torch.bmm(x, x.transpose(1, 2)) for x in (student, teacher))
    return (s - t).pow(2).sum((1, 2)).mean()


def _right(x, number):
    parts = torch.svd(x if x.dtype == torch.float64 else x.float())
    parts = [torch.where(torch.isfinite(x), x, torch.zeros_like(x)) for x in parts]
    _, values, v = (F.normalize(x[..., :number], dim=1) for x in parts)
    return values, v


def _kdsvd(student, teacher):
    loss, before = 0, None
    for s, t in zip(student, teacher, strict=True):
        s, t = (x.flatten(2).transpose(1, 2) for x in (s, t))
        (_, v_s), (scale, v_t) = _right(s, 4), _right(t, 1)
        cosine = torch.matmul(v_s.transpose(1, 2), v_t)
        most = cosine.abs().amax(1, keepdim=True)
        mask = torch.where(most == cosine.abs(), cosine.sign(), torch.zeros_like(cosine))
        here = torch.matmul(v_s, mask) * scale.unsqueeze(1), v_t * scale.unsqueeze(1)
        if before is not None:
            of_s, of_t = (
                torch.exp(-(x.unsqueeze(2) - y.unsqueeze(1)).pow(2) / 8)
                for x, y in zip(here, before, strict=True)
            )
            squares = (of_s - of_t.detach()).pow(2)
            loss = loss + torch.where(squares.isfinite(), squares, 0).sum()
        before = here
    return loss / len(student[0])


def _similarity(student, teacher, *, views=4, temperature=0.5, ratio=0.75):
    def similarities(x):
        plain = x[::views].unsqueeze(0)
        others = x.unflatten(0, (-1, views))[:, 1:].flatten(0, 1).unsqueeze(1)
        return F.cosine_similarity(others, plain, dim=2)

    s, t = similarities(student), similarities(teacher)
    own = torch.arange(t.shape[1], device=t.device).repeat_interleave(views - 1)
    rank = (t.argsort(dim=1, descending=True) == own.unsqueeze(1)).long().argmax(1)
    wrong = int((rank > 0).sum())
    kept = rank.argsort(stable=True)[: len(rank) - wrong + int(wrong * ratio)].sort()[0]
    log_p, q = (s[kept] / temperature).log_softmax(1), (t[kept] / temperature).softmax(1)
    return F.kl_div(log_p, q, reduction="batchmean") * temperature**2


_BOTH = ("student", "teacher")
_EMBEDDINGS = {"cifar100_b64": (64, 256), "imagenet_b256": (256, 512)}
_STAGES = {"resnet32x4_b64": (64, 64, 32, 32)}
_LAST = {"resnet32x4_b64": (64, 256, 8, 8)}


def _entry(name, operator, function, eager, *, make=_pair, small=(9, 12), shapes=None, **more):
    number = more.pop("number", 0)
    if number:  # several stages
        make, eager = _staged(number, number > 3), _on_stages(eager)
        function = _on_stages(function)
        students = tuple(f"student_{i}" for i in range(1, number))
        teachers = tuple(f"teacher_{i}" for i in range(1, number))
        more = {"learned": students, "differentiable": (*_BOTH, *students, *teachers)} | more
    return Loss(
        name=name, family=f"relation.{operator}", function=function, eager=eager, make=make,
        small=small, shapes=shapes or _EMBEDDINGS, make_optional=_no_options, by_row=False,
        features=True,        divergence=False, **{"differentiable": _BOTH} | more,
    )  # fmt: skip


LOSSES = (
    _entry("rkd_loss", "rkd", functional.rkd_loss, _rkd),
    _entry(
        "rkd_distance", "rkd", functional.rkd_distance,
        functools.partial(_rkd, distance_weight=1.0, angle_weight=0.0),
    ),
    _entry(
        "rkd_angle", "rkd", functional.rkd_angle,
        functools.partial(_rkd, distance_weight=0.0, angle_weight=1.0),
    ),
    _entry("pkt_loss", "pkt", functional.pkt_loss, _pkt),
    _entry("cc_loss", "polynomial", functional.cc_loss, _cc),
    _entry(
        "cc_torchdistill", "polynomial", functional.cc_loss, _cc,
        hyper={"compat": "torchdistill"},
    ),
    _entry(
        "cc_repdistiller", "neighbours", functional.cc_loss, _neighbours,
        hyper={"compat": "repdistiller"}, shapes={"cifar100_b64": (64, 128)},
    ),
    _entry(
        "sp_loss", "gram_match", functional.sp_loss, _sp, make=_maps, small=(4, 6, 4, 4),
        shapes=_LAST,
    ),
    _entry(
        "ickd_loss", "gram_match", functional.ickd_loss, _ickd, make=_maps, small=(3, 6, 4, 4),
        shapes=_LAST,
    ),
    _entry(
        "gram_loss", "gram_match", functional.gram_loss, _gram, small=(4, 5, 8),
        shapes={"modalities_b64": (64, 8, 512)},
    ),
    _entry(
        "nst_loss", "nst_grams", functional.nst_loss, _nst, small=(3, 4, 8, 12), shapes=_STAGES,
        number=3, stops=True,
    ),
    _entry(
        "fsp_loss", "gram_match", functional.fsp_loss, _fsp, small=(3, 4, 8, 8),
        shapes={"resnet32x4_b64": (64, 32, 32, 32)}, number=4,
    ),
    _entry(
        "kdsvd_loss", "kdsvd_loss", functional.kdsvd_loss, _kdsvd, small=(2, 4, 8, 8),
        shapes=_STAGES, number=3, stops=True,
        differentiable=("student", "student_1", "student_2"),
    ),
    _entry(
        "sskd_similarity", "rowwise", functional.sskd_similarity, _similarity, small=(5, 7),
        make=_views, shapes={"cifar100_b64": (64, 128)},
    ),
)  # fmt: skip
