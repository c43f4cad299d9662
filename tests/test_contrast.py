# SPDX-License-Identifier: Apache-2.0
"""CRD: scores, memory banks, negatives, normalizers, and the module that holds them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from counting import Count

from kdkernels import functional as kd
from kdkernels import modules
from kdkernels.backends import verdict
from kdkernels.bench import measure
from kdkernels.testing import LOSSES, assert_close_to_oracle, gradients, leaves
from kdkernels.testing.contrast import crd_published

CRD = LOSSES["crd_loss"]
backends = pytest.mark.parametrize("backend", [b for b in CRD.backends() if b != "triton"])
# No whole vector of columns, several tiles of the bank, and a bank of which few rows are wanted.
SHAPES = [(3, 3, 5, 4), (5, 7, 100, 40), (4, 130, 300, 290), (2, 128, 150, 2000)]
# Of more batches, and of more tiles, than the CPU's kernel gathers before it adds them in double.
SHAPES += [(2, 5, 3000, 4000), (6, 130, 1700, 1600)]


def leaf_inputs(*shape, **options):
    return CRD.inputs(*shape, requires_grad=True, **options)


@backends
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_shapes(shape, dtype, backend):
    inputs = leaf_inputs(*shape, dtype=dtype)
    exact, plain = leaves(inputs, torch.float64), leaves(inputs)
    oracle, value = CRD(exact, backend="reference"), CRD(inputs, backend=backend)
    eager = crd_published(**plain)
    assert_close_to_oracle(value, eager, oracle)
    found, wanted = gradients(value, inputs), gradients(oracle, exact)
    for name, yardstick in gradients(eager, plain).items():
        assert_close_to_oracle(found[name], yardstick, wanted[name], name)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_finite_where_probabilities_are_not(backend, dtype):
    """exp(score / T) overflows, and underflows, by far; Z too is far from it."""
    inputs = leaf_inputs(4, 16, 20, 30, dtype=dtype)
    for normalizer in (1e-30, 1e30):
        inputs["normalizer"] = torch.full_like(inputs["normalizer"], normalizer)
        value = CRD(inputs, temperature=1e-4, backend=backend)
        assert value.isfinite()
        exact = CRD(leaves(inputs, torch.float64), temperature=1e-4, backend="reference")
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=0)
        assert all(g.isfinite().all() for g in gradients(value, inputs).values())


@backends
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_embeddings_of_any_size(backend, size):
    inputs = leaf_inputs(4, 16, 20, 30)
    expected = CRD(inputs, backend=backend)
    scaled = {n: x * size if n in CRD.differentiable else x for n, x in inputs.items()}
    torch.testing.assert_close(CRD(scaled, backend=backend), expected, rtol=1e-4, atol=0)


@backends
def test_sum_and_normalizer_of_the_batch(backend):
    inputs = leaf_inputs(6, 16, 20, 30)
    mean, total = (CRD(inputs, reduction=r, backend=backend) for r in ("mean", "sum"))
    torch.testing.assert_close(total, 6 * mean)
    given = {n: x for n, x in inputs.items() if n != "normalizer"}
    z = kd.crd_normalizer(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kd.crd_normalizer(**given), z)
    bank, chosen = (
        inputs["teacher_bank"],
        torch.cat([inputs["index"][:, None], inputs["negatives"]], 1),
    )
    scores = torch.einsum("bd,bkd->bk", F.normalize(inputs["student"]), bank[chosen]) / 0.07
    torch.testing.assert_close(z[0], scores.exp().mean() * len(bank))
    torch.testing.assert_close(
        CRD(given, backend=backend), CRD(inputs | {"normalizer": z}, backend=backend)
    )


@backends
def test_banks_move_once(backend):
    inputs = leaf_inputs(6, 16, 20, 30)
    before = {n: inputs[n].clone() for n in ("student_bank", "teacher_bank")}
    index = inputs["index"]
    for reads in (True, False):  # scores are of the banks as they were; the backward moves nothing
        given = inputs | {n: x.clone() for n, x in before.items()}
        value = CRD(given, backend=backend, momentum=0.5)
        torch.testing.assert_close(value, CRD(inputs, backend=backend))
        moved = {n: given[n].clone() for n in before}
        if reads:
            torch.autograd.grad(value, given["student"], retain_graph=True)
            torch.autograd.grad(value, given["student"])
        for side in ("student", "teacher"):
            bank = f"{side}_bank"
            assert torch.equal(given[bank], moved[bank])
            wanted = before[bank].clone()
            embedded = F.normalize(inputs[side].detach())
            wanted[index] = F.normalize(0.5 * wanted[index] + 0.5 * embedded)
            torch.testing.assert_close(given[bank], wanted)
            rest = torch.ones(30, dtype=torch.bool)
            rest[index] = False
            assert torch.equal(given[bank][rest], before[bank][rest])
    gradient = gradients(CRD(given, backend=backend, momentum=0.5), given)
    assert gradient["student"].isfinite().all()


def test_of_a_repeated_sample_the_last_counts():
    inputs = CRD.inputs(4, 16, 20, 30)
    inputs["index"] = torch.tensor([7, 3, 7, 7])
    once = {n: x.clone() for n, x in inputs.items()}
    CRD(inputs, momentum=0.25)
    for name in ("student", "teacher", "index", "negatives"):
        once[name] = once[name][[1, 3]]
    CRD(once, momentum=0.25)
    for bank in ("student_bank", "teacher_bank"):
        assert torch.equal(inputs[bank], once[bank])


samplers = pytest.mark.parametrize(
    "backend",
    [b for b in ("reference", "cpu") if verdict("contrast.sample_negatives", b, "cpu").ok],
)


@samplers
def test_negatives_are_of_other_classes_and_distinct(backend):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (200,), generator=generator)
    index = torch.randint(200, (64,), generator=generator)
    state = generator.get_state()
    drawn = kd.sample_negatives(labels, index, 100, generator=generator, backend=backend)
    assert drawn.shape == (64, 100) and drawn.dtype == torch.int64
    generator.set_state(state)
    narrow = kd.sample_negatives(
        labels, index, 100, generator=generator, dtype=torch.int32, backend=backend
    )
    assert narrow.dtype == torch.int32 and torch.equal(narrow.long(), drawn)
    assert (labels[drawn] != labels[index].unsqueeze(1)).all()
    assert all(len(row.unique()) == 100 for row in drawn)


@samplers
def test_negatives_are_uniform(backend):
    generator = torch.Generator().manual_seed(1)
    labels, index = torch.arange(20) % 3, torch.tensor([4])
    counts, pairs, draws = torch.zeros(20), 0, 4000
    for _ in range(draws):
        drawn = kd.sample_negatives(labels, index, 6, generator=generator, backend=backend)[0]
        counts[drawn] += 1
        pairs += bool((drawn == 0).any() and (drawn == 2).any())
    others = labels != labels[4]
    assert not counts[~others].any()
    # 13 others, of which each is among 6 with probability 6 / 13; within 5 standard deviations.
    assert ((counts[others] / draws - 6 / 13).abs() < 5 * (0.25 / draws) ** 0.5).all()
    assert abs(pairs / draws - 30 / 156) < 5 * (0.16 / draws) ** 0.5


@samplers
def test_negatives_repeat_evenly_where_there_are_too_few(backend):
    labels = torch.tensor([0] * 7 + [1] * 3)
    drawn = kd.sample_negatives(labels, torch.tensor([0, 8]), 10, backend=backend)
    assert sorted(drawn[0].bincount(minlength=10)[7:].tolist()) == [3, 3, 4]
    assert sorted(drawn[1].bincount(minlength=7).tolist()) == [1, 1, 1, 1, 2, 2, 2]
    with pytest.raises(ValueError, match="more than one class"):
        kd.sample_negatives(
            torch.zeros(4, dtype=torch.int64), torch.tensor([0]), 2, backend=backend
        )


@samplers
@pytest.mark.parametrize("count", [1, 20, 49, 130, 500])
@pytest.mark.parametrize("n", [50, 700])
def test_negatives_are_the_same_however_found(monkeypatch, count, n, backend):
    """Read row by row, searched for where that cannot be traced, or scanned for by the kernel."""
    labels, index = torch.arange(n) % 3, torch.arange(0, n, 7)
    draws = []
    for traced in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda traced=traced: traced)
        for how in ("reference", backend):
            generator = torch.Generator().manual_seed(count)
            drawn = kd.sample_negatives(labels, index, count, generator=generator, backend=how)
            draws.append(drawn.sort().values if how == "cpu" else drawn)
    assert torch.equal(draws[0], draws[2])  # in their order, too
    assert all(torch.equal(drawn.sort().values, draws[0].sort().values) for drawn in draws)


@pytest.mark.skipif("cpu" not in CRD.backends(), reason="no compiled kernels")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_order_and_width_of_negatives_are_of_no_matter(shape):
    """Ascending int32, as they are drawn, is read where it lies; others are sorted or widened."""
    inputs = leaf_inputs(*shape)
    plain, exact = leaves(inputs), leaves(inputs, torch.float64)
    eager, oracle = crd_published(**plain), CRD(exact, backend="reference")
    yardsticks, wanted = gradients(eager, plain), gradients(oracle, exact)
    negatives = inputs["negatives"]
    for given in (negatives.int(), negatives.sort().values, negatives.sort().values.int()):
        value = CRD(inputs | {"negatives": given}, backend="cpu")
        assert_close_to_oracle(value, eager, oracle)
        for name, found in gradients(value, inputs).items():
            assert_close_to_oracle(found, yardsticks[name], wanted[name], name)


def test_generator_makes_negatives_reproducible():
    labels, index = torch.arange(100) % 7, torch.arange(9)
    seeded = [
        kd.sample_negatives(labels, index, 20, generator=torch.Generator().manual_seed(s))
        for s in (3, 3, 4)
    ]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])


def make_module(**options):
    torch.manual_seed(0)
    given = {"dim": 16, "num_negatives": 20, "generator": torch.Generator().manual_seed(0)}
    return modules.CRDLoss(6, 9, 40, torch.arange(40) % 4, **given | options)


def batch(samples=5):
    return torch.randn(samples, 6), torch.randn(samples, 9), torch.randperm(40)[:samples]


def test_module_in_training_and_evaluation():
    module, first, second = make_module(), batch(), batch()
    assert (module.normalizer == -1).all()
    module.eval()(*first)
    assert (module.normalizer == -1).all()
    banks = module.student_bank.clone(), module.teacher_bank.clone()
    module.train()(*first).backward()
    assert all(p.grad.abs().max() > 0 for p in module.parameters())
    assert (module.normalizer > 0).all()
    z = module.normalizer.clone()
    for bank, before in zip((module.student_bank, module.teacher_bank), banks, strict=True):
        changed = (bank != before).any(1).nonzero().squeeze(1)
        assert torch.equal(changed, first[2].sort().values)
        norms = bank[first[2]].norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
    module(*second)
    assert torch.equal(module.normalizer, z)


def test_module_is_its_function():
    module, (student, teacher, index) = make_module(), batch()
    negatives = kd.sample_negatives(module.labels, index, 20)
    anchors = module.student_embed(student), module.teacher_embed(teacher)
    samples = module.student_bank, module.teacher_bank, index, negatives
    expected = kd.crd_loss(*anchors, *samples)
    torch.testing.assert_close(module(student, teacher, index, negatives), expected)


def test_module_keeps_its_state():
    module = make_module()
    module(*batch())
    given = (*batch(), torch.randint(40, (5, 20)))
    loaded = make_module()
    loaded.load_state_dict(module.state_dict())
    copies = copy.deepcopy(module), loaded, pickle.loads(pickle.dumps(make_module(generator=None)))
    assert (copies[2].normalizer == -1).all()
    expected = module.eval()(*given)
    for other in copies[:2]:
        assert torch.equal(other.eval()(*given), expected)
    module.reset_banks()
    assert (module.normalizer == -1).all()


def test_module_compiles_whole():
    module, eager = make_module(), make_module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        given = (*batch(), torch.randint(40, (5, 20)))
        torch.testing.assert_close(compiled(*given), eager(*given))
    drawn = torch.compile(make_module(generator=None), fullgraph=True, backend="aot_eager")
    assert drawn(*batch()).isfinite()
    for name in ("student_bank", "teacher_bank", "normalizer"):
        torch.testing.assert_close(getattr(module, name), getattr(eager, name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_module_in_another_precision(dtype):
    module, (student, teacher, index) = make_module(), batch()
    module(student, teacher, index)
    banks = torch.float64 if dtype == torch.float64 else torch.float32
    before, z = module.student_bank.to(banks), module.normalizer.to(banks)
    module.to(dtype)
    assert module.student_embed.weight.dtype == dtype
    assert torch.equal(module.student_bank, before) and torch.equal(module.normalizer, z)
    module(student.to(dtype), teacher.to(dtype), index).backward()
    assert module.student_embed.weight.grad.dtype == dtype
    assert module.to("meta").student_bank.is_meta


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 0}, ValueError, "CRDLoss: dim must be at least 1"),
        ({"momentum": 2.0}, ValueError, "crd_loss: momentum must be in"),
        ({"temperature": 0.0}, ValueError, "crd_loss: temperature must be positive"),
        ({"backend": "metal"}, ValueError, "CRDLoss: backend must be one of"),
    ],
)
def test_bad_modules(options, error, message):
    with pytest.raises(error, match=message):
        make_module(**options)
    with pytest.raises(ValueError, match=r"CRDLoss: labels must have shape \(40,\), got \(39,\)"):
        modules.CRDLoss(6, 9, 40, torch.arange(39))
    with pytest.raises(TypeError, match="CRDLoss: labels must be a tensor, got list"):
        modules.CRDLoss(6, 9, 40, [0] * 40)
    with pytest.raises(ValueError, match="CRDLoss: negatives must be given"):
        modules.CRDLoss(6, 9, 40)(*batch())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": torch.ones(5, 7)}, ValueError, r"with 6 features a sample, got \(5, 7\)"),
        ({"teacher": torch.ones(5, 9, 2, 2)}, ValueError, r"with 9 .* got \(5, 9, 2, 2\)"),
        ({"teacher": torch.ones(9)}, ValueError, r"teacher must have shape \(B, ...\)"),
        ({"student": [1.0]}, TypeError, "student must be a tensor, got list"),
        ({"index": torch.arange(4)}, ValueError, r"index must have shape \(5,\), got \(4,\)"),
        ({"index": torch.arange(5) + 36}, ValueError, r"index must be in \[0, 40\), got 40"),
        ({"index": torch.ones(5)}, TypeError, "index must be integers, got torch.float32"),
    ],
)
def test_bad_calls_of_the_module(change, error, message):
    given = dict(zip(("student", "teacher", "index"), batch(), strict=True))
    with pytest.raises(error, match=f"^CRDLoss: .*{message}"):
        make_module()(**given | change)


@backends
def test_bad_arguments(backend):
    inputs = CRD.inputs(*CRD.small)
    n, bank = CRD.small[3], inputs["student_bank"]
    far = inputs["negatives"].clone()
    far[2, 5] = n
    for change, error, message in (
        ({"negatives": far}, ValueError, rf"negatives must be in \[0, {n}\)"),
        ({"index": inputs["index"] - n}, ValueError, rf"must be in \[0, {n}\)"),
        ({"negatives": far.float()}, TypeError, "negatives must be integers"),
        ({"negatives": far[:-1]}, ValueError, "negatives must be of the student's 6 samples"),
        ({"negatives": far[:, :0]}, ValueError, "negatives must be of the student's"),
        ({"index": inputs["index"][:, None]}, ValueError, "index must have shape"),
        ({"student_bank": bank[:, :-1]}, ValueError, "student_bank must have shape"),
        ({"student_bank": bank[:-1]}, ValueError, "teacher_bank must have the student_bank's"),
        ({"student_bank": bank.half()}, TypeError, "student_bank must be float32 or float64"),
        ({"student_bank": bank.clone().requires_grad_()}, ValueError, "must not require"),
        ({"normalizer": torch.ones(3)}, ValueError, "normalizer must have shape"),
        ({"momentum": 1.5}, ValueError, "momentum must be in"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
        ({"eps": -1.0}, ValueError, "eps must be in"),
    ):
        with pytest.raises(error, match=f"^crd_loss: .*{message}"):
            CRD(inputs | change, backend=backend)
    with pytest.raises(ValueError, match=r"index must be in \[0, 4\)"):
        kd.sample_negatives(torch.arange(4), torch.tensor([4]), 2)
    with pytest.raises(ValueError, match="num_negatives must be at least 1"):
        kd.sample_negatives(torch.arange(4), torch.tensor([1]), 0)
    with pytest.raises(TypeError, match="sample_negatives: dtype must be"):
        kd.sample_negatives(torch.arange(4), torch.tensor([1]), 2, dtype=torch.int16)
    with pytest.raises(RuntimeError, match="sample_negatives: backend 'triton' cannot run"):
        kd.sample_negatives(torch.arange(4), torch.tensor([1]), 2, backend="triton")


def test_registered():
    inputs = leaf_inputs(*CRD.small)
    names = ("student", "teacher", "student_bank", "teacher_bank", "normalizer", "index")
    tensors = tuple(inputs[n].detach() for n in (*names, "negatives"))
    for grads in (0, 1, 3):
        arguments = (*tensors, 0.5, [0.07, 1e-7], [], grads)
        torch.library.opcheck(torch.ops.kdkernels.crd.default, arguments)
    arguments = (torch.arange(9) % 2, torch.tensor([1, 4]), torch.randperm(9), torch.tensor([8, 3]))
    torch.library.opcheck(torch.ops.kdkernels.sample_negatives.default, (*arguments, 3))


def _embedded(inputs, weights, momentum):
    """The whole method as the suites have it, from features."""
    student = F.linear(inputs["student"], weights[0], weights[1])
    teacher = F.linear(inputs["teacher"], weights[2], weights[3])
    rest = {n: x for n, x in inputs.items() if n not in ("student", "teacher")}
    return crd_published(student, teacher, momentum=momentum, **rest)


def test_baseline_is_no_straw_man():
    """Operators of the suites' code, and its temporaries, which grow with B: at 8 of 64."""
    inputs = CRD.inputs(8, 128, 16384, 2000)
    weights = [torch.randn(128, 128), torch.randn(128), torch.randn(128, 128), torch.randn(128)]
    for weight in weights:
        weight.requires_grad_()
    kept = []
    with (
        Count() as count,
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x),
    ):
        value = _embedded(inputs, weights, momentum=0.5)
    assert 0.8 * 80 <= count.operators <= 1.2 * 80
    assert 0.8 * 537e6 <= 8 * count.largest <= 1.2 * 537e6
    saved = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    assert 0.8 * 1116e6 <= 8 * sum(saved.values()) <= 1.2 * 1116e6
    with Count() as count:
        torch.autograd.grad(value, weights)
    assert 0.8 * 78 <= count.operators <= 1.2 * 78


@pytest.mark.skipif("cpu" not in CRD.backends(), reason="no compiled kernels")
def test_extra_memory():
    """At the shape of the benchmark, banks 50000 x 128: under 16 MB, where eager keeps 1.1 GB."""
    inputs = leaf_inputs(*CRD.shapes["cifar100_b64"])

    def step():
        torch.autograd.grad(
            CRD(inputs, momentum=0.5, backend="cpu"), [inputs["student"], inputs["teacher"]]
        )

    step()
    assert measure.extra_bytes(step, "cpu") < 16e6
    resident = measure.resident_bytes(step)
    assert resident is None or resident < 16e6


def _two_ranks(rank, rendezvous):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    group = dist.group.WORLD
    for split in ((4, 4), (5, 3), (8, 0)):
        for momentum in (None, 0.5):
            inputs = CRD.inputs(8, 6, 20, 40, dtype=torch.float64)
            inputs["index"][5] = inputs["index"][1]  # on either rank; the last one counts
            weights = [torch.eye(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
            rows = slice(0, split[0]) if rank == 0 else slice(split[0], None)

            def value(rows, inputs=inputs, weights=weights, momentum=momentum, **options):
                own = {n: x[rows] if len(x) == 8 else x.clone() for n, x in inputs.items()}
                z = own.pop("normalizer")
                for name, weight in zip(("student", "teacher"), weights, strict=True):
                    own[name] = own[name] @ weight
                if momentum is None:  # the batch's
                    return kd.crd_loss(**own, **options), own
                return kd.crd_loss(**own, normalizer=z, momentum=momentum, **options), own

            whole, one = value(slice(None))
            wanted = torch.autograd.grad(whole, weights)
            loss, own = value(rows, group=group)
            torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
            for bank in ("student_bank", "teacher_bank"):
                assert torch.equal(own[bank], one[bank])
            for gradient, expected in zip(torch.autograd.grad(loss, weights), wanted, strict=True):
                dist.all_reduce(gradient)
                torch.testing.assert_close(gradient / 2, expected, rtol=1e-10, atol=1e-14)
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_ranks_are_one_process(tmp_path):
    mp.spawn(_two_ranks, (str(tmp_path / "rendezvous"),), nprocs=2)
