# SPDX-License-Identifier: Apache-2.0
"""Networks that only answer, made faster: batch normalisation folded, convolutions packed.

Packing is for x86. In every call PyTorch rounds a convolution's weights to the run's precision and
rearranges them as oneDNN would have them, and what follows it, a shortcut or an activation, passes
over the maps again. A frozen network's weights are rounded and rearranged once, and what follows is
done while the results are in registers.

Both are for the trainer's own networks: another may use what comes out of a part of a sequence.
What is tapped or has hooks stays as it is.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdkernels.train.models.layers import Network
from kdkernels.train.models.resnet import BasicBlock

DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


def folded(network: nn.Module, taps: Sequence[str] = ()) -> nn.Module:
    """The network with its batch normalisations in the convolutions before them, if it has any.

    A copy, equal but for rounding. Folded is what stands side by side in a plain ``nn.Sequential``.
    """
    if not isinstance(network, Network):
        return network
    copied, found = copy.deepcopy(network), False
    for sequence, steps in _sequences(copied, _fixed(copied, taps)):
        for (name, convolution), (next_name, norm) in pairwise(steps):
            if (
                type(convolution) is nn.Conv2d
                and type(norm) is nn.BatchNorm2d
                and norm.running_mean is not None
            ):
                sequence._modules[name] = fuse_conv_bn_eval(convolution, norm)
                sequence._modules[next_name] = nn.Identity()
                found = True
    return copied if found else network


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
    """A copy of a network on a CPU, for inference at that precision; elsewhere, the network itself.

    Convolutions in a plain ``nn.Sequential`` are packed, with ReLU behind them and the shortcuts of
    residual blocks. For float32 the results are the same, for bfloat16 sums are rounded less often.
    """
    dtype = DTYPES.get(precision)
    if not isinstance(network, Network) or not supported(dtype):
        return network
    network = copy.deepcopy(network)
    fixed = _fixed(network, taps)
    for path, block in list(network.named_modules()):
        inside = any(other.startswith(f"{path}.") for other in fixed)
        if type(block).forward is BasicBlock.forward and path not in fixed and not inside:
            last, norm = block.body[-2:]
            if type(last) is nn.Conv2d and type(norm) is nn.Identity:
                network.set_submodule(path, Block(block, Convolution(last, dtype, relu=True)))
    for sequence, steps in _sequences(network, fixed):
        # Folding leaves identities behind.
        steps = [(name, step) for name, step in steps if type(step) is not nn.Identity]
        for (name, step), (next_name, follower) in pairwise([*steps, ("", None)]):
            if type(step) is nn.Conv2d:
                relu = type(follower) is nn.ReLU
                sequence._modules[name] = Convolution(step, dtype, relu=relu)
                if relu:
                    sequence._modules[next_name] = nn.Identity()
    return network


def supported(dtype: torch.dtype | None) -> bool:
    """Whether oneDNN convolves in this type here."""
    return (
        platform.machine() in ("x86_64", "AMD64")
        and torch.backends.mkldnn.is_available()
        and dtype is not None
        and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _fixed(network: nn.Module, taps: Sequence[str]) -> set[str]:
    """Paths of the modules that something looks into."""
    tapped = {tap.partition(":")[0] for tap in taps}
    return {
        path
        for path, module in network.named_modules(remove_duplicate=False)
        if path in tapped or module._forward_hooks or module._forward_pre_hooks
    }


def _sequences(
    network: nn.Module, fixed: set[str]
) -> Iterator[tuple[nn.Sequential, list[tuple[str, nn.Module | None]]]]:
    """The plain sequences of a network and their steps by name, None for those that are fixed."""
    for path, module in list(network.named_modules()):
        if type(module).forward is nn.Sequential.forward:
            prefix = f"{path}." if path else ""
            # Not named_children(), which leaves out what comes twice.
            steps = module._modules.items()
            yield module, [(name, None if prefix + name in fixed else step) for name, step in steps]
