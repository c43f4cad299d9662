# SPDX-License-Identifier: Apache-2.0
"""The parts of README that results are written into."""

from __future__ import annotations


def rewritten(readme: str, name: str, content: str) -> str:
    """``readme`` with ``content`` between the markers of ``name``."""
    first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, begin, rest = readme.partition(first)
    _, end, tail = rest.partition(last)
    if not (begin and end):
        raise SystemExit(f"README.md needs the markers {first} and {last}")
    return f"{head}{first}\n{content}\n{last}{tail}"
