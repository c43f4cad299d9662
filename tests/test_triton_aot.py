# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles ahead of time, without a GPU, for the GPUs it is meant for.

What is compiled is what would be launched: the arguments come from the launchers themselves. By the
assemblers' own reports nothing may spill to memory, and rows must be read by loads as wide as their
alignment allows.
"""

import math
import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: nothing to compile")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kdkernels import ops  # noqa: E402
from kdkernels.divergences import (  # noqa: E402
    KINDS,
    REDUCTIONS,
    Choices,
    Numbers,
    TopKChoices,
    TopKNumbers,
)
from kdkernels.divergences import TARGETS as FORMS  # noqa: E402
from kdkernels.ops.rowwise import (  # noqa: E402
    GRAD_PARTS,
    GRAD_ROWS,
    GRAD_STUDENT,
    GRAD_TEACHER,
)

pytestmark = pytest.mark.skipif(
    ops.triton_interpreted(), reason="TRITON_INTERPRET=1: kernels are not compiled"
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "maxnreg", "enable_fp_fusion")
# Several rows to a tile, barely and well aligned; one row; the most warps; swept.
WIDTHS = (10, 100, 1000, 4096, 32000)


@pytest.fixture(autouse=True)
def torch_of_target(request, monkeypatch):
    """Launchers ask torch which compiler they are launching for."""
    if request.getfixturevalue("target") == "gfx942":
        monkeypatch.setattr(torch.version, "hip", "7.0")


def compiled(kernel, launch: dict, target: str):
    """Compile a kernel for what a launch with these arguments would specialise it to."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = launch[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, tuple):
            signature[parameter.name] = tuple(POINTERS[x.dtype] for x in value)
            attributes |= {(i, k): [["tt.divisibility", 16]] for k in range(len(value))}
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp64"
    options = {name: launch[name] for name in OPTIONS if name in launch}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def assert_in_registers(kernel, target: str, tmp_path):
    """No instruction of the machine code reads or writes a thread's local memory."""
    if target.startswith("sm_"):
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", cubin]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        print(target, *re.findall(r"REG:\d+", report))
        assert re.search(r"\bLDG\b", report), report
        assert not re.findall(r"\b(?:LDL|STL)\b.*", report)
        return
    usage = dict(re.findall(r"\.(\w+):\s+(\d+)$", kernel.asm["amdgcn"], re.M))
    print(f"{target} REG:{usage['vgpr_count']}")
    # Scalar registers spill into lanes of vector registers, not into memory.
    assert usage["private_segment_fixed_size"] == usage["vgpr_spill_count"] == "0", usage


def load_widths(kernel, target: str) -> set[int]:
    """Bytes a lane reads at once, of every load from global memory."""
    if target.startswith("sm_"):
        ptx = kernel.asm["ptx"]
        plain = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.b(\d+)\s", ptx)
        copies = re.findall(r"\bcp\.async\.c[ag]\S*\s+\[.*?\],\s+\[.*?\],\s+(\w+)", ptx)
        widths = {int(n or 1) * int(bits) // 8 for n, bits in plain}
        return widths | {int(size, 0) for size in copies}
    loads = re.findall(r"\b(?:global|buffer)_load_(dwordx\d|dword|\w+)", kernel.asm["amdgcn"])
    words = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
    return {words.get(load, 2) for load in loads}


def launch(classes, dtype, *, kind="forward_kl", everything=False, target=None, choices=()):
    """Arguments of a student-only launch, or of one that needs and takes everything there is."""
    from kdkernels.triton.rowwise.launch import arguments

    x = torch.empty(8, classes, dtype=dtype)
    row = torch.empty(8, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    valid, labels = torch.ones(8, dtype=torch.bool), torch.zeros(8, dtype=torch.int64)
    scalars = (
        Numbers(
            4.0, 4.0, 0.9, 0.1 * everything, 0.1, alpha=0.3, beta=0.7,
            target_weight=1.0 if target in ("decoupled", "separate") else 0.0,
            target_temperature=2.0,
        ),
        Choices(
            KINDS.index(kind), reduction=REDUCTIONS.index("batchmean"),
            target=FORMS.index(target or "ordinary"), **dict(choices),
        ),
    )  # fmt: skip
    if everything:
        grads = GRAD_STUDENT | GRAD_TEACHER | GRAD_ROWS | (GRAD_PARTS if target else 0)
        return arguments(x, x, labels, valid, row, row, row, labels, *scalars, grads)
    return arguments(x, x, None, None, None, None, None, labels, *scalars, GRAD_STUDENT)


CASES = [
    *(("sm_90", dtype, n) for dtype in (torch.float32, torch.bfloat16) for n in WIDTHS),
    *(("sm_90", torch.float64, n) for n in (1000, 32000)),
    ("sm_90", torch.float16, 32000),
    *((target, torch.bfloat16, n) for target in ("sm_80", "sm_100") for n in (100, 4096, 32000)),
    *(("gfx942", dtype, n) for dtype in (torch.float32, torch.bfloat16) for n in (100, 32000)),
]


@pytest.mark.parametrize("target, dtype, classes", CASES)
def test_rowwise(target, dtype, classes, tmp_path):
    from kdkernels.triton.rowwise.kernel import rowwise_kernel

    plain = compiled(rowwise_kernel, launch(classes, dtype), target)
    assert_in_registers(plain, target, tmp_path)
    everything = compiled(rowwise_kernel, launch(classes, dtype, everything=True), target)
    assert_in_registers(everything, target, tmp_path)
    aligned = min(16, math.gcd(classes, 16) * dtype.itemsize)
    assert load_widths(plain, target) == {aligned}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "forward_kl"])
@pytest.mark.parametrize("target, dtype", [("sm_90", torch.bfloat16), ("gfx942", torch.float32)])
def test_every_kind(kind, target, dtype, tmp_path):
    from kdkernels.triton.rowwise.kernel import rowwise_kernel

    kernel = compiled(rowwise_kernel, launch(32000, dtype, kind=kind, everything=True), target)
    assert_in_registers(kernel, target, tmp_path)


@pytest.mark.parametrize(
    "target, dtype, classes, everything",
    [
        ("sm_80", torch.bfloat16, 32000, True),
        ("sm_90", torch.float16, 32000, False),
        ("sm_90", torch.float64, 1000, True),
        ("sm_100", torch.bfloat16, 100, True),
        ("gfx942", torch.float32, 32000, True),
    ],
)
@pytest.mark.parametrize(
    "form, kind, standardize",
    [
        ("ordinary", "forward_kl", True),
        ("decoupled", "forward_kl", False),
        ("decoupled", "forward_kl", True),
        ("separate", "cross_entropy", False),
        ("tempered", "cross_entropy", False),
        ("weighting", "cross_entropy", False),
    ],
)
def test_every_form(form, kind, standardize, target, dtype, classes, everything, tmp_path):
    """What a loss does with its target class, with standardised rows of a range of classes."""
    from kdkernels.triton.rowwise.kernel import rowwise_kernel

    choices = {"standardize": True, "first": 7, "width": classes // 2} if standardize else {}
    given = {"kind": kind, "target": form, "choices": choices, "everything": everything}
    kernel = compiled(rowwise_kernel, launch(classes, dtype, **given), target)
    assert_in_registers(kernel, target, tmp_path)


def sparse_launch(classes, k, dtype, *, kind="forward_kl", everything=False):
    """As `launch`, of the sparse family."""
    from kdkernels.triton.sparse import arguments

    x, values = torch.empty(8, classes, dtype=dtype), torch.empty(8, k, dtype=dtype)
    indices, valid = torch.zeros(8, k, dtype=torch.int64), torch.ones(8, dtype=torch.bool)
    row = torch.empty(8, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    scalars = (
        TopKNumbers(2.0, 2.0, 0.3),
        TopKChoices(KINDS.index(kind), reduction=REDUCTIONS.index("batchmean")),
    )
    if everything:
        grads = GRAD_STUDENT | GRAD_TEACHER | GRAD_ROWS
        return arguments(x, values, indices, valid, row, row, row, row, *scalars, grads)
    options = [None] * 5
    return arguments(x, values, indices, *options, *scalars, GRAD_STUDENT)


SPARSE_CASES = [
    *((target, torch.bfloat16, 32000, 64, "js") for target in TARGETS),
    ("sm_90", torch.float32, 100, 10, "forward_kl"),
    ("sm_90", torch.bfloat16, 1000, 500, "js"),
    ("sm_90", torch.float32, 32000, 500, "reverse_kl"),
    ("sm_90", torch.float64, 32000, 64, "tv"),
]


@pytest.mark.parametrize("target, dtype, classes, k, kind", SPARSE_CASES)
def test_sparse(target, dtype, classes, k, kind, tmp_path):
    from kdkernels.triton.sparse_kernel import sparse_kernel

    plain = compiled(sparse_kernel, sparse_launch(classes, k, dtype), target)
    assert_in_registers(plain, target, tmp_path)
    everything = sparse_launch(classes, k, dtype, kind=kind, everything=True)
    assert_in_registers(compiled(sparse_kernel, everything, target), target, tmp_path)
    assert min(16, math.gcd(classes, 16) * dtype.itemsize) in load_widths(plain, target)


@pytest.mark.parametrize("classes", [100, 1000, 32000])
@pytest.mark.parametrize("target", TARGETS)
def test_scale_rows(target, classes, tmp_path):
    from kdkernels.triton.scale import arguments, scale_rows_kernel

    grad = torch.empty(8, classes, dtype=torch.bfloat16)
    kernel = compiled(scale_rows_kernel, arguments(grad, torch.tensor(1.0), None), target)
    assert_in_registers(kernel, target, tmp_path)
    # The scalar (which CDNA reads by a scalar load), and the rows.
    assert load_widths(kernel, target) | {4} == {4, min(16, math.gcd(classes, 16) * 2)}


# A mixture holds more than a sum; several rows to a tile, one, and swept.
@pytest.mark.parametrize(
    "target, classes, mixture",
    [*((target, 32000, True) for target in TARGETS), ("sm_90", 100, True), ("sm_90", 1000, False)],
)
def test_ensemble(target, classes, mixture, tmp_path):
    from kdkernels.triton.ensemble import arguments, ensemble_kernel

    x, row = torch.empty(8, classes), torch.empty(8)
    optional = torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.bool), row, row, row
    scalars = Numbers(4.0, 4.0, 1.0, 0.1, 0.1), Choices(reduction=REDUCTIONS.index("batchmean"))
    for launch in (
        arguments(x, (x, x, x), *[None] * 6, mixture, Numbers(4.0), scalars[1], GRAD_STUDENT),
        arguments(x, (x, x, x), *optional, torch.empty(3, 8), mixture, *scalars, 15),
    ):
        assert_in_registers(compiled(ensemble_kernel, launch, target), target, tmp_path)


BATCHWISE_CASES = [
    ("sm_90", torch.float32, 100),
    ("sm_90", torch.bfloat16, 32000),
    ("sm_90", torch.float64, 1000),
    ("sm_90", torch.float16, 1000),  # gradients with a factor a row
    *((target, torch.bfloat16, 1000) for target in ("sm_80", "sm_100")),
    ("gfx942", torch.float32, 1000),
]


@pytest.mark.parametrize("target, dtype, classes", BATCHWISE_CASES)
def test_batchwise(target, dtype, classes, tmp_path):
    from kdkernels.ops.batchwise import GRAD_TEMPERATURE, DistChoices, DistNumbers
    from kdkernels.triton import batchwise, dist_kernels, mlkd_kernels

    x = torch.empty(64, classes, dtype=dtype)
    valid = torch.ones(64, dtype=torch.bool)
    for grads, mask in ((GRAD_STUDENT, None), (15 | GRAD_TEMPERATURE, valid)):
        of_rows, of_columns, gradients = batchwise.dist_launches(
            x, x, DistNumbers(4.0), DistChoices(), grads, mask
        )
        for kernel, launch in (
            (dist_kernels.dist_rows_kernel, of_rows),
            (dist_kernels.dist_columns_kernel, of_columns),
            *((dist_kernels.dist_gradient_kernel, launch) for launch in gradients),
        ):
            assert_in_registers(compiled(kernel, launch, target), target, tmp_path)
    temperatures = (4.0, 3.0, 5.0, 2.0, 6.0)
    (softmax, *_) = batchwise.softmax_launches(x, x, temperatures, valid)
    launches = [(mlkd_kernels.mlkd_softmax_kernel, softmax)]
    soft = softmax["soft"].new_empty(5, 2, 64, classes)
    for of_teacher in (False, True):
        dots, gradient = batchwise.gradient_launches(
            x, soft, soft[:, 0], softmax["kl"], temperatures, of_teacher, valid
        )
        launches += (
            (mlkd_kernels.mlkd_dots_kernel, dots),
            (mlkd_kernels.mlkd_gradient_kernel, gradient),
        )
    for kernel, launch in launches:
        assert_in_registers(compiled(kernel, launch, target), target, tmp_path)


@pytest.mark.parametrize("classes", [100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_attention(target, dtype, classes, tmp_path):
    from kdkernels.triton import attention, attention_kernel

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    teacher, rows = torch.empty(64, classes, dtype=dtype), torch.empty(64, dtype=wide)
    scores = torch.empty(2, classes + 1, classes + 1, dtype=wide)
    given = (teacher, scores, torch.empty(2, classes + 1, dtype=wide))
    stats = torch.empty(4, 2, 64, classes, dtype=wide)
    saved = (torch.empty(64, classes, dtype=wide), *given, stats, 4.0, rows)
    launches = (
        (attention_kernel.forward_kernel, attention.forward_launch(*given, 4.0, rows, True, True)),
        (attention_kernel.coefficients_kernel, attention.coefficients_launch(*saved)),
        (attention_kernel.teacher_kernel, attention.teacher_launch(*saved)),
    )
    for kernel, (arguments, _) in launches:
        assert_in_registers(compiled(kernel, arguments, target), target, tmp_path)


@pytest.mark.parametrize("classes", [100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_row_attention(target, dtype, classes, tmp_path):
    from kdkernels.triton import row_attention

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    teacher, x = torch.empty(64, classes, dtype=dtype), torch.empty(64, classes, dtype=wide)
    given = row_attention.arguments(teacher, 4.0, torch.empty(64, dtype=wide), wide)
    for kernel, rest in (
        (row_attention.soften_kernel, {"soft": x, "out": x, "RESIDUAL": True}),
        (row_attention.arrive_kernel, {"upstream": x, "arriving": x}),
    ):
        assert_in_registers(compiled(kernel, given | rest, target), target, tmp_path)


@pytest.mark.parametrize("target", TARGETS)
def test_relation(target, tmp_path):
    from kdkernels.triton import relation, relation_kernels

    gram = torch.empty(64, 64, dtype=torch.float64)
    turns, edges = relation.rkd_launches((gram, gram), (gram, gram), 64)
    launches = [
        (relation_kernels.rkd_turns_kernel, turns),
        (relation_kernels.rkd_edges_kernel, edges),
    ]
    for side in (0, 1):
        of_rows, of_edges = relation.pkt_launches((gram, gram), 1e-7, side)
        launches += (
            (relation_kernels.pkt_rows_kernel, of_rows),
            (relation_kernels.pkt_edges_kernel, of_edges),
        )
    for kernel, launch in launches:
        assert_in_registers(compiled(kernel, launch, target), target, tmp_path)
