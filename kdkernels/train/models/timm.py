# SPDX-License-Identifier: Apache-2.0
"""Any model of timm, untrained, where timm is installed: ``timm:<name>``."""

from __future__ import annotations

import difflib

from torch import nn

from kdkernels.train.errors import InputError

PREFIX = "timm:"
NAMES = f"{PREFIX}<name>"


def build(name: str, shape: tuple[int, int, int], classes: int) -> nn.Module | None:
    """The network of that name, None if it is none of timm's."""
    if not name.startswith(PREFIX):
        return None
    try:
        import timm
    except ImportError as error:
        raise InputError(f"model {name}: needs timm, which cannot be imported ({error})") from error
    height, width, channels = shape
    short = name.removeprefix(PREFIX)
    if not timm.is_model(short):
        near = difflib.get_close_matches(short, timm.list_models(), n=5, cutoff=0.3)
        raise InputError(f"model {name}: not one of timm's; nearest: {', '.join(near) or 'none'}")
    model = timm.create_model(short, num_classes=classes, in_chans=channels)
    # Transformers are built for one size.
    if hasattr(model, "set_input_size"):
        model.set_input_size((height, width))
    return model
