# SPDX-License-Identifier: Apache-2.0
"""The attention family's entries: a softened KL divergence from a simplified teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import functional
from kdkernels.testing.inputs import SHAPES, logits
from kdkernels.testing.loss import Loss, compiled_when_used

DIM = 32
_WEIGHTS = ("query_weight", "key_weight", "value_weight", "output_weight")


def _make(tokens):
    def make(shape, generator, device, dtype):
        classes = shape[-1]
        width, outputs = (DIM + 1, 1) if tokens == "class" else (classes, classes)

        def normal(rows, columns, variance):
            x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
            return (x * variance**0.5).to(device, dtype)

        tensors = logits(shape, generator, device, dtype)
        for name in _WEIGHTS[:3]:
            tensors[name] = normal(width, DIM, 1 / width)
        tensors["output_weight"] = normal(DIM, outputs, 1 / DIM)
        if tokens == "class":
            tensors["class_embedding"] = normal(classes, DIM, 1.0)
        return tensors

    return make


def _temperature(shape, generator, device, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = 1 + 3 * torch.rand(shape[:-1], generator=generator, dtype=torch.float64)
    return {"temperature": values.to(device, wide)}


def _loss(student, teacher, *, temperature, backend, **rest) -> Tensor:
    target = functional.learning_simplifier(
        teacher, temperature=temperature, **rest, backend=backend
    )
    return functional.kl_div(student, target, temperature=temperature, backend=backend)


def _kl(student, target, temperature):
    log_p, log_q = (F.log_softmax(x / temperature, -1) for x in (student, target))
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def _manual(query, key, value):
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return scores.softmax(-1) @ value


def _by_class(attention):
    """With the embeddings' share of queries, keys and values computed once, not once a row."""

    def eager(
        student, teacher, query_weight, key_weight, value_weight, output_weight,
        class_embedding, *, temperature, tokens,
    ):  # fmt: skip
        soft = (teacher / temperature).unsqueeze(-1)
        query, key, value = (
            soft * weight[-1] + class_embedding @ weight[:-1]
            for weight in (query_weight, key_weight, value_weight)
        )
        attended = (attention(query, key, value) @ output_weight).squeeze(-1)
        return _kl(student, teacher + temperature * attended, temperature)

    return eager


def _combined(
    student, teacher, query_weight, key_weight, value_weight, output_weight, class_embedding, *,
    temperature, tokens,
):  # fmt: skip
    """The kernel's own algebra, for a compiler to fuse: scores from K x K and rank-one terms."""
    soft = teacher / temperature
    query, key = class_embedding @ query_weight[:-1], class_embedding @ key_weight[:-1]
    value, by_logit = (x @ output_weight for x in (value_weight[:-1], value_weight[-1]))
    scale = query_weight.shape[-1] ** -0.5
    slope = query_weight[-1] @ key_weight[-1] * soft + query @ key_weight[-1]
    scores = slope.unsqueeze(-1) * soft.unsqueeze(-2) + query @ key.t()
    scores = scores + soft.unsqueeze(-1) * (key @ query_weight[-1])
    values = soft * by_logit + (class_embedding @ value).squeeze(-1)
    attended = ((scores * scale).softmax(-1) * values.unsqueeze(-2)).sum(-1)
    return _kl(student, teacher + temperature * attended, temperature)


def _by_row(attention):
    def eager(
        student, teacher, query_weight, key_weight, value_weight, output_weight, *,
        temperature, tokens,
    ):  # fmt: skip
        soft = teacher / temperature
        attended = attention(*(soft @ w for w in (query_weight, key_weight, value_weight)))
        return _kl(student, teacher + temperature * (attended @ output_weight), temperature)

    return eager


def _entry(name, tokens, eager, others) -> Loss:
    learned = (*_WEIGHTS, "class_embedding") if tokens == "class" else _WEIGHTS
    return Loss(
        name=name,
        family="attention",
        function=_loss,
        eager=eager,
        others=others,
        make=_make(tokens),
        make_optional=_temperature,
        differentiable=("student", "teacher", "temperature", *learned),
        learned=learned,
        shapes={name: SHAPES[name] for name in ("cifar100_b64", "imagenet_b256")},
        hyper={"temperature": 4.0, "tokens": tokens},
        by_row=False,
        divergence=False,
        pairwise=tokens == "class",
    )


LOSSES = (
    _entry(
        "learning_simplifier",
        "class",
        _by_class(_manual),
        {
            "sdpa": _by_class(F.scaled_dot_product_attention),
            "compile_combined": compiled_when_used(_combined),
        },
    ),
    _entry(
        "learning_simplifier_batch",
        "batch",
        _by_row(_manual),
        {"sdpa": _by_row(F.scaled_dot_product_attention)},
    ),
)
