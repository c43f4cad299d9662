# SPDX-License-Identifier: Apache-2.0
"""The rowwise family's CUDA kernels under the simulator: build, calls, expected results."""

from __future__ import annotations

import functools
import importlib.util
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from compiling import SIMULATOR, cached, run, tool

from kdkernels import functional
from kdkernels.divergences import KINDS, REDUCTIONS, Choices, Numbers, resolve
from kdkernels.ops import rowwise as ops

ROOT = Path(__file__).parents[1]
SOURCES = [
    ROOT / "csrc/testing/rowwise.cpp", *SIMULATOR,
    *sorted((ROOT / "csrc/kd/cuda/rowwise").rglob("*.cu")),
]  # fmt: skip
DTYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64,
}  # fmt: skip


def build(flags=()) -> Path:
    pybind11 = pytest.importorskip("pybind11")
    command = [
        tool("g++"), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-fPIC", "-DKD_SIMT",
        "-ffp-contract=off", "-fvisibility=hidden", f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_paths()['include']}", *flags,
    ]  # fmt: skip

    def compiled(source):
        whole = [*command, "-x", "c++", "-c"]
        return cached(whole, [source], ".o", lambda out: run([*whole, source, "-o", out]))

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    name = "-".join(o.stem[-4:] for o in objects)
    out = ROOT / "build/tests" / name / f"simulated_rowwise{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        run([*command, "-shared", *objects, "-o", out])
    return out


@functools.cache
def load():
    spec = importlib.util.spec_from_file_location("simulated_rowwise", build())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def array(x: torch.Tensor) -> np.ndarray:
    """Sharing memory; bfloat16 as its bits."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def array_or_none(x: torch.Tensor | None) -> np.ndarray | None:
    return None if x is None else array(x.detach())


def numbers_or_none(x) -> np.ndarray | None:
    """A number, or one per row, in double."""
    x = x.detach() if isinstance(x, torch.Tensor) else x
    return None if x is None else np.atleast_1d(np.asarray(x, np.float64))


def simulate(
    module, student, teacher, kind="forward_kl", *, alpha=None, beta=None, labels=None, mask=None,
    row_weight=None, temperature=1.0, teacher_temperature=None, ce_weight=0.0, kd_weight=1.0,
    label_smoothing=0.0, reduction="batchmean", inplace=False, gradient=True, seed=0,
):  # fmt: skip
    """Loss and gradient of a (N, C) call, complete as autograd would hand them on; the plan."""
    kernel_kind, alpha, beta, weight = resolve("simulate", kind, alpha, beta)
    rows, classes = student.shape
    in_double = torch.float64 in (student.dtype, teacher.dtype)
    number = np.float64 if in_double else np.float32
    loss = np.full(rows if reduction == "none" else 1, 7, number)
    loss_out = loss if reduction == "none" else loss.reshape(())
    if inplace:
        grad = student
    else:  # misaligned as the student is
        base = torch.full((rows * classes + 8,), 7, dtype=student.dtype)
        skip = student.data_ptr() % 16 // student.element_size()
        skip = (skip - base.data_ptr() // base.element_size()) % 8
        grad = base[skip : skip + rows * classes].view(rows, classes)
    half = student.dtype == torch.float16
    row_grads = np.full((4, rows), 7, number)
    taus = temperature, temperature if teacher_temperature is None else teacher_temperature
    per_row = [numbers_or_none(x) for x in (row_weight, *taus)]
    plan = module.rowwise(
        array(student), array(teacher),
        Numbers(kd_weight=weight * kd_weight, ce_weight=ce_weight, alpha=alpha, beta=beta,
                label_smoothing=label_smoothing),
        Choices(kind=KINDS.index(kernel_kind)), None if labels is None else labels.numpy(),
        None if mask is None else mask.numpy(), *per_row, None,
        reduction == "batchmean", False, loss_out, array(grad) if gradient else None, None,
        row_grads if half else None, seed,
    )  # fmt: skip
    value = torch.from_numpy(loss).view(loss_out.shape)
    if not gradient:
        return value, None, plan
    grad = grad.double()
    if half:  # times the factor that it lacks
        grad *= torch.from_numpy(row_grads[3]).double()[:, None]
    return value, grad, plan


def expected(student, teacher, kind="forward_kl", *, ce_weight=0.0, kd_weight=1.0,
             label_smoothing=0.0, alpha=None, beta=None, **options):  # fmt: skip
    student, teacher = student.double().clone().requires_grad_(), teacher.double()
    for name in ("row_weight", "temperature", "teacher_temperature"):
        if options.get(name) is not None:
            options[name] = torch.as_tensor(options[name], dtype=torch.float64)
    if ce_weight:
        value = functional.kd_loss(
            student, teacher, kd_weight=kd_weight, ce_weight=ce_weight, backend="reference",
            label_smoothing=label_smoothing, **options,
        )  # fmt: skip
    else:
        value = functional.divergence(
            student, teacher, kind=kind, alpha=alpha, beta=beta, backend="reference", **options
        )
    (grad,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), grad.detach()


def operators(module, plans: list, seed=0):
    """``kdkernels::rowwise`` and ``rowwise_inplace`` of (N, C) by the simulator.

    They call the kernels as csrc/torch/cuda/rowwise.cpp does, and append to ``plans``.
    """

    def run(
        student, teacher, numbers, choices, grads, labels=None, mask=None, row_weight=None,
        temperatures=None, teacher_temperatures=None, targets=None, grad_student=None,
    ):  # fmt: skip
        numbers, choices = Numbers(*numbers), Choices(*choices)
        dtype, rows = ops.compute_dtype(student, teacher), len(student)
        averaged, by_row = (REDUCTIONS[choices.reduction] == x for x in ("batchmean", "none"))
        own = numbers.temperature if temperatures is None else temperatures
        others = teacher_temperatures
        if others is None:
            others = numbers.teacher_temperature or own
        tempered = temperatures is not None or teacher_temperatures is not None

        def made(wanted, *shape, dtype=dtype):
            return torch.full(shape, 7, dtype=dtype) if wanted else None

        loss = made(True, *((rows,) if by_row else ()))
        if grad_student is None:
            grad_student = made(grads & ops.GRAD_STUDENT, *student.shape, dtype=student.dtype)
        grad_teacher = made(grads & ops.GRAD_TEACHER, *teacher.shape, dtype=teacher.dtype)
        row_grads = made(grads & ops.GRAD_ROWS, 6 if grads & ops.GRAD_PARTS else 4, rows)
        plan = module.rowwise(
            *map(array_or_none, (student, teacher)), numbers, choices,
            *map(array_or_none, (labels, mask)), *map(numbers_or_none, (row_weight, own, others)),
            array_or_none(targets), averaged, row_grads is not None and tempered, loss.numpy(),
            *map(array_or_none, (grad_student, grad_teacher, row_grads)), seed,
        )  # fmt: skip
        plans.append(plan)
        outputs = grad_student, grad_teacher, row_grads
        return loss, *(torch.empty(0) if x is None else x for x in outputs)

    def run_inplace(student, *args):
        loss, _, *others = run(student, *args, grad_student=student)
        return loss, *others

    return run, run_inplace
