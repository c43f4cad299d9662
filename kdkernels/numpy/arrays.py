# SPDX-License-Identifier: Apache-2.0
"""Arrays validated, and as the kernels take them."""

from __future__ import annotations

import numpy as np

from kdkernels import contract

try:
    from kdkernels import _native

    _reason = contract.breach(_native.__file__)
except ImportError as error:  # pragma: no cover - depends on the installation
    _reason = (
        f"{error} (was it built? kdkernels info says; it needs pybind11 and a C++ compiler when "
        "kdkernels is installed)"
    )

FLOATS = (np.float64, np.float32, np.float16)
_MOST_THREADS = 1024


def native(name: str):
    """The compiled kernels."""
    if _reason:
        raise RuntimeError(f"{name}: the compiled extension _native cannot be used: {_reason}")
    return _native


def integer(name: str, argument: str, value) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be an integer, got {type(value).__name__}.")


def threads(name: str, value) -> None:
    integer(name, "threads", value)
    if not 1 <= value <= _MOST_THREADS:
        raise ValueError(f"{name}: threads must be in [1, {_MOST_THREADS}], got {value}.")


def flag(name: str, argument: str, value) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: {argument} must be a bool, got {type(value).__name__}.")
    return value


def floats(name: str, argument: str, value) -> None:
    if not isinstance(value, np.ndarray) or value.dtype not in FLOATS:
        got = getattr(value, "dtype", type(value).__name__)
        raise TypeError(
            f"{name}: {argument} must be a float64, float32 or float16 array, got {got}."
        )


def logits(name: str, student, teacher, width: int | None = None) -> None:
    """Both are of one shape (..., C), C >= 1; with ``width`` the teacher may be that wide."""
    floats(name, "student", student)
    floats(name, "teacher", teacher)
    shape = student.shape
    if shape != teacher.shape and (width is None or teacher.shape != (*shape[:-1], width)):
        narrow = "" if width is None else f", or {width} classes"
        raise ValueError(
            f"{name}: teacher must have the student's shape {shape}{narrow}, got {teacher.shape}."
        )
    if student.ndim == 0 or shape[-1] == 0:
        raise ValueError(f"{name}: student must have shape (..., C), C >= 1, got {shape}.")


def per_row(name: str, argument: str, value, rows: tuple[int, ...], kinds: str) -> np.ndarray:
    """An array of the rows' shape, flat, and float64 unless it is bool."""
    value = np.asarray(value)
    if value.dtype.kind not in kinds:
        expected = "bool" if kinds == "b" else "floating-point"
        raise TypeError(f"{name}: {argument} must be {expected}, got {value.dtype}.")
    if value.shape != rows:
        raise ValueError(
            f"{name}: {argument} must have the shape of the rows {rows}, got {value.shape}."
        )
    return np.require(value.reshape(-1), bool if kinds == "b" else np.float64, "CA")


def temperature(name: str, argument: str, value, rows: tuple[int, ...]) -> np.ndarray:
    value = np.asarray(value)
    if value.dtype.kind not in ("fiu" if value.ndim == 0 else "f"):
        raise TypeError(
            f"{name}: {argument} must be a number or a floating-point array, got {value.dtype}."
        )
    if value.size != 1 and value.shape != rows:
        raise ValueError(
            f"{name}: {argument} must have one element or the shape of the rows {rows}, "
            f"got {value.shape}."
        )
    good = (value > 0) & np.isfinite(value)
    if not good.all():
        raise ValueError(
            f"{name}: {argument} must be positive and finite, got {value[~good].flat[0]}."
        )
    return np.require(value.reshape(-1), np.float64, "CA")


def labels(name: str, value, student: np.ndarray) -> np.ndarray:
    """Class indices, flat, or probabilities ``(N, C)``."""
    value = np.asarray(value)
    rows = student.shape[:-1]
    if value.dtype.kind in "iu" and value.shape == rows:
        return np.require(value.reshape(-1), np.int64, "CA")
    if value.dtype in FLOATS and value.shape == student.shape:
        return matrix(value)
    raise ValueError(
        f"{name}: labels must be integers of shape {rows} or probabilities of shape "
        f"{student.shape}, got {value.dtype} of shape {value.shape}."
    )


def matrix(array: np.ndarray) -> np.ndarray:
    """``(..., C)`` as ``(N, C)``; copied only where strides or alignment leave no choice."""
    return np.require(array.reshape(rows_in(array), array.shape[-1]), requirements="A")


def rows_in(array: np.ndarray) -> int:
    return int(np.prod(array.shape[:-1]))


def widened(array: np.ndarray) -> np.ndarray:
    """fp16 as fp32: the kernels' fp16 gradients leave factors to torch's backward."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def accumulated_in(*arrays: np.ndarray) -> type:
    return np.float64 if any(x.dtype == np.float64 for x in arrays) else np.float32
