# SPDX-License-Identifier: Apache-2.0
"""A teacher's outputs as the arrays that a cache keeps of them, and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kdkernels.train.errors import InputError
from kdkernels.train.methods import Output, TopK

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


class Form(NamedTuple):
    """How outputs are kept: at which precision, and of the logits how many.

    ``temperature`` is the one at which what is left out of the logits is known.
    """

    dtype: str = "fp32"
    top_k: int | None = None
    temperature: float | None = None


def encode(out: Output, form: Form) -> dict[str, Tensor]:
    """The arrays that are kept of an output, features in the memory order they came in."""
    stored = partial(narrow, dtype=form.dtype)
    if form.top_k:
        values, classes = out.logits.topk(form.top_k)
        logsumexp = (out.logits / form.temperature).logsumexp(-1)
        arrays = {
            "top-logits": stored(values),
            "top-classes": classes.int(),
            "top-logsumexp": logsumexp,
        }
    else:
        arrays = {"logits": stored(out.logits)}
    for number, feature in enumerate((out.features or {}).values()):
        name = f"features-{number}"
        if is_channels_last(feature):
            name, feature = f"{name}-channels-last", feature.permute(0, 2, 3, 1)
        arrays[name] = stored(feature)
    return arrays


def decode(arrays: dict[str, Tensor], taps: Sequence[str]) -> Output:
    """The output, in float32, of which :func:`encode` kept these arrays."""
    if "logits" in arrays:
        logits = arrays["logits"].float()
    else:
        names = ("top-logits", "top-classes", "top-logsumexp")
        logits = TopK(*(arrays[name] for name in names))
    features = {}
    for number, tap in enumerate(taps):
        name = f"features-{number}"
        if name in arrays:
            features[tap] = arrays[name].float()
        else:
            features[tap] = arrays[f"{name}-channels-last"].float().permute(0, 3, 1, 2)
    return Output(logits, features)


def narrow(values: Tensor, dtype: str) -> Tensor:
    """The values in the type they are kept in; refused where that has no such numbers."""
    kept = values.to(DTYPES[dtype])
    if not torch.equal(kept.isfinite(), values.isfinite()):
        raise InputError(
            f"--cache-dtype {dtype}: the teacher's outputs reach {values.abs().max():.3g}, beyond "
            "its range; use fp32"
        )
    return kept


def is_channels_last(feature: Tensor) -> bool:
    """Whether a map lies in memory pixel by pixel, and not channel by channel as well."""
    return (
        feature.ndim == 4
        and feature.is_contiguous(memory_format=torch.channels_last)
        and not feature.is_contiguous()
    )
