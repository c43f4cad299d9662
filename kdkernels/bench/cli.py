# SPDX-License-Identifier: Apache-2.0
"""The command line of ``kdkernels bench``."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from kdkernels import checks
from kdkernels.bench import report
from kdkernels.bench.contenders import BACKENDS
from kdkernels.bench.rows import DTYPES, HOST_SHAPE, NEAR_ZERO, Case, Settings, run
from kdkernels.testing import LOSSES

# The losses of which one says how far off they are near zero: they are 0 for identical logits.
DIVERGENCES = {name: loss for name, loss in LOSSES.items() if loss.divergence and loss.by_row}


def _one_of(known: Iterable[str], what: str) -> Callable[[str], str]:
    def one(name: str) -> str:
        if name in known:
            return name
        near = difflib.get_close_matches(name, known, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise argparse.ArgumentTypeError(f"{name!r} is no {what} here; {hint}")

    return one


def _at_least(low: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        if not (text.isdecimal() and int(text) >= low):
            raise argparse.ArgumentTypeError(f"must be an integer of at least {low}, got {text}")
        return int(text)

    return integer


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        "kdkernels bench",
        description="Time forward and backward of the losses against their eager formulation and "
        "torch.compile of it (and, on a GPU, other packages), all in turns in this process. "
        "Ratios are to the better of the two; errors to the reference in fp64; bytes are those of "
        "reading every input and writing the gradient once.",
    )
    add = result.add_argument
    add("--losses", nargs="+", default=["kl_div", "kd_loss"],
        type=_one_of([*LOSSES, "all"], "loss"), metavar="LOSS",
        help=f"'all', or of: {', '.join(LOSSES)}")  # fmt: skip
    add("--shapes", nargs="+", metavar="SHAPE",
        help="the loss's named shapes (default: all of them), or sizes such as 64x100")  # fmt: skip
    add("--dtype", nargs="+", default=["fp32"], choices=DTYPES)
    add("--backends", nargs="+", choices=BACKENDS, help="default: those that auto tries")
    add("--upstream", nargs="+", type=float, default=[1.0], help="upstream gradients")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--threads", type=_at_least(1), help="of torch's CPU pool")
    add("--seconds", type=float, default=0.5, help="per case and upstream gradient")
    add("--repeats", type=_at_least(2), default=7, help="rounds, at least")
    add("--near-zero", nargs="*", default=[], type=_one_of(DIVERGENCES, "divergence of rows"),
        metavar="LOSS", help="also the error of these divergences, in fp32, at values "
        f"{', '.join(map(str, NEAR_ZERO))}")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    return result


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    losses = list(LOSSES) if "all" in arguments.losses else arguments.losses
    cases = [
        Case(name, shape, dtype)
        for name in losses
        for shape in arguments.shapes
        or [*(HOST_SHAPE if len(LOSSES[name].small) == 2 else ()), *LOSSES[name].shapes]
        for dtype in arguments.dtype
    ]
    settings = Settings(
        device=arguments.device,
        backends=tuple(arguments.backends) if arguments.backends else None,
        upstreams=tuple(arguments.upstream),
        seconds=arguments.seconds,
        rounds=arguments.repeats,
    )
    try:
        checks.device("bench", settings.device)
        for case in cases:
            case.size()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    result = run(
        cases,
        settings,
        near_zero=arguments.near_zero,
        progress=lambda result: report.show(result["rows"][-1]),
    )
    report.show_legend()
    report.show_near_zero(result["near_zero"])
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0
