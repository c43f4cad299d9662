# SPDX-License-Identifier: Apache-2.0
"""Measures cases and puts the numbers of each next to what they should be compared with."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

import kdkernels
from kdkernels.bench import measure
from kdkernels.bench.contenders import BACKENDS, BASELINES, PEERS, Call, contenders
from kdkernels.testing import LOSSES, Loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# So small that nothing but the host's work per call is left.
HOST_SHAPE = {"host_8x10": (8, 10)}
NEAR_ZERO = (6e-3, 6e-5, 6e-7, 6e-9)


class Case(NamedTuple):
    loss: str
    shape: str  # a name of the registry, "host_8x10", or sizes such as "64x100"
    dtype: str = "fp32"

    def size(self) -> tuple[int, ...]:
        loss = LOSSES[self.loss]
        named = (HOST_SHAPE if len(loss.small) == 2 else {}) | dict(loss.shapes)
        if self.shape in named:
            return named[self.shape]
        dimensions = {len(loss.small), *map(len, named.values())}
        sizes = self.shape.split("x")
        if not all(size.isdecimal() and int(size) for size in sizes) or (
            len(sizes) not in dimensions
        ):
            raise ValueError(
                f"bench: shape of {self.loss} must be one of {', '.join(named)}, or sizes such as "
                f"{'x'.join(map(str, loss.small))}; got {self.shape!r}."
            )
        return tuple(map(int, sizes))


@dataclass(frozen=True)
class Settings:
    device: str = "cpu"
    backends: tuple[str, ...] | None = None
    upstreams: tuple[float, ...] = (1.0,)
    seconds: float = 0.5  # per case and upstream gradient, all contenders together
    rounds: int = 7  # at least, however long these take


def run(
    cases: Iterable[Case],
    settings: Settings,
    *,
    near_zero: Iterable[str] = (),
    progress: Callable[[dict], None] = lambda result: None,
    within: float | None = None,
) -> dict:
    """Rows for ``cases``, rows for the divergences in ``near_zero``, and the environment.

    ``progress`` is called after each row with what there is so far, the newest row last. No case
    is begun once ``within`` seconds are over; those left out are listed as ``not_run``.
    """
    deadline = time.monotonic() + (math.inf if within is None else within)
    result = {"environment": environment(settings), "rows": [], "near_zero": [], "not_run": []}
    for name in near_zero:
        result["near_zero"] += _near_zero_rows(name, settings)
    for case in cases:
        if time.monotonic() > deadline:
            result["not_run"].append(case._asdict())
            continue
        for row in _rows(case, settings):
            result["rows"].append(row)
            progress(result)
    return result


def _near_zero_rows(name: str, settings: Settings) -> Iterator[dict]:
    loss = dataclasses.replace(LOSSES[name], hyper=LOSSES[name].hyper | {"temperature": 1.0})
    calls, _ = contenders(loss, torch.device(settings.device).type, settings.backends)
    for target in NEAR_ZERO:
        yield {"loss": name, **measure.near_zero_errors(calls, loss, target, settings.device)}


def _rows(case: Case, settings: Settings) -> Iterator[dict]:
    """One row per upstream gradient."""
    loss, size, dtype, device = LOSSES[case.loss], case.size(), DTYPES[case.dtype], settings.device
    calls, skipped = contenders(loss, torch.device(device).type, settings.backends)

    @functools.cache
    def make(seed):
        return measure.make_inputs(loss, size, dtype, device, seed)

    def error(name, call):
        return measure.errors(call, *oracle)

    oracle = measure.oracle(loss, size, dtype, device)
    errors = _each(calls, skipped, error)
    oracle = None  # on a GPU the rest needs its room
    for upstream in settings.upstreams:
        row = {**case._asdict(), "size": list(size), "upstream": upstream}
        found = _measured(row, loss, calls, skipped, make, settings)
        row["contenders"] = {name: {**found[name], **errors.get(name, {})} for name in found}
        row["skipped"] = dict(skipped)
        compare(row)
        yield row


def _each(calls: dict[str, Call], skipped: dict[str, str], what: Callable) -> dict[str, dict]:
    """``what(name, call)`` for each; one that fails, say for memory, does not stop the others."""
    found = {}
    for name in list(calls):
        try:
            found[name] = what(name, calls[name])
        except RuntimeError as error:
            skipped[name] = measure.one_line(error)
            del calls[name]
    return found


def _measured(row: dict, loss: Loss, calls, skipped, make, settings: Settings) -> dict[str, dict]:
    """Memory and launches, and time, also of a copy; adds the sizes of the inputs to ``row``."""
    inputs = make(0)
    row["minimal_bytes"] = measure.minimal_bytes(inputs)
    row["gradient_bytes"] = inputs["student"].nbytes

    def counts(name, call):
        return _counts(loss, name, call, inputs, row["upstream"], settings.device)

    found = _each(calls, skipped, counts)
    times = {"cpu": measure.cpu_times, "cuda": measure.gpu_times}[
        torch.device(settings.device).type
    ]
    timed = times(calls, make, row["upstream"], settings.seconds, settings.rounds)
    return {name: {**values, **found.get(name, {})} for name, values in timed.items()}


def _counts(loss: Loss, name: str, call: Call, inputs, upstream: float, device: str) -> dict:
    step = measure.make_step(call, inputs, upstream)
    step()
    result = {"extra_bytes": measure.extra_bytes(step, device)}
    if torch.device(device).type == "cpu":
        result["resident_bytes"] = measure.resident_bytes(step)
    else:
        result["launches"] = measure.launches(step)
    takes_inplace = "inplace" in inspect.signature(loss.function).parameters
    if takes_inplace and name in BACKENDS and name != "reference":
        leaf = inputs["student"]
        given = {**inputs, **loss.hyper, "student": leaf.clone(), "backend": name, "inplace": True}
        result["inplace_extra_bytes"] = measure.extra_bytes(
            lambda: torch.autograd.grad(loss.function(**given), leaf), device
        )
    return result


def compare(row: dict) -> None:
    """Add to every contender its speed against the better baseline, the bus and a copy."""
    by_name = row["contenders"]
    names = (*BASELINES, *LOSSES[row["loss"]].others)
    baselines = [by_name[name]["seconds"] for name in names if name in by_name]
    for name, values in by_name.items():
        if baselines and name != "copy":
            values["speedup"] = min(baselines) / values["seconds"]
        values["gb_per_s"] = row["minimal_bytes"] / values["seconds"] / 1e9
        values["share_of_copy"] = by_name["copy"]["seconds"] / values["seconds"]


def environment(settings: Settings) -> dict:
    """What the numbers depend on."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **_commit(),
        "device": device_slug(settings.device),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "settings": dataclasses.asdict(settings),
        "peers": {name: _version(name) for name in PEERS},
        "info": kdkernels.info(),
    }


def device_slug(device: str) -> str:
    """Short name of the device for file names: "cpu-2core-avx512", "nvidia-h100-80gb-hbm3"."""
    if torch.device(device).type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    isa = torch.backends.cpu.get_cpu_capability().lower()
    return f"cpu-{len(os.sched_getaffinity(0))}core-{isa}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> dict:
    """The commit of the sources, where they are a git checkout."""

    def git(*arguments):
        done = subprocess.run(
            ["git", "-C", str(Path(kdkernels.__file__).parent), *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": None if changes is None else bool(changes),
        }
    except OSError:
        return {"commit": None, "dirty": None}
