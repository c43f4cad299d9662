# SPDX-License-Identifier: Apache-2.0
"""What a network makes of images, and its inner modules give out or take, by their paths."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kdkernels.train.errors import InputError
from kdkernels.train.methods.base import Output

# Tapped tensors by path, each with its version when it was tapped.
Kept = dict[str, tuple[Tensor, int]]


class Tapped(nn.Module):
    """``network`` with the outputs of the modules at ``paths``: images in, an ``Output`` out.

    The network may give logits, or an output that has ``logits``, as those of transformers do.
    ``"<path>:input"`` is what a module takes instead: features before an activation, say.

    A module behind a tapped one that works in place (``ReLU(inplace=True)``) gets a copy, so that
    what is tapped is what the module gave out, whichever that is; anything else that overwrites a
    tapped tensor is an error. Attributes and ``state_dict`` are the network's under ``network.``.
    """

    def __init__(self, network: nn.Module, paths: Sequence[str] = (), *, what: str = "model"):
        super().__init__()
        self.network, self.paths, self.what = network, tuple(paths), what
        self._tapped: Kept = {}
        modules, hooks = dict(network.named_modules()), []
        for path in self.paths:
            name, colon, side = path.partition(":")
            if colon and side != "input":
                raise InputError(f"{what}: {path!r}: expected a module's path or <path>:input")
            if name not in modules:
                near = difflib.get_close_matches(name, [name for name in modules if name], 3, 0.0)
                raise InputError(f"{what}: no module {name!r}; the nearest are {', '.join(near)}")
            if colon:
                hook = modules[name].register_forward_pre_hook(_keeper(path, self._tapped))
            else:
                hook = modules[name].register_forward_hook(_keeper(path, self._tapped))
            hooks.append(hook)
        if self.paths:
            for module in modules.values():
                if getattr(module, "inplace", False):
                    hooks.append(module.register_forward_pre_hook(_sparer(self._tapped)))
        # The network may be tapped again: the hooks go with this object, which they do not hold.
        weakref.finalize(self, _remove, hooks)

    def forward(self, images: Tensor) -> Output:
        self._tapped.clear()
        logits = self._logits(self.network(images))
        for path, (tensor, version) in self._tapped.items():
            if tensor._version != version:
                raise InputError(
                    f"module {path!r}: its output is overwritten in place by what follows it; tap "
                    "the module that overwrites it"
                )
        if missing := [path for path in self.paths if path not in self._tapped]:
            raise InputError(f"modules {missing}: the network did not call them")
        features = {path: self._tapped[path][0] for path in self.paths}
        self._tapped.clear()
        return Output(logits, features)

    def _logits(self, out: Any) -> Tensor:
        logits = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", out)
        if not isinstance(logits, Tensor):
            given = f"a {type(out).__name__}"
            given += f" with {', '.join(map(str, out))}" if isinstance(out, Mapping) else ""
            raise InputError(
                f"{self.what}: expected logits as a tensor, or an output with 'logits', got {given}"
            )
        return logits


def shown_two(network: nn.Module, shape: tuple[int, int, int], *, what: str) -> Output:
    """What a network makes of two black images of ``shape`` (H, W, C), in evaluation mode.

    Images that it cannot take are named, with its own error.
    """
    height, width, channels = shape
    some = next(network.parameters(), torch.empty(0))
    images, training = torch.zeros(2, channels, height, width, device=some.device), network.training
    try:
        return network.eval()(images)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise InputError(
            f"{what}: fails on images of the data, (B, C, H, W) = (2, {channels}, {height}, "
            f"{width}): {error}"
        ) from error
    finally:
        network.train(training)


def _keeper(path: str, tapped: Kept):
    def keep(module, arguments, *results):
        (kept,) = results or arguments[:1]
        if not isinstance(kept, Tensor):
            raise InputError(f"module {path!r}: expected a tensor, got {type(kept)}")
        tapped[path] = kept, kept._version

    return keep


def _sparer(tapped: Kept):
    def spare(module, arguments):
        if any(x is kept for x in arguments for kept, _ in tapped.values()):
            return tuple(x.clone() for x in arguments)
        return None

    return spare


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
