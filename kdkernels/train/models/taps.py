# SPDX-License-Identifier: Apache-2.0
"""Features by name, the same way in this package's networks, timm's and a user's own.

A *tap* is the path of a module, as in ``named_modules()``, and means its output: ``"stages.1"``,
``"layer3.0.conv2"``. With ``":input"`` behind it, it means what the module takes: the features
before an activation are ``"layer3.1.relu:input"``, the pooled features ``"classifier:input"``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from kdkernels.train.errors import InputError

INPUT = "input"


class Taps(NamedTuple):
    """The usual places of a network, as taps; what does not exist is None or empty.

    ``stages`` are the outputs of its stages as the literature takes them: after the activation
    in networks that end a stage with one, the bare sum in pre-activation networks and MobileNetV2.
    ``preactivations`` are the same features before the activation that follows, stage by stage.
    """

    stem: str | None
    stages: tuple[str, ...]
    preactivations: tuple[str, ...]
    pooled: str
    classifier: str


def usual_taps(model: nn.Module) -> Taps:
    """The usual places of this package's networks, of timm's and of any with a ``taps`` like these.

    timm's are those of its ``feature_info``; it does not tell where pre-activations are.
    """
    if isinstance(taps := getattr(model, "taps", None), Taps):
        return taps
    try:
        stages = tuple(info["module"] for info in model.feature_info)
        classifier = model.default_cfg["classifier"]
        classifier = classifier if isinstance(classifier, str) else classifier[0]
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(
            f"{type(model).__name__}: has neither taps nor timm's feature_info; name its modules"
        ) from error
    return Taps(None, stages, (), f"{classifier}:{INPUT}", classifier)


def find(model: nn.Module, tap: str) -> tuple[nn.Module, bool]:
    """The module of a tap, and whether its input is meant."""
    path, colon, side = tap.partition(":")
    modules = dict(model.named_modules(remove_duplicate=False))
    if colon and side != INPUT:
        raise InputError(f"tap {tap!r}: expected a module's path or <path>:{INPUT}")
    if not path or path not in modules:
        near = difflib.get_close_matches(path, modules, n=5, cutoff=0.3)
        raise InputError(
            f"tap {tap!r}: {type(model).__name__} has no module {path!r}; "
            f"nearest: {', '.join(near) or 'none'}"
        )
    return modules[path], bool(colon)


class Recorder:
    """Keeps what flows through taps: run the model, then :meth:`read`.

    Modules that would work in place are told not to (their ``inplace`` is cleared, for good): they
    would change features after they were kept, and features before a ReLU would be those behind it.
    """

    def __init__(self, model: nn.Module, taps: Iterable[str]) -> None:
        self._kept: dict[str, tuple[Tensor, int]] = {}
        self._handles = []
        self.taps = tuple(dict.fromkeys(taps))
        for tap in self.taps:
            module, before = find(model, tap)
            hook = self._input_hook(tap) if before else self._output_hook(tap)
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            self._handles.append(register(hook))
        for module in model.modules():
            if getattr(module, "inplace", False):
                module.inplace = False

    def read(self) -> dict[str, Tensor]:
        """The features of the last forward pass by tap; they are handed over once."""
        kept, self._kept = self._kept, {}
        for tap in self.taps:
            if tap not in kept:
                raise InputError(f"tap {tap!r}: the forward pass did not call this module")
            features, version = kept[tap]
            if version != _version(features):
                raise InputError(
                    f"tap {tap!r}: the model changes these features in place after this module; "
                    f"tap the module that does"
                )
        return {tap: kept[tap][0] for tap in self.taps}

    def remove(self) -> None:
        """Leave the model without hooks."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _input_hook(self, tap: str):
        return lambda module, arguments: self._keep(tap, arguments[0] if arguments else None)

    def _output_hook(self, tap: str):
        return lambda module, arguments, output: self._keep(tap, output)

    def _keep(self, tap: str, features: object) -> None:
        if not isinstance(features, Tensor):
            raise InputError(f"tap {tap!r}: expected a tensor, got {type(features).__name__}")
        self._kept[tap] = features, _version(features)


def _version(features: Tensor) -> int:
    # Inference tensors do not count changes.
    return 0 if features.is_inference() else features._version
