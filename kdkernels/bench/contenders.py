# SPDX-License-Identifier: Apache-2.0
"""Who is compared: the suites' eager formulation, that compiled, our backends, other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kdkernels import backends
from kdkernels.testing import Loss

Call = Callable[[Mapping[str, Tensor]], Tensor]

BASELINES = ("eager", "compile")
BACKENDS = ("reference", "cpu", "triton", "cuda")


def contenders(
    loss: Loss, device_type: str, wanted: Iterable[str] | None = None
) -> tuple[dict[str, Call], dict[str, str]]:
    """What can compute ``loss`` on a device type, baselines first; and who cannot, and why.

    ``wanted`` names our backends; by default those that ``auto`` tries.
    """
    # Earlier shapes would make the compiler generalise, and its kernels slower.
    torch._dynamo.reset()
    compiled = torch.compile(loss.eager, fullgraph=True, dynamic=False)
    calls: dict[str, Call] = {
        "eager": lambda inputs: loss.eager(**inputs, **loss.hyper),
        "compile": lambda inputs: compiled(**inputs, **loss.hyper),
    }
    for name, function in loss.others.items():
        calls[name] = lambda inputs, function=function: function(**inputs, **loss.hyper)
    skipped = {}
    for backend in wanted or backends.AUTO_ORDER[device_type]:
        ok, reason = backends.verdict(loss.family, backend, device_type)
        if ok:
            calls[backend] = _ours(loss, backend)
        else:
            skipped[backend] = reason
    if device_type == "cuda":
        for name, adapter in PEERS.items():
            try:
                calls[name] = adapter(loss)
            except (ImportError, NotImplementedError) as error:
                skipped[name] = str(error)
    return calls, skipped


def _ours(loss: Loss, backend: str) -> Call:
    return lambda inputs: loss.function(**inputs, **loss.hyper, backend=backend)


def _liger(loss: Loss) -> Call:
    """Liger's divergences start from (log-)probabilities, which eager softmaxes provide."""
    from liger_kernel.transformers import LigerJSD, LigerKLDIVLoss, LigerTVDLoss

    temperature = loss.hyper["temperature"]
    log, plain = F.log_softmax, F.softmax
    known = {
        "kl_div": (LigerKLDIVLoss(reduction="batchmean"), log, plain),
        "reverse_kl_div": (LigerJSD(beta=1.0), log, log),
        "js_div": (LigerJSD(beta=loss.hyper.get("beta", 0.5)), log, log),
        "tv_distance": (LigerTVDLoss(reduction="batchmean"), plain, plain),
    }
    if loss.name not in known:
        raise NotImplementedError("has no such loss on logits")
    module, of_student, of_teacher = known[loss.name]

    def call(inputs):
        student = of_student(inputs["student"] / temperature, -1)
        teacher = of_teacher(inputs["teacher"] / temperature, -1)
        return module(student, teacher) * temperature**2

    return call


def _takes_hidden_states(loss: Loss) -> Call:
    raise NotImplementedError("takes hidden states and the head's weight, not logits")


def _cross_entropy_only(loss: Loss) -> Call:
    raise NotImplementedError("has the cross-entropy alone, and no loss between two rows of logits")


PEERS: dict[str, Callable[[Loss], Call]] = {
    "liger-kernel": _liger,
    "orda-kernel": _takes_hidden_states,
    "fla-core": _takes_hidden_states,
    "quack-kernels": _cross_entropy_only,
}
