# SPDX-License-Identifier: Apache-2.0
"""Maps as the suites distil them."""

from __future__ import annotations

import torch

# The stages of resnet32x4 and resnet8x4 at batch 64.
STAGES = {
    "resnet32x4_stage1": (64, 64, 32, 32),
    "resnet32x4_stage2": (64, 128, 16, 16),
    "resnet32x4_stage3": (64, 256, 8, 8),
}


def maps(shape, generator, device, dtype):
    """Pre-activations of a student on its way to the teacher."""
    teacher = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    student = 0.6 * teacher + 0.7 * noise
    return {"student": student.to(device, dtype), "teacher": teacher.to(device, dtype)}


def numbers(shape, generator, device, dtype, low, high):
    """Uniform, in the precision maps are accumulated in."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (low + (high - low) * values).to(device, wide)
