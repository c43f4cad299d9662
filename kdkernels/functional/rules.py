# SPDX-License-Identifier: Apache-2.0
"""Rules that several losses share, in what ``help()`` shows of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable


def share(text: str | None, *losses: Callable) -> None:
    """Append ``text``, which is stated once elsewhere, to the docstring of each of ``losses``."""
    for loss in losses:
        if text and loss.__doc__:  # neither under python -OO
            loss.__doc__ = f"{inspect.cleandoc(loss.__doc__)}\n\n{inspect.cleandoc(text)}"
