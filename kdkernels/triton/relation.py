# SPDX-License-Identifier: Apache-2.0
"""The relation family's operators on a GPU: products are torch's, kernels are between them.

What is left for torch besides is small: Gram matrices in, matrices of their gradients out.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kdkernels import ops
from kdkernels.ops.features import compute_dtype, gradient_dtype
from kdkernels.ops.relation import CLAMP, EPS, NEAR, GramChoices, RKDChoices, RKDNumbers
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


def _polynomial(student: Tensor, teacher: Tensor, factor, numbers, choices, grads):
    tensors = student, teacher
    wide = [x.to(compute_dtype(*tensors)) for x in tensors]
    grams = [x @ x.mT for x in wide]

    def evaluated(gram: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = torch.zeros_like(gram), torch.zeros_like(gram)
        for coefficient in reversed(numbers):
            slope = slope * gram + value
            value = value * gram + coefficient
        return value, slope

    of_both = [evaluated(gram) for gram in grams]
    difference = of_both[0][0] - of_both[1][0]
    loss, rate = difference.square().sum(), 4.0
    if choices[0]:
        loss = loss.sqrt()
        rate = torch.where(loss > 0, 2 / loss, 0.0)

    def edges(side: int) -> Tensor:
        return (1, -1)[side] * rate * difference * of_both[side][1]

    return _finished(tensors, wide, factor, grads, loss, edges)


def _neighbours(student: Tensor, teacher: Tensor, factor, numbers, choices, grads):
    tensors = student, teacher
    dtype = compute_dtype(*tensors)
    difference = student.to(dtype) - teacher.to(dtype)
    size = difference.abs()
    loss = (size[:-1] * size[1:]).sum()
    slope = torch.zeros_like(size)
    slope[:-1] += size[1:]
    slope[1:] += size[:-1]
    slope = slope * difference.sign()
    found = []
    for side, x in enumerate(tensors):
        gradient = slope * ((1, -1)[side] * factor)
        found.append(gradient.to(gradient_dtype(x)) if grads >> side & 1 else x.new_empty(0))
    return loss * factor, *found


def _gram_match(student: Tensor, teacher: Tensor, factor, numbers, choices, grads):
    choices = GramChoices(choices[0], *map(bool, choices[1:])) if choices else GramChoices()
    sides, weights = [], []
    for gram, by in zip((student, teacher), list(numbers) or (1.0, 1.0), strict=True):
        weight = by
        if choices.norm:
            norm = torch.linalg.vector_norm(gram, ord=choices.norm, dim=2, keepdim=True)
            weight = by / norm.clamp(min=EPS)
            weights.append((weight, norm > EPS))
        else:
            weights.append((weight, None))
        sides.append(gram * weight)
    difference = sides[0] - sides[1]
    if choices.distance:
        norm = torch.linalg.vector_norm(difference, dim=2, keepdim=True)
        loss, slope = norm.sum(), difference / torch.where(norm > 0, norm, 1.0)
    else:
        loss, slope = difference.square().sum(), 2 * difference
    found = []
    for side, (gram, (weight, moves)) in enumerate(zip((student, teacher), weights, strict=True)):
        if not grads >> side & 1:
            found.append(gram.new_empty(0))
            continue
        g = slope
        if choices.norm:
            along = (slope * sides[side]).sum(2, keepdim=True) * moves
            g = g - along * (gram.sign() if choices.norm == 1 else sides[side])
        g = g * ((1, -1)[side] * factor * weight)
        found.append(g + g.mT if choices.symmetric else g)
    return loss * factor, *(x.contiguous() for x in found)


def _nst_grams(student: Tensor, cross: Tensor, teacher: Tensor, factor, numbers, choices, grads):
    by_s, by_t = numbers
    norms = [x.diagonal(dim1=1, dim2=2).sqrt() for x in (student, teacher)]
    m_s, m_t = (1 / norm.clamp(min=EPS) for norm in norms)
    pairs = [a.unsqueeze(2) * b.unsqueeze(1) for a, b in ((m_s, m_s), (m_s, m_t), (m_t, m_t))]
    own, between, others = (
        gram * pair for gram, pair in zip((student, cross, teacher), pairs, strict=True)
    )
    loss = by_s**2 * own.square().sum() + by_t**2 * others.square().sum()
    loss = loss - 2 * by_s * by_t * between.square().sum()
    found = [x.new_empty(0) for x in (student, cross, teacher)]
    if grads & 1:
        taken = by_s**2 * own.square().sum(2) - by_s * by_t * between.square().sum(2)
        taken = torch.where(norms[0] > EPS, taken * m_s * m_s, 0.0)
        found[0] = 4 * factor * (by_s**2 * own * pairs[0] - torch.diag_embed(taken))
    if grads & 2:
        found[1] = -4 * factor * by_s * by_t * between * pairs[1]
    if grads & 4:
        taken = by_s * by_t * between.square().sum(1)
        taken = torch.where(norms[1] > EPS, taken * m_t * m_t, 0.0)
        found[2] = torch.diag_embed(4 * factor * taken)
    return loss * factor, *found


for _name, _function in (
    ("rkd", _rkd),
    ("pkt", _pkt),
    ("polynomial", _polynomial),
    ("neighbours", _neighbours),
    ("gram_match", _gram_match),
    ("nst_grams", _nst_grams),
):
    for _key in ("CUDA", "CPU") if ops.triton_interpreted() else ("CUDA",):
        torch.library.impl(f"kdkernels::{_name}_triton", _key, _function)
