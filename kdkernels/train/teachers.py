# SPDX-License-Identifier: Apache-2.0
"""The run's teachers: frozen, in evaluation mode, without gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from kdkernels.train.data import Batch
from kdkernels.train.frozen import folded, packed
from kdkernels.train.methods import Output
from kdkernels.train.taps import Tapped


class Teacher(nn.Module):
    """A frozen network on the run's device, at its precision: images in, an ``Output`` out.

    Fabric's own set-up is for what is trained; DDP refuses a module without gradients.
    """

    def __init__(self, fabric: Fabric, network: nn.Module, taps: Sequence[str] = ()) -> None:
        super().__init__()
        self.precision = fabric.strategy.precision
        network = self.precision.convert_module(network.requires_grad_(False).eval())
        self.network = Tapped(fabric.to_device(network), taps, what="teacher")
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode, whatever is asked for."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Output:
        with self.precision.forward_context():
            out = self.network(self.precision.convert_input(images))
        return self.precision.convert_output(out)


class Teachers(nn.ModuleList):
    """What the teachers asked for, by position, make of a batch.

    Those of the trainer's models answer with their batch normalisations :func:`folded`, and on CPUs
    with their convolutions :func:`packed`.
    ``taps`` are for each of the ``networks`` the paths of the modules whose outputs are wanted too.
    """

    cost: Mapping[str, Any] = {}  # what a cache of them has to report

    def __init__(
        self, fabric: Fabric, networks: Sequence[nn.Module], taps: Sequence[Sequence[str]]
    ) -> None:
        precision = fabric.strategy.precision
        answering = []
        for network, paths in zip(networks, taps, strict=True):
            # Before it is folded: what is rounded to float32 stays so in float64.
            network = folded(precision.convert_module(network.eval()), paths)
            if fabric.device.type == "cpu":
                network = packed(network, paths, precision.precision)
            answering.append(Teacher(fabric, network, paths))
        super().__init__(answering)

    def forward(self, batch: Batch, indices: Sequence[int]) -> list[Output]:
        return [self[index](batch.images) for index in indices]
