# SPDX-License-Identifier: Apache-2.0
"""Rules that several losses share, in what ``help()`` shows of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable


def share(text: str | None, *functions: Callable) -> None:
    """Append ``text``, which a module states once, to the docstring of each of ``functions``."""
    for function in functions:
        if text and function.__doc__:  # neither under python -OO
            function.__doc__ = f"{inspect.cleandoc(function.__doc__)}\n\n{inspect.cleandoc(text)}"
