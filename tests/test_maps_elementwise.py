# SPDX-License-Identifier: Apache-2.0
"""Losses over the elements of maps: what is not said of every loss over features."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

import kdkernels
from kdkernels import backends
from kdkernels import functional as kd
from kdkernels.modules.projectors import ConvReg
from kdkernels.ops.maps.elementwise import KINDS, Choices, Numbers
from kdkernels.testing import LOSSES, gradients

BACKENDS = [b for b in ("reference", "cpu") if backends.verdict("maps.elementwise", b, "cpu").ok]
each = pytest.mark.parametrize("backend", BACKENDS)
ENTRIES = [x for x in LOSSES.values() if x.family == "maps.elementwise"]


def maps(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return student.requires_grad_(), teacher


def close(value, expected, rtol=1e-12):
    torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-14)


# Pixels that fill vectors, and that do not; a channel longer than a block of the kernel, and than
# a task; channels alone; a map whose channels are longer than its places.
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 8, 8), (2, 3, 7, 7), (1, 2, 40, 45), (1, 2, 130, 131), (3, 70), (2, 1100, 2, 3),
     (2, 5, 3, 4, 5), (4, 1, 5, 5), (3, 4, 9)],
)  # fmt: skip
@each
def test_shapes_and_layouts(shape, backend):
    """VID has a parameter with a gradient, in every place where the kernel may find one."""
    student, teacher = maps(*shape)
    log_scale = torch.linspace(-1, 2, shape[1], dtype=torch.float64).requires_grad_()
    channel = (1, -1, *[1] * (len(shape) - 2))
    variance = (F.softplus(log_scale) + 1e-5).view(channel)
    expected = ((student - teacher) ** 2 / variance + variance.log()).mean() / 2
    wanted = torch.autograd.grad(expected, (student, log_scale))
    formats = {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(len(shape), [])
    for order in (torch.contiguous_format, *formats):
        s = student.detach().contiguous(memory_format=order).requires_grad_()
        value = kd.vid_loss(s, teacher, log_scale, backend=backend)
        close(value, expected)
        found = torch.autograd.grad(value, (s, log_scale))
        close(found[0], wanted[0], 1e-10)
        close(found[1], wanted[1], 1e-10)
        if order is not torch.contiguous_format and backend == "cpu":
            assert found[0].is_contiguous(memory_format=order)


MASKS = [(3, 4, 1, 1), (3, 1, 5, 6), (3, 4, 5, 6), (1, 4, 1, 1), (1, 1, 5, 6), (1, 1, 1, 1),
         (3, 1, 5, 1), (1, 4, 1, 6), (3, 1, 1, 1)]  # fmt: skip


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@each
def test_masks(shape, order, backend):
    student, teacher = maps(3, 4, 5, 6)
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64)
    for mask in (weights, weights > 0.4, weights.to(torch.bfloat16)):
        expected = (mask.double() * (student - teacher) ** 2).mean()
        (wanted,) = torch.autograd.grad(expected, student)
        s = student.detach().contiguous(memory_format=order).requires_grad_()
        value = kd.masked_mse(s, teacher, mask, backend=backend)
        close(value, expected)
        close(torch.autograd.grad(value, s)[0], wanted)
        total = kd.masked_mse(s, teacher, mask, reduction="sum", backend=backend)
        close(total, value * student.numel())


def test_masks_that_do_not_fit():
    student, teacher = maps(3, 4, 5, 6)
    for mask, error in (
        (torch.ones(3, 4), ValueError),
        (torch.ones(3, 4, 5, 5), ValueError),
        (torch.ones(3, 4, 1, 1, dtype=torch.int64), TypeError),
        (None, TypeError),
        (torch.ones(3, 4, 1, 1, requires_grad=True), NotImplementedError),
    ):
        with pytest.raises(error, match="masked_mse: mask must"):
            kd.masked_mse(student, teacher, mask)


def test_random_masks():
    x = torch.empty(40, 50, 8, 9, dtype=torch.bfloat16)
    for by, shape in (("channel", (40, 50, 1, 1)), ("place", (40, 1, 8, 9))):
        drawn = [
            kd.random_mask(x, 0.3, by=by, generator=torch.Generator().manual_seed(seed))
            for seed in (0, 0, 1)
        ]
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
        assert drawn[0].shape == shape and drawn[0].dtype == x.dtype
        assert set(drawn[0].unique().tolist()) == {0.0, 1.0}
        assert drawn[0].float().mean().item() == pytest.approx(0.7, abs=0.05)
        assert kd.random_mask(x, 0.0, by=by).all() and not kd.random_mask(x, 1.0, by=by).any()
    with pytest.raises(ValueError, match=r"random_mask: drop must be in \[0.0, 1.0\]"):
        kd.random_mask(x, 1.5)


@each
def test_ofd_is_the_published_sum_of_cases(backend):
    student, teacher = maps(4, 3, 6, 6)
    margin = torch.tensor([-0.2, -0.7, -2.0], dtype=torch.float64)
    pooled = F.adaptive_avg_pool2d(maps(4, 3, 12, 12, seed=1)[1], 6)
    for t, given in ((teacher, teacher), (pooled, maps(4, 3, 12, 12, seed=1)[1])):
        m = margin.view(1, 3, 1, 1)
        expected = (
            (student - m) ** 2 * ((student > m) & (t <= m))
            + (student - t) ** 2 * ((student > t) & (t > m) & (t <= 0))
            + (student - t) ** 2 * (t > 0)
        ).sum() / 4
        close(kd.ofd_loss(student, given, margin, backend=backend), expected)
    simple = ((student - teacher) ** 2 * ((student > teacher) | (teacher > 0))).sum()
    close(kd.ofd_loss(student, teacher, reduction="sum", backend=backend), simple)


@each
def test_stages_are_summed_with_weights(backend):
    pairs = [maps(2, 3, 4, 4), maps(2, 5, 2, 2, seed=1), maps(2, 4, 1, 1, seed=2)]
    students, teachers = ([p[i] for p in pairs] for i in (0, 1))
    margins = [-torch.ones(n) for n in (3, 5, 4)]
    for function, extra, weights in (
        (kd.ab_loss, (), (0.25, 0.5, 1.0)),
        (kd.ofd_loss, (margins,), (0.25, 0.5, 1.0)),
        (kd.fitnet_loss, (), (1.0, 1.0, 1.0)),
    ):
        alone = [
            function(s, t, *(x[i] for x in extra), backend=backend)
            for i, (s, t) in enumerate(pairs)
        ]
        expected = sum(w * x for w, x in zip(weights, alone, strict=True))
        close(function(students, teachers, *extra, backend=backend), expected)
    close(
        kd.ab_loss(students, teachers, stage_weights=[3.0, 0.0, 1.0], backend=backend),
        3 * kd.ab_loss(*pairs[0]) + kd.ab_loss(*pairs[2]),
    )
    with pytest.raises(ValueError, match="ab_loss: stage_weights must have one number"):
        kd.ab_loss(students, teachers, stage_weights=[1.0])
    with pytest.raises(ValueError, match="ofd_loss: there must be a parameter of each of 3"):
        kd.ofd_loss(students, teachers, margins[:2])
    with pytest.raises(ValueError, match="ofd_loss: margin must have one element for each of 3"):
        kd.ofd_loss(students[0], teachers[0], margins[1])


def test_margin_is_the_mean_below_zero():
    weight = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.0, 0.0, 0.0, 1e-20], dtype=torch.float64)
    bias = torch.tensor([0.2, -1.0, 0.0, 2.0, -40.0, -1.5, 0.5, -0.5], dtype=torch.float64)
    margin = kd.ofd_margin(weight, bias)
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    for i in range(3):
        density = torch.exp(-x.square() / 2)
        values = bias[i] + weight[i].abs() * x
        below = values < 0
        expected = (values * density)[below].sum() / density[below].sum()
        assert margin[i].item() == pytest.approx(expected.item(), rel=1e-4)
    # Negative responses are too rare; certain; of a constant channel, both.
    assert margin[3:].tolist() == pytest.approx([-0.9, -40.0, -1.5, 0.0, -0.5])
    assert kd.ofd_margin(weight.float(), bias.float()).dtype == torch.float32


@each
def test_vid_at_scales_whose_exponential_overflows(backend):
    student, teacher = maps(2, 3, 4, 4, dtype=torch.float32)
    log_scale = torch.tensor([200.0, -200.0, 0.0], requires_grad=True)
    value = kd.vid_loss(student, teacher, log_scale, backend=backend)
    assert value.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, (student, log_scale)))
    variance = (F.softplus(log_scale) + 1e-5).detach()
    close(kd.vid_loss(student, teacher, variance=variance, backend=backend), value, 1e-6)
    for given in ({}, {"log_scale": log_scale, "variance": variance}):
        with pytest.raises(TypeError, match="exactly one of log_scale and variance"):
            kd.vid_loss(student, teacher, **given)


@each
def test_normalised_maps(backend):
    student, teacher = maps(3, 4, 5, 6)
    with torch.no_grad():
        student[0] = 0
    value = kd.l2_loss(student, teacher, backend=backend)
    close(value * 3, 1 + sum(
        2 - 2 * F.cosine_similarity(student[i].flatten(), teacher[i].flatten(), 0) for i in (1, 2)
    ))  # fmt: skip
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.isfinite().all() and not gradient[0].any() and gradient[1].any()
    same = kd.l2_loss(student, student.detach(), root=True, backend=backend)
    assert same == 0 and not torch.autograd.grad(same, student)[0].any()
    plain = kd.l2_loss(student, teacher, normalize=False, by_element=True, backend=backend)
    close(plain, F.mse_loss(student, teacher))


@each
def test_masks_of_tokens(backend):
    student, teacher = maps(2, 4, 5, 6)
    ones = torch.ones(2, 3, 5, 6, dtype=torch.float64)
    error = F.mse_loss(student, teacher)
    close(kd.maskd_loss(student, teacher, ones, eps=0.0, backend=backend), error / 2)
    close(kd.maskd_loss(student, teacher, ones, compat="mmrazor", backend=backend), error)
    share = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64)
    weighed = kd.maskd_loss(student, teacher, ones, share, compat="mmrazor", backend=backend)
    close(weighed, error)
    assert kd.maskd_loss(student, teacher, 0 * ones, eps=0.0, backend=backend) == 0
    for masks in (ones[:, :, :3], ones[0], ones[:1]):
        with pytest.raises(ValueError, match="maskd_loss: masks must have shape"):
            kd.maskd_loss(student, teacher, masks)
    with pytest.raises(ValueError, match="receptive_masks: tokens must have the features' 4"):
        kd.receptive_masks(student, torch.ones(2, 3))


def test_overlap_of_masks():
    a = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    b = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    masks = torch.stack([a, b, 1 - a]).unsqueeze(0).requires_grad_()
    assert kd.maskd_dice(masks).item() == pytest.approx((0.5 + 0.0 + 0.5) / 3)
    assert kd.maskd_dice(masks[:, :1]) == 0 and kd.maskd_dice(masks[:0]) == 0
    (gradient,) = torch.autograd.grad(kd.maskd_dice(0 * masks), masks)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
@each
def test_nan_and_extremes(entry, backend):
    inputs = entry.inputs(*entry.small, dtype=torch.float16)
    weighted = len(inputs) > 2 and "margin" not in inputs  # up to 3-fold
    largest = 20000 if weighted else 60000
    inputs["student"] = (largest * inputs["student"].sign()).requires_grad_()
    inputs["teacher"] = torch.zeros_like(inputs["teacher"])
    value = entry(inputs, backend=backend)
    assert value.isfinite()
    if backend == "cpu":  # whose fp16 gradients are not in fp16 before their factor
        assert gradients(value, inputs)["student"].isfinite().all()
    inputs["student"] = inputs["student"].detach().index_fill(1, torch.tensor([2]), math.nan)
    assert entry(inputs, backend=backend).isnan()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_many_tasks_have_the_same_bits_on_any_number_of_threads(entry):
    if "cpu" not in BACKENDS:
        pytest.skip("the extension is not built")
    before = torch.get_num_threads()
    for order in (torch.contiguous_format, torch.channels_last):
        inputs = entry.inputs(9, 33, 19, 17, requires_grad=True)
        for side in ("student", "teacher"):
            x = inputs[side].detach().contiguous(memory_format=order)
            inputs[side] = x.requires_grad_(side in entry.differentiable)
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            value = entry(inputs, backend="cpu")
            found.append([value.detach(), *gradients(value, inputs).values()])
        torch.set_num_threads(before)
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_opcheck(kind, dtype):
    if "cpu" not in BACKENDS:
        pytest.skip("the extension is not built")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    operator = torch.ops.kdkernels.elementwise.default
    rest = 0.5, Numbers(), Choices(KINDS.index(kind))
    for order in (torch.contiguous_format, torch.channels_last):
        s, t = (torch.randn(2, 3, 4, 5, dtype=dtype).to(memory_format=order) for _ in range(2))
        torch.library.opcheck(operator, (s, t, None, *rest, 3))
        torch.library.opcheck(operator, (s, t, -torch.rand(1, 3, 1, 1, dtype=wide), *rest, 7))
        torch.library.opcheck(operator, (s, t, torch.rand(2, 1, 4, 5, dtype=wide), *rest, 1))


STUDENT, TEACHER = (2, 4, 8, 8), (2, 6, 4, 4)


def modules():
    torch.manual_seed(0)
    return {
        "fitnet": kdkernels.FitNetLoss(STUDENT, TEACHER),
        "ofd": kdkernels.OFDLoss([4], [-torch.rand(6)], stage_weights=[0.5]),
        "vid": kdkernels.VIDLoss([4], [6], [5]),
        "mgd": kdkernels.MGDLoss(4, 6, drop=0.65, by="place"),
        "maskd": kdkernels.MasKDLoss(kdkernels.ReceptiveTokens(6, 3, weighted=True), True),
        "ab": kdkernels.ABLoss(margin=2.0),
    }


@pytest.mark.parametrize("name", modules())
def test_modules(name):
    module = modules()[name]
    student, teacher = torch.randn(STUDENT, requires_grad=True), torch.randn(TEACHER)
    if name in ("mgd", "maskd", "ab"):
        teacher = torch.randn(2, 6, 8, 8)
    if name in ("maskd", "ab"):
        student = torch.randn(2, 6, 8, 8, requires_grad=True)
    learned = [p for p in module.parameters() if p.requires_grad]
    assert bool(learned) == (name not in ("maskd", "ab"))
    torch.manual_seed(1)
    value = module(student, teacher)
    for gradient in torch.autograd.grad(value, [student, *learned]):
        assert gradient.isfinite().all() and gradient.any()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.manual_seed(1)
        torch.testing.assert_close(other(student, teacher), value)
    fresh = modules()[name]
    fresh.load_state_dict(module.state_dict())
    torch.manual_seed(1)
    torch.testing.assert_close(fresh(student, teacher), value)
    assert module.to(torch.float64)(student.double(), teacher.double()).dtype == torch.float64


def test_start_of_the_modules():
    vid = kdkernels.VIDLoss([4, 4], [6, 7], init_variance=2.0)
    for log_scale in vid.log_scales:
        torch.testing.assert_close(F.softplus(log_scale) + vid.eps, torch.full_like(log_scale, 2.0))
    assert repr(kdkernels.ABLoss(margin=2.0)) == "ABLoss(margin=2.0)"
    identity = kdkernels.MGDLoss(6, 6, drop=0.0)
    identity.generation = torch.nn.Identity()
    student, teacher = maps(2, 6, 4, 4)
    close(identity(student, teacher), 7e-5 * (student - teacher).square().sum() / 2)


def test_modules_refuse_what_no_call_could_be_made_with():
    for make, error, message in (
        (lambda: kdkernels.ABLoss(margin=-1.0), ValueError, "margin must be in"),
        (lambda: kdkernels.ABLoss(backend="gpu"), ValueError, "backend must be one of"),
        (lambda: kdkernels.OFDLoss([4], [], reduction="none"), ValueError, "reduction must be"),
        (lambda: kdkernels.FitNetLoss(STUDENT, TEACHER, gamma=1), TypeError, "gamma"),
        (lambda: kdkernels.FitNetLoss((4,), TEACHER), ValueError, "student_shape must be"),
        (lambda: kdkernels.MGDLoss(4, 6, drop=2.0), ValueError, "drop must be in"),
        (lambda: kdkernels.MGDLoss(4, 0), ValueError, "teacher_channels must be at least 1"),
        (lambda: kdkernels.VIDLoss([4], [6])([], []), TypeError, "student must be"),
        (lambda: kdkernels.VIDLoss([4], [6])(*[[torch.ones(1, 4, 2, 2)] * 2] * 2), ValueError,
         "student must have 1 stages, got 2"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            make()


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((8, 8), (4, 4)), ((4, 4), (8, 8)), ((7, 9), (5, 4)), ((5, 5), (5, 5))],
)
def test_regressors_have_the_teachers_shape(student, teacher):
    regress = ConvReg((2, 3, *student), (2, 6, *teacher))
    assert regress(torch.randn(2, 3, *student)).shape == (2, 6, *teacher)
    assert (
        ConvReg((3, *student), (6, *teacher), relu=False)(torch.randn(2, 3, *student)) < 0
    ).any()
    with pytest.raises(NotImplementedError, match=r"no regressor from \(4, 4\) to \(9, 9\)"):
        ConvReg((3, 4, 4), (6, 9, 9))
