# SPDX-License-Identifier: Apache-2.0
"""A trained student in use: images as they are, logits out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kdkernels.train import checkpoint
from kdkernels.train.errors import InputError


class Student(nn.Module):
    """A trained ``network`` behind the normalisation that it was trained with.

    ``classes`` are the names of what its logits stand for, ``shape`` (H, W, C) is that of an image.
    """

    def __init__(
        self,
        network: nn.Module,
        shape: tuple[int, int, int],
        classes: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.network, self.shape, self.classes = network, shape, tuple(classes)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, H, W, C) as uint8."""
        if images.dtype != torch.uint8 or images.shape[1:] != self.shape:
            raise InputError(
                f"images: expected uint8 of shape (B, {', '.join(map(str, self.shape))}), got "
                f"{images.dtype} of shape {tuple(images.shape)}"
            )
        out = self.network(((images - self.mean) / self.std).permute(0, 3, 1, 2))
        return out["logits"] if isinstance(out, Mapping) else getattr(out, "logits", out)


def load_student(path: str | Path, network: nn.Module | None = None) -> Student:
    """The student of a run's ``model.safetensors``, or its teacher, in evaluation mode.

    ``network`` is for a student of :func:`distill`: one built as it was, to be given its weights.

    Raises:
        InputError: a file that is missing, damaged, or not of a run.
    """
    saved = checkpoint.read_model(Path(path), network)
    if saved.use.get("loaders"):
        raise InputError(
            f"{path}: trained on batches of a DataLoader, which normalised them itself: "
            f"network.load_state_dict(safetensors.torch.load_file(path)) has the weights"
        )
    if missing := sorted({"names", "mean", "std"} - saved.use.keys()):
        raise InputError(f"{path}: expected the model of a run, found no {missing[0]} in it")
    use = saved.use["names"], saved.use["mean"], saved.use["std"]
    return Student(saved.network, saved.shape, *use).eval()
