# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: taken by one run, given back by one that comes to nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lightning_fabric import Fabric

from kdkernels.train import checkpoint
from kdkernels.train.devices import on_first
from kdkernels.train.errors import InputError, TrainError


@contextmanager
def claimed(
    fabric: Fabric, out: Path, record: dict[str, Any], options: Mapping[str, Any], *, resume: bool
) -> Iterator[None]:
    """:func:`claim` ``out``; it is free again if the run fails before its first checkpoint."""
    on_first(fabric, partial(claim, out, record, options, resume=resume))
    try:
        yield
    except TrainError:
        if fabric.is_global_zero and not resume and not any(out.rglob("checkpoint.pt")):
            shutil.rmtree(out)
        raise


def claim(out: Path, record: dict[str, Any], options: Mapping[str, Any], *, resume: bool) -> None:
    """Take ``out`` for the run that ``record`` describes; never a folder that holds another.

    ``options`` are those given for the method, without the defaults that ``record`` has.
    """
    check(out, record, resume=resume)
    if not resume:
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_json(out / "config.json", record | {"options": options})


def require_free(out: Path) -> None:
    """Refuse a folder with something in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: not empty; give another folder, or --resume to go on")


def check(out: Path, record: dict[str, Any], *, resume: bool) -> None:
    """Refuse what :func:`claim` would, without taking ``out``: before images are read, say."""
    if not resume:
        require_free(out)
        return
    before = recorded(out)
    del before["options"]
    keys = sorted(
        key for key in before.keys() | record.keys() if before.get(key) != record.get(key)
    )
    if keys:
        changes = ", ".join(f"{key} was {before.get(key)}, is {record.get(key)}" for key in keys)
        raise InputError(f"--resume: {out} was started with other options: {changes}")


def recorded(out: Path) -> dict[str, Any]:
    """What :func:`claim` wrote about the run in ``out``."""
    path = out / "config.json"
    if not path.exists():
        raise InputError(f"--resume: no run to go on with in {out} ({path.name} is missing)")
    return {"options": {}} | checkpoint.read_json(path)
