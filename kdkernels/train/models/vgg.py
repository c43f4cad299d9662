# SPDX-License-Identifier: Apache-2.0
"""VGG networks (Simonyan and Zisserman, arXiv 1409.1556) with batch normalisation.

``vgg<8|11|13|16|19>`` as the distillation suites have them for small images: five stages, pooling
between them, and one linear layer behind the global average. The last stage keeps the size of the
fourth unless images have 64 pixels a side or more. Convolutions have a bias.
"""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn import functional as F

from kdkernels.train.models.layers import Network

# Convolutions in each of the five stages.
DEPTHS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
WIDTHS = (64, 128, 256, 512, 512)
NAMES = f"vgg<{'|'.join(map(str, DEPTHS))}>"


def build(name: str, channels: int, classes: int) -> Network | None:
    """The network of that name, None if it is none of these."""
    found = re.fullmatch(r"vgg([1-9]\d*)", name)
    counts = DEPTHS.get(int(found[1])) if found else None
    if not counts:
        return None
    stages, inputs = [], channels
    for width, count in zip(WIDTHS, counts, strict=True):
        units = []
        for _ in range(count):
            convolution = nn.Conv2d(inputs, width, 3, padding=1)
            nn.init.zeros_(convolution.bias)
            units += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        stages.append(nn.Sequential(*units))
    pools = [nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(2), nn.MaxPool2d(2), PoolLarge()]
    stages = [nn.Sequential(pool, *stage) for pool, stage in zip(pools, stages, strict=True)]
    return Network(nn.Identity(), stages, inputs, classes)


class PoolLarge(nn.Module):
    """The fourth pooling: of 8x8 features, which images of 64x64 have there, and larger ones."""

    def forward(self, features: Tensor) -> Tensor:
        return F.max_pool2d(features, 2) if min(features.shape[2:]) >= 8 else features
