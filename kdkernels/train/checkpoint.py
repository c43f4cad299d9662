# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole or absent: written beside their place, then moved into it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from kdkernels.train.errors import InputError
from kdkernels.train.models import build_model


def write(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Replace ``path`` by what ``fill`` writes; whatever goes wrong, the old file stays whole."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON."""
    write(path, lambda file: file.write(json.dumps(content, indent=2).encode() + b"\n"))


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write JSON Lines."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write(path, lambda file: file.write(text.encode()))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read JSON Lines; a missing or damaged file is named."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON Lines ({error})") from error


def read_json(path: Path) -> Any:
    """Read JSON; a missing or damaged file is named."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Save what a run needs to go on."""
    write(path, lambda file: torch.save(state, file))


def load_state(path: Path) -> dict[str, Any]:
    """Load what :func:`save_state` saved, on the CPU; a damaged file is named."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive raises nearly anything
        raise InputError(f"{path}: damaged checkpoint ({type(error).__name__}: {error})") from error


class SavedModel(NamedTuple):
    """A model from a file, and what it takes and gives out."""

    name: str
    network: nn.Module
    shape: tuple[int, int, int]  # height, width and channels of an image
    classes: int
    use: dict[str, Any]  # as given to save_model


def save_model(
    path: Path,
    name: str,
    weights: Mapping[str, Tensor],
    shape: tuple[int, ...],
    classes: int,
    **use: Any,
) -> None:
    """Save a model's weights with what is needed to build it again, and for its ``use``."""
    metadata = {"shape": shape, "classes": classes} | use
    metadata = {"model": name} | {key: json.dumps(value) for key, value in metadata.items()}
    # Copies: tensors that share their memory, as tied weights do, are refused.
    tensors = {key: value.contiguous().clone() for key, value in weights.items()}
    write(path, lambda file: file.write(_in_order(save(tensors, metadata))))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the same model is the same bytes."""
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[size:]


def require_model_file(path: Path) -> None:
    """Refuse a path where there is none."""
    if not path.is_file():
        hint = "; expected the model.safetensors in this folder" if path.is_dir() else ""
        raise InputError(f"{path}: no such model file{hint}")


def read_model(path: Path, network: nn.Module | None = None) -> SavedModel:
    """What :func:`save_model` saved, in ``network`` if it is of a user's own.

    A missing, damaged or foreign file is named.
    """
    require_model_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    if not {"model", "shape", "classes"} <= metadata.keys():
        raise InputError(f"{path}: not saved by kdkernels train (no model name in its metadata)")
    name = metadata.pop("model")
    use = {key: json.loads(value) for key, value in metadata.items()}
    shape, classes = tuple(use.pop("shape")), use.pop("classes")
    if network is None and use.get("own"):
        raise InputError(
            f"{path}: the weights of a network of your own, {name}: build one as it was and "
            f"load_student(path, network) fills it"
        )
    network = network or build_model(name, shape, classes)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise InputError(f"{path}: does not fit {name} ({error})") from error
    return SavedModel(name, network, shape, classes, use)


def load_model(path: Path, shape: tuple[int, ...], classes: int) -> tuple[str, nn.Module]:
    """Name and model saved by :func:`save_model`, which must fit the images and classes."""
    saved = read_model(path)
    if (saved.shape, saved.classes) != (tuple(shape), classes):
        raise InputError(
            f"{path}: trained on images (H, W, C) = {saved.shape} of {saved.classes} classes; the "
            f"data has {tuple(shape)} of {classes}"
        )
    return saved.name, saved.network
