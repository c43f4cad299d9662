# SPDX-License-Identifier: Apache-2.0
"""The options of methods: what each is, and whose a given one is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import docstring_parser

from kdkernels.train.config import Config, option
from kdkernels.train.errors import InputError
from kdkernels.train.methods import METHODS, Composite, Method


class Parameter(NamedTuple):
    """An argument of a class, as its signature and docstring have it."""

    name: str
    type: Any
    default: Any
    help: str


def parameters(kind: type) -> Iterator[Parameter]:
    """The arguments of a class with their help lines, which its docstring should have."""
    described = {
        entry.arg_name: " ".join(entry.description.split())
        for entry in docstring_parser.parse(inspect.getdoc(kind)).params
    }
    for name, parameter in inspect.signature(kind, eval_str=True).parameters.items():
        if kind is Config or name != "backend":
            yield Parameter(name, parameter.annotation, parameter.default, described.get(name, ""))


def make_method(name: str, backend: str, options: Mapping[str, Any]) -> Method:
    """The method called ``name``, or several joined by "+", with the options each of them has."""
    given = options_of(name, options)
    methods = {part: METHODS[part](**given[part], backend=backend) for part in given}
    return next(iter(methods.values())) if len(methods) == 1 else Composite(methods)


def options_of(name: str, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By the methods that ``name`` joins: those of ``options`` that each has.

    One that means the same to several goes to all of them; ``method.option`` is of that one only.
    """
    parts = name.split("+")
    for part in parts:
        if part not in METHODS:
            raise InputError(
                f"--method: expected one of {', '.join(METHODS)}, or several joined by +, got "
                f"{part!r}"
            )
    if len(set(parts)) < len(parts):
        raise InputError(f"--method {name}: expected each method once")
    meanings = {part: {own.name: own.help for own in parameters(METHODS[part])} for part in parts}
    given: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for key in sorted(options, key=lambda key: "." in key):  # the more special one wins
        only, _, own = key.rpartition(".")
        users = {
            part: known[own]
            for part, known in meanings.items()
            if own in known and only in ("", part)
        }
        if not users:
            every = sorted({own for known in meanings.values() for own in known})
            raise InputError(
                f"{option(key)}: not an option of --method {name}, which has "
                f"{', '.join(map(option, every)) or 'none'}"
            )
        if len(set(users.values())) > 1:
            each = "; ".join(f"--{user}.{own}: {meaning}" for user, meaning in users.items())
            raise InputError(f"{option(key)}: means different things; say whose. {each}")
        for user in users:
            given[user][own] = options[key]
    return given


def resolved_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method with the defaults filled in; of several, ``method.option``."""
    given = options_of(name, options)
    resolved = {}
    for part, own in given.items():
        arguments = inspect.signature(METHODS[part]).bind(**own)
        arguments.apply_defaults()
        prefix = f"{part}." if len(given) > 1 else ""
        resolved |= {
            prefix + key: value for key, value in arguments.arguments.items() if key != "backend"
        }
    return resolved
