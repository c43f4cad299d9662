# SPDX-License-Identifier: Apache-2.0
"""Where a network has its features: the same names for this package's networks and timm's.

A *tap* is the path of a module, as in ``named_modules()``, and means its output: ``"stages.1"``,
``"layer3.0.conv2"``. With ``":input"`` behind it, it means what the module takes: the features
before an activation are ``"layer3.1.relu:input"``, the pooled features ``"classifier:input"``.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from kdkernels.train.errors import InputError


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
    return Taps(None, stages, (), f"{classifier}:input", classifier)
