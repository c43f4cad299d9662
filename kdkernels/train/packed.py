# SPDX-License-Identifier: Apache-2.0
"""Frozen convolutions on x86, as oneDNN would have them.

In every call PyTorch rounds a convolution's weights to the run's precision and rearranges them, and
what follows it, a shortcut or an activation, passes over the maps again. A frozen network's weights
are rounded and rearranged once, and what follows is done while the results are in registers.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdkernels.train.models.layers import Network
from kdkernels.train.models.resnet import BasicBlock

DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


class Convolution(nn.Module):
    """A frozen convolution, what may be added to its outcome, and perhaps ReLU."""

    def __init__(self, plain: nn.Conv2d, dtype: torch.dtype, relu: bool) -> None:
        super().__init__()
        # Kept for what it prints and its state: oneDNN's layouts are neither.
        self.plain, self.dtype, self.relu = plain, dtype, relu
        self._how = *map(list, (plain.padding, plain.stride, plain.dilation)), plain.groups
        self._bias = None if plain.bias is None else plain.bias.detach().to(dtype)
        self._shape, self._weight = torch.Size(), None

    def forward(self, images: Tensor, shortcut: Tensor | None = None) -> Tensor:
        run, images = torch.ops.mkldnn._convolution_pointwise, images.to(self.dtype)
        if images.shape != self._shape:  # on which the fastest layout may depend
            self._shape = images.shape
            weight = self.plain.weight.detach().to(self.dtype).to_mkldnn()
            rearrange = torch._C._nn.mkldnn_reorder_conv2d_weight
            self._weight = rearrange(weight, *self._how, self._shape)
        given = self._weight, self._bias, *self._how
        if shortcut is None:
            return run(images, *given, "relu" if self.relu else "none", [], None)
        activation = "relu" if self.relu else None
        shortcut = shortcut.to(self.dtype)
        return run.binary(images, shortcut, *given, "add", None, activation, [], None)

    def extra_repr(self) -> str:
        return f"{self.dtype}, relu={self.relu}"


class Block(nn.Module):
    """A :class:`BasicBlock` whose last convolution adds the shortcut and has the ReLU."""

    def __init__(self, block: BasicBlock, last: Convolution) -> None:
        super().__init__()
        self.body, self.shortcut, self.last = block.body[:-2], block.shortcut, last

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.body(images), self.shortcut(images))


def packed(network: nn.Module, taps: Sequence[str], precision: str) -> nn.Module:
    """A copy of one of the trainer's own networks on a CPU, for inference at that precision.

    Convolutions in a plain ``nn.Sequential`` are packed, ReLU behind them and the shortcuts of
    residual blocks with them, if none of these is tapped or has hooks. For float32 the results are
    the same, for bfloat16 sums are rounded less often. Elsewhere, the network itself.
    """
    dtype = DTYPES.get(precision)
    if not isinstance(network, Network) or not supported(dtype):
        return network
    network = copy.deepcopy(network)
    tapped = {tap.partition(":")[0] for tap in taps}
    fixed = {path for path, part in network.named_modules() if path in tapped or hooked(part)}
    for path, block in list(network.named_modules()):
        inside = any(other.startswith(f"{path}.") for other in fixed)
        if type(block).forward is BasicBlock.forward and path not in fixed and not inside:
            last, norm = block.body[-2:]
            if type(last) is nn.Conv2d and type(norm) is nn.Identity:
                network.set_submodule(path, Block(block, Convolution(last, dtype, relu=True)))
    for path, parent in list(network.named_modules()):
        if type(parent).forward is nn.Sequential.forward:
            _pack(parent, fixed, f"{path}." if path else "", dtype)
    return network


def _pack(sequence: nn.Sequential, fixed: set[str], prefix: str, dtype: torch.dtype) -> None:
    """Pack the convolutions of a sequence, each with the ReLU behind it if that is next."""
    # Not named_children(), which leaves out what comes twice. Folding leaves identities behind.
    steps = [
        (name, None if prefix + name in fixed else module)
        for name, module in sequence._modules.items()
        if type(module) is not nn.Identity or prefix + name in fixed
    ]
    for (name, module), (next_name, follower) in zip(steps, [*steps[1:], ("", None)], strict=True):
        if type(module) is nn.Conv2d:
            relu = type(follower) is nn.ReLU
            sequence._modules[name] = Convolution(module, dtype, relu=relu)
            if relu:
                sequence._modules[next_name] = nn.Identity()


def supported(dtype: torch.dtype | None) -> bool:
    """Whether oneDNN convolves in this type here."""
    return (
        platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and dtype is not None
        and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def hooked(module: nn.Module) -> bool:
    """Whether something looks at what the module takes or gives out."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
