# SPDX-License-Identifier: Apache-2.0
"""``kdkernels train``: options from a config file and from the command line, which wins."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from jsonargparse import ActionConfigFile, ArgumentParser

from kdkernels.train import experiment, report
from kdkernels.train.claim import recorded
from kdkernels.train.config import Config, option
from kdkernels.train.errors import InputError, TrainError
from kdkernels.train.methods import METHODS
from kdkernels.train.options import Parameter, parameters

PROGRAM = "kdkernels train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kdkernels train`` and return its exit status."""
    # jsonargparse lets the later of two values win: the config file goes first.
    early = argparse.ArgumentParser(PROGRAM, add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    found, rest = early.parse_known_args(argv)
    early.add_argument("--out")
    early.add_argument("--resume", action="store_true")
    run = early.parse_known_args(rest)[0]
    try:
        parser = make_parser()
        if run.resume and not found.config and rest == ["--resume"]:
            raise InputError("--resume: expected --out, or the options that the run was given")
        if run.resume and run.out:
            parser.set_defaults(defaults_of(Path(run.out)))
        file = ["--config", found.config] if found.config else []
        if file:  # alone first, for errors that are its own
            parser.where = f"{found.config}: "
            parser.parse_args(file)
            parser.where = ""
        config, options = split(vars(parser.parse_args(file + rest).as_flat()))
        results = experiment.run(config, options)
    except (TrainError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same options and --resume go on", file=sys.stderr)
        return 130
    name = f"{config.method} {config.student}"
    seeds = f"seed{'s' * (len(config.seed) > 1)} {', '.join(map(str, config.seed))}"
    summary = results["summary"]
    if teacher := results.get("teacher"):
        summary |= {"teacher.accuracy": {"mean": teacher["test"]["accuracy"], "std": None}}
    title = f"{config.data}, {seeds}"
    report.console.print(report.table(title, {name: summary}, results["images"]))
    report.say(*report.closing(results))
    return 0


def defaults_of(out: Path) -> dict[str, Any]:
    """The options that the run in ``out`` was started with."""
    record = recorded(out)
    known = {parameter.name for parameter in parameters(Config)}
    return {name: value for name, value in record.items() if name in known} | record["options"]


class Parser(ArgumentParser):
    """A parser whose errors are a line or two that name the option, without the usage of all.

    They begin with ``where`` the options are read from.
    """

    where = ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, with the nearest names for one that is not known."""
        text = re.sub(r'Parser key "([\w.]+)":', lambda key: option(key[1]) + ":", message)
        # An option that may be left out is to jsonargparse a union with None.
        text = re.sub(
            r"Does not validate .*?- (Expected a [^\n]*)\n.*Given value: ",
            r"\1. Got value: ",
            text,
            flags=re.DOTALL,
        )
        text = re.sub(r"Expected a <class '(\w+)'>", r"expected \1", text)
        text = re.sub(r"Expected a typing.Literal\[(.*?)\]", r"expected one of \1", text)
        text = text.replace(". Got value: ", ", got ")
        unknown = re.search(r"unrecognized arguments: (\S+)|Option '(.*?)' is not accepted", text)
        if unknown:
            name = option((unknown[1] or unknown[2]).lstrip("-").partition("=")[0])
            known = [text for action in self._actions for text in action.option_strings]
            near = difflib.get_close_matches(name, known, 3)
            text += f"; the nearest are {', '.join(near)}" if near else ""
        self.exit(
            2, f"{PROGRAM}: {self.where}{' '.join(text.split())} (--help lists the options)\n"
        )


def make_parser() -> Parser:
    """The options of :class:`Config`, then those of every method."""
    parser = Parser(
        prog=PROGRAM,
        description=inspect.getdoc(Config).splitlines()[0],
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file with these options as keys."
    )
    for parameter in parameters(Config):
        settings = {"type": parameter.type, "default": parameter.default, "help": parameter.help}
        if parameter.type is bool:
            del settings["type"]
            settings["action"] = "store_true"
        elif parameter.name == "seed":
            settings |= {"type": int, "nargs": "+", "default": list(parameter.default)}
        parser.add_argument(option(parameter.name), **settings)
    # Methods share names (temperature) with defaults of their own, so None stands for "not given".
    users: dict[str, list[tuple[str, Parameter]]] = {}
    for method, kind in METHODS.items():
        for parameter in parameters(kind):
            users.setdefault(parameter.name, []).append((method, parameter))
    group = parser.add_argument_group("options of methods")
    for name, uses in users.items():
        first = uses[0][1]
        settings = {"type": first.type | None}
        if lists := [kind for kind in get_args(first.type) if get_origin(kind) is list]:
            settings = {"type": get_args(lists[0])[0], "nargs": "+"}
        group.add_argument(option(name), **settings, help=explained(name, uses))
        if len(uses) > 1:
            for method, _ in uses:
                own = option(f"{method}.{name}")
                group.add_argument(own, **settings, help=argparse.SUPPRESS)
    return parser


def explained(name: str, uses: Sequence[tuple[str, Parameter]]) -> str:
    """The help of an option of methods: what it means to each, and its defaults."""
    meanings: dict[str, list[tuple[str, Any]]] = {}
    for method, parameter in uses:
        meanings.setdefault(parameter.help, []).append((method, parameter.default))
    lines = []
    for meaning, users in meanings.items():
        whose = f"{', '.join(method for method, _ in users)}: " if len(meanings) > 1 else ""
        defaults = ", ".join(f"{method}: {default}" for method, default in users)
        lines.append(f"{whose}{meaning} Default for {defaults}.")
    if len(uses) > 1:
        own = ", ".join(option(f"{method}.{name}") for method, _ in uses)
        lines.append(f"Of one of several methods: {own}.")
    return " ".join(lines)


def split(arguments: dict[str, Any]) -> tuple[Config, dict[str, Any]]:
    """The run's config and the options given for its method."""
    arguments = {name: value for name, value in arguments.items() if name != "config"}
    common = {parameter.name: arguments.pop(parameter.name) for parameter in parameters(Config)}
    config = Config(**common | {"seed": tuple(common["seed"])})
    return config, {name: value for name, value in arguments.items() if value is not None}
