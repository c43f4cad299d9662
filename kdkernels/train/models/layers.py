# SPDX-License-Identifier: Apache-2.0
"""What the image classifiers share: their outline, their parts and their initial weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kdkernels.train.models.taps import Taps


class Network(nn.Module):
    """Stem, stages, perhaps a head, global average pooling over any size, a linear classifier.

    The stages are ``stages.0``, ``stages.1``, ... in every network, so that features are named
    alike; see :class:`~kdkernels.train.models.taps.Taps`.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        features: int,
        classes: int,
        head: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.head = head or nn.Identity()
        self.classifier = nn.Linear(features, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        features = self.head(self.stages(self.stem(images)))
        return self.classifier(features.mean((2, 3)))

    @property
    def taps(self) -> Taps:
        """Where the features are."""
        count = len(self.stages)
        return Taps(
            stem=None if isinstance(self.stem, nn.Identity) else "stem",
            stages=tuple(f"stages.{index}" for index in range(count)),
            preactivations=tuple(map(self.preactivation, range(count))),
            pooled="classifier:input",
            classifier="classifier",
        )

    def preactivation(self, index: int) -> str:
        """What the activation that ends a stage takes."""
        activations = [
            path for path, module in self.stages[index].named_modules() if type(module) is nn.ReLU
        ]
        return f"stages.{index}.{activations[-1]}:input"


class ConvUnit(nn.Sequential):
    """Convolution that keeps the size (over the stride), batch normalisation, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, stride: int = 1, *, kernel: int = 3, groups: int = 1
    ) -> None:
        super().__init__(*conv_norm(inputs, outputs, stride, kernel=kernel, groups=groups))
        self.append(nn.ReLU())


def conv_norm(
    inputs: int, outputs: int, stride: int = 1, *, kernel: int = 3, groups: int = 1
) -> nn.Sequential:
    """Convolution that keeps the size (over the stride) and batch normalisation, hence no bias."""
    convolution = nn.Conv2d(
        inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def shuffle(features: Tensor, groups: int) -> Tensor:
    """Channel shuffle (arXiv 1707.01083, figure 1): one channel of each group in turn."""
    return features.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)
