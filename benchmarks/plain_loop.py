# SPDX-License-Identifier: Apache-2.0
"""Distillation as the suites' training scripts have it: what train_speed.py compares with.

As in RepDistiller and mdistiller: float32, every image decoded and augmented by itself in worker
processes, the teacher asked in every step, the loss written out in eager operations, and both
accuracies and the loss read back in every step.
"""

from __future__ import annotations

import random
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from kdkernels.train.clock import StepClock
from kdkernels.train.data import Dataset

WORKERS = 2  # mdistiller's default, and the cores of the machine measured; RepDistiller's is 8
TEMPERATURE, ALPHA = 4.0, 0.9
PADDING = 4
# Steps in which workers start and batches fetched beforehand are used up: not counted.
WARM_UP = 10


class Result(NamedTuple):
    """What a short training came to."""

    samples_per_second: float
    loss_share: float
    loss_ms: float


class Images(TorchDataset):
    """The training images one by one, with torchvision's usual transforms on PIL images.

    They are written out because torchvision may be missing: RandomCrop, RandomHorizontalFlip,
    ToTensor, Normalize.
    """

    def __init__(self, data: Dataset) -> None:
        self.images, self.labels, self.rows = data.train.images, data.train.labels, data.train.rows
        self.mean, self.std = (
            torch.from_numpy(x / 255)[:, None, None] for x in (data.mean, data.std)
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        row = self.rows[position]
        image = Image.fromarray(self.images[row])
        width, height = image.size
        image = ImageOps.expand(image, PADDING)
        left, top = random.randint(0, 2 * PADDING), random.randint(0, 2 * PADDING)
        image = image.crop((left, top, left + width, top + height))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div_(255).sub_(self.mean).div_(self.std), int(self.labels[row])


def distill_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """RepDistiller's DistillKL: T^2 KL(teacher || student)."""
    p, q = F.log_softmax(student / TEMPERATURE, 1), F.softmax(teacher / TEMPERATURE, 1)
    return F.kl_div(p, q, reduction="sum") * TEMPERATURE**2 / student.shape[0]


def train(
    student: nn.Module, teacher: nn.Module, data: Dataset, config, device: torch.device
) -> Result:
    """``config.max_steps`` steps of ``config``'s recipe."""
    student, teacher = student.to(device).train(), teacher.to(device).eval()
    loader = DataLoader(
        Images(data), config.batch_size, shuffle=True, drop_last=True, num_workers=WORKERS,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    optimizer = torch.optim.SGD(
        student.parameters(), config.lr, 0.9, nesterov=True, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.max_steps)
    clock = StepClock(device)
    batches = (batch for _ in count() for batch in loader)
    for step in range(config.max_steps):
        if step == WARM_UP:
            clock.read()
        clock.step_starts()
        images, labels = (tensor.to(device) for tensor in next(batches))
        with torch.no_grad():
            teacher_logits = teacher(images)
        logits = student(images)
        clock.loss_starts(logits)
        loss = (1 - ALPHA) * F.cross_entropy(logits, labels)
        loss = loss + ALPHA * distill_kl(logits, teacher_logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        top = logits.topk(5).indices == labels[:, None]
        loss.item(), top[:, :1].sum().item(), top.sum().item()
        clock.step_ends()
        schedule.step()
    seconds, loss_seconds = clock.read()
    steps = config.max_steps - WARM_UP
    return Result(
        steps * config.batch_size / seconds, loss_seconds / seconds, 1000 * loss_seconds / steps
    )
