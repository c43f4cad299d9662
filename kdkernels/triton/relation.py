# SPDX-License-Identifier: Apache-2.0
"""``rkd_triton`` and ``pkt_triton``: Gram matrices by torch's products, and kernels on them.

Angles over triples, and PKT's rows, are where fusion pays: nothing of size B^3 is stored. Distances
are torch's operators on B^2 numbers. The family's other losses have no kernel on a GPU; see
``COMPOSITE_ON_GPU`` in ``kdkernels/backends.py``.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kdkernels import ops
from kdkernels.ops.features import compute_dtype, gradient_dtype
from kdkernels.ops.relation import CLAMP, NEAR, RKDChoices, RKDNumbers
from kdkernels.triton import scale  # noqa: F401  (registers scale_rows_)
from kdkernels.triton.relation_kernels import (
    pkt_edges_kernel,
    pkt_rows_kernel,
    rkd_edges_kernel,
    rkd_turns_kernel,
)

# Pairs of samples a program of RKD's takes, and columns one of PKT's does at once.
ROWS, TILE, COLUMNS = 16, 32, 128


def _finished(tensors, wide, factor: float, grads: int, loss: Tensor, edges):
    """The gradients from ``edges(side)`` (B, B), which the embeddings are multiplied by."""
    found = []
    for side, (x, rows) in enumerate(zip(tensors, wide, strict=True)):
        if not grads >> side & 1:
            found.append(x.new_empty(0))
            continue
        gradient = edges(side).to(rows.dtype) @ rows
        found.append((gradient * factor).to(gradient_dtype(x)))
    return (loss * factor).to(compute_dtype(*tensors)), *found


def _laplacian(w: Tensor) -> Tensor:
    """With the diagonal that makes the sums of rows 0."""
    w = w.fill_diagonal_(0)
    return w.sub_(torch.diag(w.sum(1)))


def rkd_launches(own, other, rows: int) -> tuple[dict, dict]:
    """Arguments of the kernels of pairs of samples and of sums over vertices."""
    (gram, inverse), (other_gram, other_inverse) = own, other
    both = {
        "gram": gram, "inverse": inverse, "other_gram": other_gram,
        "other_inverse": other_inverse, "turns": torch.empty_like(gram), "rows": rows,
        "ROWS": ROWS, "TILE": TILE, "num_warps": 4,
    }  # fmt: skip
    return both | {"loss": torch.empty_like(gram)}, both | {"edges": torch.empty_like(gram)}


def _rkd(student: Tensor, teacher: Tensor, factor, numbers, choices, grads):
    numbers, choices = RKDNumbers(*numbers), RKDChoices(*map(bool, choices))
    tensors, rows = (student, teacher), student.shape[0]
    wide = [x.double() for x in tensors]
    if not rows:
        return student.new_zeros((), dtype=compute_dtype(*tensors)), *map(torch.zeros_like, tensors)
    wide = [x - x.mean(0) for x in wide]
    grams = [x @ x.mT for x in wide]
    lengths = [gram.diagonal() for gram in grams]
    both = [x.unsqueeze(1) + x for x in lengths]
    squares = [b - 2 * gram for b, gram in zip(both, grams, strict=True)]
    loss = grams[0].new_zeros(())
    if numbers.distance:
        power = 1.0 if choices.squared else 0.5
        distances = [(s.clamp(min=CLAMP) ** power).fill_diagonal_(0) for s in squares]
        means = [d.sum() / max(rows * (rows - 1), 1) + (rows == 1) for d in distances]
        s, t = (d / m for d, m in zip(distances, means, strict=True))
        slope = (s - t).clamp(-1, 1)
        loss = loss + numbers.distance * (slope * ((s - t) - 0.5 * slope)).sum()
    inverses = []
    for square, b in zip(squares, both, strict=True):
        far = square > NEAR * b
        inverse = torch.where(far, square, 1.0).rsqrt() * far
        inverses.append(inverse.fill_diagonal_(0))
    sides = list(zip(grams, inverses, strict=True))
    turned = {}
    if numbers.angle:
        for side in [i for i in (0, 1) if grads >> i & 1] or [0]:
            turns, edges = rkd_launches(sides[side], sides[1 - side], rows)
            with torch.cuda.device_of(student):
                rkd_turns_kernel[(rows, triton.cdiv(rows, ROWS))](**turns)
                if grads:
                    grid = triton.cdiv(rows, ROWS), triton.cdiv(rows, TILE)
                    rkd_edges_kernel[grid](**edges)
            turned[side] = edges["edges"]
        loss = loss + numbers.angle * turns["loss"].sum()

    def edges(side: int) -> Tensor:
        w = grams[0].new_zeros(rows, rows)
        if numbers.angle:
            w = w + numbers.angle * turned[side]
        if numbers.distance:
            sign, d, mean = (1, -1)[side], distances[side], means[side]
            c = sign * slope
            # Through the mean as well.
            q = c / mean - (c * d).sum() / (mean * mean * max(rows * (rows - 1), 1))
            q = 2 * numbers.distance * q * (squares[side] > CLAMP)
            w = w - (2 * q if choices.squared else q / torch.where(d > 0, d, 1.0))
        return _laplacian(w)

    return _finished(tensors, wide, factor, grads, loss, edges)


def pkt_launches(grams, eps: float, side: int) -> tuple[dict, dict]:
    """Arguments of the kernels of rows and of the edges of a side."""
    scales = [1 / (gram.diagonal().sqrt() + eps) for gram in grams]
    rows = grams[0].shape[0]
    both = {
        "gram_s": grams[0], "gram_t": grams[1], "scale_s": scales[0], "scale_t": scales[1],
        "stats": grams[0].new_empty(4, rows), "rows": rows, "eps": eps, "TILE": COLUMNS,
        "num_warps": 4,
    }  # fmt: skip
    return (
        both | {"loss": grams[0].new_empty(rows)},
        both
        | {"edges": torch.empty_like(grams[0]), "taken": grams[0].new_empty(rows), "SIDE": side},
    )


def _pkt(student: Tensor, teacher: Tensor, factor, numbers, choices, grads):
    tensors, rows = (student, teacher), student.shape[0]
    if not rows:
        return student.new_zeros((), dtype=compute_dtype(*tensors)), *map(torch.zeros_like, tensors)
    wide = [x.double() for x in tensors]
    grams = [x @ x.mT for x in wide]
    of_rows, of_edges = pkt_launches(grams, numbers[0], 0)
    with torch.cuda.device_of(student):
        pkt_rows_kernel[(rows,)](**of_rows)

    def edges(side: int) -> Tensor:
        launch = of_edges | {"SIDE": side}
        with torch.cuda.device_of(student):
            pkt_edges_kernel[(rows,)](**launch)
        return launch["edges"] - torch.diag(launch["taken"])

    return _finished(tensors, wide, factor, grads, of_rows["loss"].sum(), edges)


for _name, _function in (("rkd", _rkd), ("pkt", _pkt)):
    for _key in ("CUDA", "CPU") if ops.triton_interpreted() else ("CUDA",):
        torch.library.impl(f"kdkernels::{_name}_triton", _key, _function)
