# SPDX-License-Identifier: Apache-2.0
"""Makers of tensor arguments: (shape, generator, device, dtype) -> tensors by name."""

from __future__ import annotations

import torch

# Where rows of logits occur.
SHAPES = {
    "cifar100_b64": (64, 100),
    "imagenet_b256": (256, 1000),
    "llama2_vocab": (512, 32000),
    "gpt2_vocab": (256, 50257),
    "llama3_vocab": (128, 128256),
}


def logits(shape, generator, device, dtype):
    """A student on its way to the teacher: correlated rows, as trained models have."""
    teacher = 3.0 * torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    student = 0.5 * teacher + 1.5 * noise
    return {"student": student.to(device, dtype), "teacher": teacher.to(device, dtype)}


def labelled_logits(shape, generator, device, dtype):
    labels = torch.randint(shape[-1], shape[:-1], generator=generator)
    return logits(shape, generator, device, dtype) | {"labels": labels.to(device)}


def per_row(shape, generator, device, dtype):
    """Temperatures and weights per row, in the precision rows are accumulated in."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def uniform(low, high):
        values = torch.rand(shape[:-1], generator=generator, dtype=torch.float64)
        return (low + (high - low) * values).to(device, wide)

    return {
        "temperature": uniform(1.0, 4.0),
        "teacher_temperature": uniform(1.0, 4.0),
        "row_weight": uniform(0.0, 2.0),
    }
