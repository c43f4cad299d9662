# SPDX-License-Identifier: Apache-2.0
"""Factor transfer's networks (arXiv 1802.04977). ``ft_loss`` compares what they make."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from kdkernels import checks

__all__ = ["Paraphraser", "Translator"]


def _convolutions(kind, *widths: int) -> nn.Sequential:
    layers = nn.Sequential()
    for inputs, outputs in itertools.pairwise(widths):
        layers.append(kind(inputs, outputs, 3, padding=1))
        layers.append(nn.LeakyReLU(0.1, inplace=True))
    return layers


def _factors(name: str, teacher_channels: int, rate: float) -> int:
    width = int(teacher_channels * checks.number(name, "rate", rate))
    if width < 1:
        raise ValueError(f"{name}: rate must leave at least one channel, got {rate}.")
    return width


class Paraphraser(nn.Module):
    """The teacher's: an autoencoder of its maps, whose code is the factor.

    Trained before the student, by the mean square of ``reconstruct(x) - x``; then frozen.

    Args:
        channels: of the teacher's maps.
        rate: channels of the factor over these.
    """

    def __init__(self, channels: int, rate: float = 0.5) -> None:
        super().__init__()
        width = _factors(type(self).__name__, channels, rate)
        self.encoder = _convolutions(nn.Conv2d, channels, channels, width, width)
        self.decoder = _convolutions(nn.ConvTranspose2d, width, width, channels, channels)

    def forward(self, teacher: Tensor) -> Tensor:
        """The factor (B, rate C, H, W) of maps (B, C, H, W)."""
        return self.encoder(teacher)

    def reconstruct(self, teacher: Tensor) -> Tensor:
        """Maps (B, C, H, W) as the factor tells them."""
        return self.decoder(self.encoder(teacher))


class Translator(nn.Module):
    """The student's: from its maps to a factor of the teacher's width.

    Args:
        student_channels, teacher_channels: of the maps.
        rate: of the paraphraser.
    """

    def __init__(self, student_channels: int, teacher_channels: int, rate: float = 0.5) -> None:
        super().__init__()
        width = _factors(type(self).__name__, teacher_channels, rate)
        self.encoder = _convolutions(nn.Conv2d, student_channels, student_channels, width, width)

    def forward(self, student: Tensor) -> Tensor:
        """The factor (B, rate C_t, H, W) of maps (B, C_s, H, W)."""
        return self.encoder(student)
