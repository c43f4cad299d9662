# SPDX-License-Identifier: Apache-2.0
"""What is installed here, what can run, and whether it computes the right numbers."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import textwrap
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

import kdkernels
from kdkernels import backends, checks, ops, testing

_ENVIRONMENT = (
    "KDKERNELS_BACKEND", "KDKERNELS_CHECK", "KDKERNELS_CPU_CAPABILITY", "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)  # fmt: skip

_NEEDED_BY = {"_native": "; kdkernels.numpy needs it, and nothing else does"}


def _version(package: str) -> str | None:
    if importlib.util.find_spec(package) is None:
        return None
    return getattr(importlib.import_module(package), "__version__", "unknown")


def _build() -> dict[str, Any]:
    path = Path(kdkernels.__file__).with_name("_build.json")
    if not path.exists():
        return {"extensions": {}, "note": "no build record: the package runs from its sources"}
    return json.loads(path.read_text())


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")


def info() -> dict[str, Any]:
    """Versions, build, devices, and for every family of losses which backends run it and why not.

    Plain data, as ``kdkernels info --json`` prints it and as benchmark results record it.
    """
    build = _build()
    native = importlib.util.find_spec("kdkernels._native") and importlib.import_module(
        "kdkernels._native"
    )
    families = {}
    for loss in testing.LOSSES.values():
        families.setdefault(loss.family, []).append(loss.name)
    families = dict(sorted(families.items()))
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "kdkernels": kdkernels.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "build": build,
        "cpu": {
            "model": _cpu_model(),
            "threads": torch.get_num_threads(),
            "isa": native.isa() if native else None,
            "isa_levels": build.get("isa_levels", []) if native or ops.loaded("_C_cpu") else [],
        },
        "gpus": [
            {
                "name": torch.cuda.get_device_name(i),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(i))),
            }
            for i in range(torch.cuda.device_count())
        ],
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "losses": families,
        "backends": {
            family: {
                device: {
                    "auto": backends.auto(family, device)[0],
                    **{
                        backend: backends.verdict(family, backend, device)._asdict()
                        for backend in backends.BACKENDS[1:]
                    },
                }
                for device in devices
            }
            for family in families
        },
    }


def format_info(data: dict[str, Any]) -> str:
    """``info()`` for reading."""
    build, cpu = data["build"], data["cpu"]
    # Which of its levels runs, _native alone can tell; _C_cpu chooses by the same rule.
    isa = cpu["isa"] or ", ".join(cpu["isa_levels"]) or "none"
    lines = [
        f"kdkernels {data['kdkernels']}",
        f"  python {data['python']}, torch {data['torch']}, triton {data['triton'] or '-'}",
        f"  {data['platform']}",
        f"  cpu: {cpu['model']}, {cpu['threads']} threads, kernels for {isa}",
        *(f"  gpu: {gpu['name']} ({gpu['capability']})" for gpu in data["gpus"]),
        f"  built with torch {build.get('torch', '-')}, {build.get('compiler', 'no compiler')}",
        *(
            f"  {name}: {state}" + _NEEDED_BY.get(name, "") * (state != "built")
            for name, state in build["extensions"].items()
        ),
        *(f"  {name}={value}" for name, value in data["environment"].items()),
    ]
    for device in next(iter(data["backends"].values())):
        lines += _format_backends(data, device)
    return "\n".join(lines)


def _format_backends(data: dict[str, Any], device: str) -> list[str]:
    """What runs on a device: what most families say of a backend, then whatever differs from it."""
    by_family = {family: verdicts[device] for family, verdicts in data["backends"].items()}
    usual, lines = {}, [f"backends on {device}"]
    for backend in backends.BACKENDS[1:]:
        found = [(v[backend]["ok"], v[backend]["reason"]) for v in by_family.values()]
        usual[backend] = ok, reason = Counter(found).most_common(1)[0][0]
        lines.append(f"  {backend:<10}{'yes' if ok else 'no '} {reason}")
    lines.append(f"losses on {device}, and where it is not as above")
    for family, verdicts in by_family.items():
        lines.append(f"  {family}: auto is {verdicts['auto']}")
        losses = ", ".join(data["losses"][family])
        lines += textwrap.wrap(losses, 96, initial_indent="    of ", subsequent_indent="       ")
        own = {backend: (verdicts[backend]["ok"], verdicts[backend]["reason"]) for backend in usual}
        differing = [backend for backend in usual if own[backend] != usual[backend]]
        for (ok, reason), group in groupby(differing, own.get):
            lines.append(f"    {', '.join(group)}: {'yes' if ok else 'no'}, {reason}")
    return lines


def check(device: str | None = None) -> dict[str, dict[str, str | None]]:
    """Compare every loss and its gradients with the reference in fp64, on each backend here.

    Returns, by loss and backend, what is wrong, or None. Takes a few seconds. ``device`` is
    ``"cpu"`` or ``"cuda"``, the GPU if there is one by default; ``ValueError`` for one that is not.
    """
    device = checks.device("check", device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return {
        loss.name: {
            backend: _deviation(loss, backend, device) for backend in loss.backends(device.type)
        }
        for loss in testing.LOSSES.values()
    }


def _deviation(loss: testing.Loss, backend: str, device: torch.device) -> str | None:
    for dtype in (torch.float32, torch.bfloat16):
        inputs = loss.inputs(*loss.small, dtype=dtype, device=device, requires_grad=True)
        wide = testing.leaves(inputs, torch.float64)
        plain = testing.leaves(inputs)
        try:
            kernel = loss(inputs, backend=backend)
            oracle = loss(wide, backend="reference")
            eager = loss.eager(**plain, **loss.hyper)
            testing.assert_close_to_oracle(kernel, eager, oracle, f"loss in {dtype}")
            sides = testing.gradients(kernel, inputs), testing.gradients(eager, plain)
            for name, gradient in testing.gradients(oracle, wide).items():
                testing.assert_close_to_oracle(
                    sides[0][name], sides[1][name], gradient, f"gradient to {name} in {dtype}"
                )
        except (AssertionError, RuntimeError) as error:
            return str(error)
    return None
