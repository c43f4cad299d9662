# SPDX-License-Identifier: Apache-2.0
"""The learning simplifier of Student-friendly Knowledge Distillation (arXiv 2305.10893)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kdkernels import backends, checks, ops, reference
from kdkernels.distributed import gather_rows
from kdkernels.reference.attention import softened

__all__ = ["learning_simplifier"]


TOKENS = ("class", "batch")


def learning_simplifier(
    teacher_logits: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    class_embedding: Tensor | None = None,
    output_weight: Tensor,
    tokens: str = "class",
    num_heads: int = 1,
    residual: bool = True,
    group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Teacher logits made easier to imitate by attention that is learned with the student.

    **A reconstruction.** Only the paper's abstract could be verified: a temperature softens the
    teacher's logits; a learning simplifier based on attention simplifies them further; it is
    trained together with the student, by the distillation loss, whose form does not change. What
    attends to what, the sizes, the residual, the scaling and the initialisation are this
    package's; no number of the paper is claimed for them.

    With ``s = teacher_logits / temperature``, tokens ``x``, and per head ``q = x Wq``,
    ``k = x Wk``, ``v = x Wv`` of ``d`` columns, the result is
    ``temperature * (s + softmax(q k^T / sqrt(d)) v Wo)``, heads being concatenated: logits at the
    teacher's own scale, so that softmax(result / T) is the new target and any loss of the package
    takes it as its teacher. Where ``output_weight`` is zero it is exactly ``teacher_logits``.

    tokens:
        ``"class"``: in each row the K classes attend to each other. A class's token is its
        embedding with its softened logit appended, so the last row of the weights belongs to the
        logit. Fused: time N K^2, memory N K and K^2.
        ``"batch"``: the N rows attend to each other, a token being a row's K softened logits. The
        result of a row depends on which others are in the batch. Fused on the CPU, products
        included; with Triton those are a library's. Time N K d, memory N K and N^2.

    Args:
        teacher_logits: (..., K); the leading dimensions are rows. fp64, fp32, bf16 or fp16, any
            strides. A class at -inf takes no part and stays -inf.
        temperature: a number, or a tensor of one element or of shape (...); positive.
        query_weight, key_weight: (W, H d); W = D + 1 for class tokens, K for batch tokens.
        value_weight: (W, H d').
        class_embedding: (K, D), for class tokens only.
        output_weight: (H d', 1) for class tokens, (H d', K) for batch tokens.
        num_heads: H.
        residual: without, the result is ``temperature`` times the attended part alone.
        group: batch tokens attend to the rows of all ranks; each row's result is that of one
            process on the concatenated batch. With ``DistributedDataParallel``, parameters get
            that process's gradient as well if all ranks have as many rows and a mean is taken.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    Returns:
        (..., K), in fp32 (fp64 if any argument is), differentiable to the logits, the temperature
        and all weights. A second derivative, or a ``torch.func`` transform, needs
        ``backend="reference"``.

    Raises:
        ``ValueError`` for a shape or value out of range, ``TypeError`` for a dtype,
        ``NotImplementedError`` for a ``group`` where logits or temperature require a gradient,
        ``RuntimeError`` where the demanded backend cannot run.
    """
    name = "learning_simplifier"
    weights = {
        "query_weight": query_weight, "key_weight": key_weight, "value_weight": value_weight,
        "output_weight": output_weight,
    }  # fmt: skip
    if class_embedding is not None:
        weights["class_embedding"] = class_embedding
    checks.choice(name, "tokens", tokens, TOKENS)
    _check_weights(name, teacher_logits, weights, tokens, num_heads)
    dtypes = [x.dtype for x in (teacher_logits, *weights.values())]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    number, temperatures = checks.temperature(
        name, "temperature", temperature, teacher_logits, dtype
    )
    backend = backends.select("attention", teacher_logits.device.type, backend, name)
    if group is not None and tokens == "class":
        raise ValueError(f'{name}: group is for tokens="batch"; class tokens relate no rows.')
    checks.group(name, group)

    with torch.autocast(teacher_logits.device.type, enabled=False):
        weights = {key: x.to(dtype) for key, x in weights.items()}
        taus = number if temperatures is None else temperatures
        if backend != "reference":
            call = ops.attention.Call(name, backend, num_heads, number, residual)
            given = (teacher_logits, temperatures, *weights.values())
            if tokens == "class":
                return ops.attention.classes(call, *given)
            gathered = None
            if group is not None:
                rows = teacher_logits.reshape(-1, teacher_logits.shape[-1]).to(dtype)
                gathered = _gather(name, group)(softened(rows, taus)[2])
            return ops.attention.rows(call, gathered, *given)
        rows = teacher_logits.reshape(-1, teacher_logits.shape[-1]).to(dtype)
        weights.setdefault("class_embedding", None)
        simplified = reference.learning_simplifier(
            rows, taus, **weights, num_heads=num_heads, residual=residual,
            gather=_gather(name, group),
        )  # fmt: skip
        return simplified.view(teacher_logits.shape)


def _gather(name: str, group: dist.ProcessGroup | None):
    """The softened rows to attend to, given one's own."""
    if group is None:
        return lambda rows: rows

    def gather(rows: Tensor) -> Tensor:
        if rows.requires_grad:
            raise NotImplementedError(
                f"{name}: with a group, teacher_logits and temperature must not require a "
                "gradient: other ranks would have to send theirs."
            )
        return gather_rows(group, rows)[0]

    return gather


def _check_weights(name, teacher, weights, tokens, num_heads) -> None:
    for argument, value in {"teacher_logits": teacher, **weights}.items():
        checks.floats(name, argument, value)
        if value.device != teacher.device:
            raise ValueError(
                f"{name}: {argument} must be on the device of teacher_logits {teacher.device}, "
                f"got {value.device}."
            )
    if teacher.dim() == 0 or teacher.shape[-1] == 0:
        raise ValueError(
            f"{name}: teacher_logits must have shape (..., K) with K >= 1, "
            f"got {tuple(teacher.shape)}."
        )
    classes = teacher.shape[-1]
    checks.integer(name, "num_heads", num_heads)
    if num_heads < 1:
        raise ValueError(f"{name}: num_heads must be at least 1, got {num_heads}.")
    embedding = weights.get("class_embedding")
    if (embedding is not None) != (tokens == "class"):
        raise ValueError(
            f'{name}: class_embedding must be given for tokens="class", and only for it.'
        )

    def expect(argument, rows, columns, meaning):
        shape = tuple(weights[argument].shape)
        if len(shape) != 2 or shape[0] != rows or (columns is not None and shape[1] != columns):
            raise ValueError(f"{name}: {argument} must have shape {meaning}, got {shape}.")

    if embedding is None:
        width, meaning, out = classes, f"({classes}, H d)", classes
    else:
        expect("class_embedding", classes, None, f"({classes}, D)")
        width, out = embedding.shape[-1] + 1, 1
        meaning = f"({width}, H d), its rows one more than class_embedding's columns"
    expect("query_weight", width, None, meaning)
    expect("value_weight", width, None, meaning)
    columns = weights["query_weight"].shape[1]
    expect("key_weight", width, columns, f"({width}, {columns}), as query_weight")
    for argument in ("query_weight", "value_weight"):
        columns = weights[argument].shape[1]
        if columns == 0 or columns % num_heads:
            raise ValueError(
                f"{name}: {argument} must have a multiple of num_heads ({num_heads}) columns, "
                f"got {columns}."
            )
    columns = weights["value_weight"].shape[1]
    expect("output_weight", columns, out, f"({columns}, {out})")
