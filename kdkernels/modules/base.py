# SPDX-License-Identifier: Apache-2.0
"""A loss function with its keyword arguments held, as a ``torch.nn.Module``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from kdkernels import checks
from kdkernels.functional import rules


def embedded(name: str, argument: str, value, layer: nn.Linear) -> Tensor:
    """Features (B, ...), flattened, through a linear layer."""
    checks.floats(name, argument, value)
    if value.dim() < 2 or value.shape[1:].numel() != layer.in_features:
        raise ValueError(
            f"{name}: {argument} must have shape (B, ...) with {layer.in_features} features a "
            f"sample, got {tuple(value.shape)}."
        )
    return layer(value.flatten(1))


class LossModule(nn.Module):
    """Base of the modules: a subclass names a function of ``kdkernels.functional``.

    The constructor takes that function's keyword-only arguments, with its defaults, less those that
    ``forward`` takes: signature, values and messages have one source. A subclass that has more of
    its own puts them first, and hands the rest on as ``**held``. What is held is an attribute
    and may be changed between calls; an ``nn.Parameter`` is registered as one (and learned), any
    other tensor as a buffer.
    """

    _function: Callable[..., Tensor]
    __signature__: inspect.Signature
    _held: inspect.Signature

    def __init_subclass__(cls, function: Callable[..., Tensor] | None = None, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if function is not None:
            cls._function = staticmethod(function)
            explained = inspect.cleandoc(function.__doc__ or "")
            rules.share(explained and f"In the words of the function:\n\n{explained}", cls)
            per_call = inspect.signature(cls.forward).parameters
            held = [
                parameter
                for name, parameter in inspect.signature(function).parameters.items()
                if parameter.kind is parameter.KEYWORD_ONLY and name not in per_call
            ]
            cls._held = inspect.Signature(held)
            _, *own = inspect.signature(cls.__init__).parameters.values()
            own = [p for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
            cls.__signature__ = inspect.Signature([*own, *held])

    def __init__(self, *args: Any, **held: Any) -> None:
        super().__init__()
        try:
            bound = self._held.bind(*args, **held)
        except TypeError as error:
            raise TypeError(
                f"{type(self).__name__}: {error}; expected the keyword arguments "
                f"{', '.join(self._held.parameters)}."
            ) from None
        bound.apply_defaults()
        self._check(bound.arguments)
        for name, value in bound.arguments.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def _check(self, held: Mapping[str, Any]) -> None:
        """Raise for hyperparameters that no call could be made with."""

    def _call(self, *args: Tensor, **per_call: Tensor | None) -> Tensor:
        held = {name: getattr(self, name) for name in self._held.parameters}
        return self._function(*args, **per_call, **held)

    def extra_repr(self) -> str:
        """What differs from the defaults, as one would write it to make the module again."""
        shown = []
        for name, parameter in self._held.parameters.items():
            value = getattr(self, name)
            if isinstance(value, Tensor):
                what = "learned" if isinstance(value, nn.Parameter) else "tensor"
                shown.append(f"{name}=<{what}, shape {tuple(value.shape)}>")
            elif value != parameter.default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)
