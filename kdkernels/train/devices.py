# SPDX-License-Identifier: Apache-2.0
"""The device a run is on, and the precision it computes in."""

from __future__ import annotations

import logging

import torch
from lightning_fabric import Fabric

from kdkernels.train.config import Config
from kdkernels.train.errors import InputError


def make_fabric(config: Config) -> Fabric:
    """One device at the precision asked for; ``auto`` is :func:`native_precision`."""
    # Fabric would repeat what the run says itself.
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    try:
        device = Fabric(accelerator=config.accelerator, devices=1).device
        precision = config.precision
        if precision == "auto":
            precision = native_precision(device)
        if precision == "16-mixed" and device.type == "cpu":
            raise ValueError("float16 needs a GPU; bf16-mixed does not")
        return Fabric(accelerator=config.accelerator, devices=1, precision=precision)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"--accelerator {config.accelerator} --precision {config.precision}: {error}"
        ) from error


def native_precision(device: torch.device) -> str:
    """``bf16-mixed`` where matrices of bfloat16 are multiplied in hardware, else ``32-true``.

    That is GPUs from Ampere on, and CPUs with AMX, AVX512-BF16 or ARM's BF16. Where older CPUs take
    bfloat16 at all, they convert it to float32, and lose time.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = getattr(torch.cpu, "get_capabilities", dict)()
        native = any(has.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return "bf16-mixed" if native else "32-true"
