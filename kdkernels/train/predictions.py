# SPDX-License-Identifier: Apache-2.0
"""What a finished student makes of the test images, kept for reports: a small ``test.npz``."""

from __future__ import annotations

import zipfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kdkernels.train import checkpoint
from kdkernels.train.data import Dataset, LoaderData
from kdkernels.train.errors import InputError

# Test images that are kept to be shown, and their longest side in pixels.
EXAMPLES, SIDE = 12, 96


class Predictions(NamedTuple):
    """Of n test images; the teacher's are empty where there is none."""

    classes: np.ndarray  # (K,) names
    labels: np.ndarray  # (n,)
    student: np.ndarray  # (n,) predicted classes
    student_confidence: np.ndarray  # (n,) their probabilities
    teacher: np.ndarray
    teacher_confidence: np.ndarray
    examples: np.ndarray  # (m,) positions of images drawn once for all runs on the data
    images: np.ndarray  # (m, H, W, C) uint8; none where the data is loaders


def save(
    path: Path,
    data: Dataset | LoaderData,
    student: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
) -> None:
    """Keep the predictions of test logits (n, K), and images, if the data has them as such."""
    if teacher is None:
        teacher = student[:0]
    (chosen, confidence), (chosen_by_teacher, teachers) = map(_top, (student, teacher))
    examples = np.random.default_rng(0).permutation(len(labels))[:EXAMPLES]
    if isinstance(data, LoaderData):
        examples, images = examples[:0], np.empty((0, 1, 1, 1), np.uint8)
    else:
        images = np.stack([_thumbnail(image) for image in data.test.take(examples)[0]])
    content = Predictions(
        classes=np.array(data.classes),
        labels=labels.cpu().numpy(),
        student=chosen,
        student_confidence=confidence,
        teacher=chosen_by_teacher,
        teacher_confidence=teachers,
        examples=examples,
        images=images,
    )
    checkpoint.write(path, partial(np.savez_compressed, **content._asdict()))


def load(path: Path) -> Predictions:
    """What :func:`save` kept; a damaged file is named."""
    try:
        with np.load(path) as content:
            return Predictions(*(content[name] for name in Predictions._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: damaged ({error})") from error


def _top(logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    confidence, chosen = torch.softmax(logits, -1).max(-1)
    return chosen.cpu().numpy(), confidence.cpu().numpy()


def _thumbnail(image: np.ndarray) -> np.ndarray:
    height, width, channels = image.shape
    scale = SIDE / max(height, width)
    if scale >= 1 or channels == 2:
        return image
    shown = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
    size = tuple(max(round(scale * pixels), 1) for pixels in (width, height))
    shown = shown.resize(size, Image.Resampling.BOX)
    return np.asarray(shown).reshape(*shown.size[::-1], channels)
