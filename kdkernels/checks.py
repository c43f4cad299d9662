# SPDX-License-Identifier: Apache-2.0
"""Validation shared by the public functions. Every message names function, argument, expected, got.

Shapes, dtypes and Python numbers are always checked, and so are values that lie on the CPU. Values
on a GPU are read only with ``KDKERNELS_CHECK=1``, since reading them waits for the device.
"""

from __future__ import annotations

import math
import numbers
import os

import torch

from kdkernels.scalars import choice, number

__all__ = [
    "FLOATS",
    "INTEGERS",
    "choice",
    "class_range",
    "device",
    "flag",
    "floats",
    "group",
    "indices",
    "inplace",
    "integer",
    "labels",
    "logits",
    "number",
    "per_row",
    "raise_for_labels",
    "readable",
    "same_device",
    "stacked",
    "targets",
    "teacher_weights",
    "temperature",
    "tensor",
]

CHECK_DEVICE_VALUES = os.environ.get("KDKERNELS_CHECK", "0") == "1"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32,
)  # fmt: skip


def readable(tensor: torch.Tensor) -> bool:
    """Whether values may be looked at: not in a trace, and on a GPU only where it is asked for."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or CHECK_DEVICE_VALUES


def tensor(name: str, argument: str, value) -> None:
    """A tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: {argument} must be a tensor, got {type(value).__name__}.")


def device(name: str, value) -> torch.device:
    """The CPU, or a GPU that torch finds."""
    try:
        found = torch.device(value)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: device must be cpu, cuda or cuda:N, got {value!r}.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{name}: device {value!r} is not there: torch {torch.__version__} finds "
            f"{torch.cuda.device_count()} GPUs."
        )
    return found


def same_device(name: str, argument: str, value: torch.Tensor, student: torch.Tensor) -> None:
    """The student's device."""
    if value.device != student.device:
        raise ValueError(
            f"{name}: {argument} must be on the student's device {student.device}, "
            f"got {value.device}."
        )


def floats(name: str, argument: str, value) -> None:
    """A dense floating-point tensor."""
    tensor(name, argument, value)
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{name}: {argument} must be float64, float32, bfloat16 or float16, got {value.dtype}."
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name}: {argument} must be a dense tensor, got {value.layout}.")


def logits(name: str, student, teacher, width: int | None = None) -> None:
    """Both are floating-point tensors of one shape (..., C), C >= 1, on one device.

    With ``width`` the teacher may have that many classes instead.
    """
    for argument, value in (("student", student), ("teacher", teacher)):
        floats(name, argument, value)
    if student.shape != teacher.shape and (
        width is None or teacher.shape != (*student.shape[:-1], width)
    ):
        narrow = "" if width is None else f", or {width} classes"
        raise ValueError(
            f"{name}: teacher must have the student's shape {tuple(student.shape)}{narrow}, "
            f"got {tuple(teacher.shape)}."
        )
    if student.dim() == 0 or student.shape[-1] == 0:
        raise ValueError(
            f"{name}: student must have shape (..., C) with C >= 1, got {tuple(student.shape)}."
        )
    same_device(name, "teacher", teacher, student)


def stacked(name: str, argument: str, value: torch.Tensor, student, width: int | None) -> None:
    """One tensor (M, ..., C) of M >= 1 times the student's shape.

    With ``width`` the last dimension may be that instead.
    """
    tensor(name, "student", student)
    narrow = width is not None and value.shape[1:] == (*student.shape[:-1], width)
    if value.dim() == 0 or value.shape[0] == 0 or (value.shape[1:] != student.shape and not narrow):
        also = "" if width is None else f", or {width} classes"
        shape = ", ".join(("M", *map(str, student.shape)))
        raise ValueError(
            f"{name}: {argument} must have shape ({shape}) with M >= 1{also}, "
            f"got {tuple(value.shape)}."
        )


def group(name: str, value) -> None:
    """A process group of torch.distributed, or None."""
    if value is not None and not isinstance(value, getattr(torch.distributed, "ProcessGroup", ())):
        raise TypeError(
            f"{name}: group must be a torch.distributed.ProcessGroup (such as "
            f"torch.distributed.group.WORLD) or None, got {value!r}."
        )


def integer(name: str, argument: str, value) -> int:
    """A Python integer."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be an integer, got {value!r}.")
    return value


def indices(name: str, argument: str, value: torch.Tensor, size: int) -> None:
    """Integers in [0, size)."""
    if readable(value) and value.numel():
        low, high = value.aminmax()
        if not (0 <= low and high < size):
            raise ValueError(
                f"{name}: {argument} must be in [0, {size}), got "
                f"{(low if low < 0 else high).item()}."
            )


def temperature(name: str, argument: str, value, student: torch.Tensor, dtype: torch.dtype):
    """Split a temperature into (number, None) or (1.0, flat tensor of one or N elements)."""
    if isinstance(value, (float, numbers.Real)) and not isinstance(value, bool):
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name}: {argument} must be positive and finite, got {value}.")
        return float(value), None
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{name}: {argument} must be a number or a tensor, got {type(value).__name__}."
        )
    if value.numel() != 1 and value.shape != student.shape[:-1]:
        raise ValueError(
            f"{name}: {argument} must have one element or the shape of the rows "
            f"{tuple(student.shape[:-1])}, got {tuple(value.shape)}."
        )
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: {argument} must be floating-point, got {value.dtype}.")
    same_device(name, argument, value, student)
    if readable(value) and value.numel():
        good = (value > 0) & value.isfinite()
        if not good.all():
            bad = value.detach()[~good][0].item()
            raise ValueError(f"{name}: {argument} must be positive and finite, got {bad}.")
    return 1.0, value.reshape(-1).to(dtype).contiguous()


def targets(name: str, rows, target, first: int, width: int, ignore_index: int) -> None:
    """The target of every row that counts, by default its label, is in the class range."""
    target = rows.labels if target is None else target
    if not readable(target):
        return
    bad = (target < first) | (target >= first + width)
    if rows.mask is not None:
        bad &= rows.mask
    if target is rows.labels:
        bad &= target != ignore_index
    if bad.any():
        raise ValueError(
            f"{name}: labels must be in class_range [{first}, {first + width}), "
            f"got {target[bad][0].item()}."
        )


def class_range(name: str, value, student) -> tuple[int, int]:
    """The first class and the number of classes of a range (m, n)."""
    tensor(name, "student", student)
    classes = student.shape[-1] if student.dim() else 0
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: class_range must be a pair (m, n), got {value!r}.")
    first, last = (integer(name, "class_range", bound) for bound in value)
    if not 0 <= first < last <= classes:
        raise ValueError(
            f"{name}: class_range must be (m, n) with 0 <= m < n <= {classes}, got {value!r}."
        )
    return first, last - first


def flag(name: str, argument: str, value) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be a bool, got {type(value).__name__}.")
    return value


def per_row(name: str, argument: str, value, student: torch.Tensor, dtype: torch.dtype | None):
    """A tensor of shape ``student.shape[:-1]``, flattened; bool where ``dtype`` is None."""
    tensor(name, argument, value)
    if value.shape != student.shape[:-1]:
        raise ValueError(
            f"{name}: {argument} must have the shape of the rows {tuple(student.shape[:-1])}, "
            f"got {tuple(value.shape)}."
        )
    same_device(name, argument, value, student)
    if dtype is None:
        if value.dtype != torch.bool:
            raise TypeError(f"{name}: {argument} must be bool, got {value.dtype}.")
        return value.reshape(-1).contiguous()
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: {argument} must be floating-point, got {value.dtype}.")
    return value.reshape(-1).to(dtype).contiguous()


def teacher_weights(
    name: str, value, count: int, student: torch.Tensor, dtype: torch.dtype, mixture: bool
):
    """A tensor (M,) or (M, ...), as (M, 1) or (M, N); those of a mixture have a positive sum.

    M Python numbers too.
    """
    if isinstance(value, (list, tuple)):
        if len(value) != count:
            raise ValueError(f"{name}: weights must be {count} numbers, got {len(value)}.")
        numbers = [number(name, "weights", weight) for weight in value]
        # Not by torch.tensor, which would wait for a GPU.
        value = torch.stack([student.new_full((), weight, dtype=dtype) for weight in numbers])
    tensor(name, "weights", value)
    rows = student.shape[:-1]
    if value.shape not in ((count,), (count, *rows)):
        raise ValueError(
            f"{name}: weights must have shape {(count,)} or {(count, *rows)}, "
            f"got {tuple(value.shape)}."
        )
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: weights must be floating-point, got {value.dtype}.")
    same_device(name, "weights", value, student)
    if readable(value) and value.numel():
        if not value.isfinite().all():
            worst = value[~value.isfinite()][0].item()
            raise ValueError(f"{name}: weights must be finite, got {worst}.")
        if mixture and not ((value >= 0).all() and (value.sum(0) > 0).all()):
            raise ValueError(
                f"{name}: weights of a mixture must not be negative, nor all be 0, got a smallest "
                f"weight of {value.min().item()} and a smallest sum of {value.sum(0).min().item()}."
            )
    columns = rows.numel() if value.dim() > 1 else 1
    return value.reshape(count, columns).to(dtype).contiguous()


def labels(name: str, value, student: torch.Tensor, ignore_index: int, read: bool):
    """Class indices (...) as flat int64, or probabilities (..., C) as they are.

    Without ``read`` their values are left to the kernel to check.
    """
    tensor(name, "labels", value)
    same_device(name, "labels", value, student)
    classes = student.shape[-1]
    if value.dtype in INTEGERS and value.shape == student.shape[:-1]:
        if read and value.numel() and readable(value):
            low, high = value.aminmax()
            if not (0 <= low and high < classes):
                bad = value[((value < 0) | (value >= classes)) & (value != ignore_index)]
                if bad.numel():
                    raise ValueError(
                        f"{name}: labels must be in [0, {classes}) or ignore_index "
                        f"({ignore_index}), got {bad[0].item()}."
                    )
        return value.reshape(-1).to(torch.int64).contiguous()
    if value.dtype in FLOATS and value.shape == student.shape:
        if value.requires_grad:
            raise NotImplementedError(
                f"{name}: labels must not require a gradient (detach them, or weigh the "
                "cross-entropy outside)."
            )
        return value
    shapes = (student.shape, student.shape[:-1])
    raise (TypeError if value.shape in shapes else ValueError)(
        f"{name}: labels must be integers of shape {tuple(student.shape[:-1])} or probabilities of "
        f"shape {tuple(student.shape)}, got {value.dtype} of shape {tuple(value.shape)}."
    )


def inplace(name: str, student: torch.Tensor, others: dict[str, torch.Tensor | None]) -> None:
    """The gradient may overwrite the student's logits: eager, non-leaf, nobody else's memory."""
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: inplace=True works in eager mode only, not under compile.")
    if student.is_leaf and student.requires_grad:
        raise ValueError(
            f"{name}: inplace=True needs non-leaf student logits; a leaf would lose its values."
        )
    # Memory is not shared if, by rising stride, each stride is past all that the smaller ones span.
    reach = 0
    for stride, size in sorted(zip(student.stride(), student.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(f"{name}: inplace=True needs student logits that do not overlap.")
        reach += stride * (size - 1)
    for argument, other in others.items():
        if (
            other is None
            or other.untyped_storage().data_ptr() != student.untyped_storage().data_ptr()
        ):
            continue
        same = (other.data_ptr(), other.stride(), other.shape, other.dtype) == (
            student.data_ptr(), student.stride(), student.shape, student.dtype,
        )  # fmt: skip
        if not same and other.numel():
            raise ValueError(
                f"{name}: inplace=True needs {argument} in memory of its own, got a view of the "
                "student's."
            )


def raise_for_labels(name: str, error: RuntimeError, argument: str = "labels") -> None:
    """Raise what a compiled operator found wrong with integers as a ValueError."""
    _, found, rest = str(error).partition(f"{argument} must be")
    if found:
        raise ValueError(f"{name}: {found}{rest.splitlines()[0]}") from None
