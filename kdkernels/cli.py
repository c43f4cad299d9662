# SPDX-License-Identifier: Apache-2.0
"""``kdkernels info | check | bench | train | report``."""

from __future__ import annotations

import argparse
import json
import os
import sys

from kdkernels import __version__

_COMMANDS = {
    "info": "versions, build, devices, and which backend runs what",
    "check": "compare every loss on this machine with the reference in fp64",
    "bench": "time the losses against eager and torch.compile",
    "train": "train a teacher and distill a student",
    "report": "write an HTML page about runs",
}


def _info(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("kdkernels info", description=_COMMANDS["info"])
    parser.add_argument("--json", action="store_true", help="print as JSON")
    arguments = parser.parse_args(argv)
    from kdkernels import diagnostics

    data = diagnostics.info()
    print(json.dumps(data, indent=1) if arguments.json else diagnostics.format_info(data))
    return 0


def _check(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("kdkernels check", description=_COMMANDS["check"])
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one by default")
    arguments = parser.parse_args(argv)
    from kdkernels import diagnostics

    try:
        found = diagnostics.check(arguments.device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for loss, by_backend in found.items():
        states = [
            f"{backend} {'ok' if not error else 'WRONG'}" for backend, error in by_backend.items()
        ]
        print(f"{loss:<26}{', '.join(states)}")
        for backend, error in by_backend.items():
            if error:
                print(f"  {backend}: {error}")
    wrong = sum(any(by_backend.values()) for by_backend in found.values())
    print(f"{len(found)} losses, {wrong} failed")
    return 1 if wrong else 0


def _bench(argv: list[str]) -> int:
    from kdkernels.bench import main

    return main(argv) or 0


def _train(argv: list[str]) -> int:
    try:
        from kdkernels.train.cli import main
    except ImportError as error:
        return _missing("train", error)
    return main(argv)


def _report(argv: list[str]) -> int:
    try:
        from kdkernels.train.report.cli import main
    except ImportError as error:
        return _missing("report", error)
    return main(argv)


def _missing(command: str, error: ImportError) -> int:
    print(
        f"kdkernels {command} needs the train extra (pip install 'kdkernels[train]'): {error}",
        file=sys.stderr,
    )
    return 1


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "kdkernels",
        description="Fused, exact distillation losses for PyTorch.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands:\n" + "\n".join(f"  {name:<7}{text}" for name, text in _COMMANDS.items()),
    )
    parser.add_argument("--version", action="version", version=f"kdkernels {__version__}")
    parser.add_argument("command", choices=_COMMANDS, help="see below; each has its own --help")
    if not argv:
        parser.print_help()
        return 0
    arguments = parser.parse_args(argv[:1])
    run = {"info": _info, "check": _check, "bench": _bench, "train": _train, "report": _report}
    return run[arguments.command](argv[1:])


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read along, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
