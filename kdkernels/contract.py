# SPDX-License-Identifier: Apache-2.0
"""Whether a compiled extension and this Python belong together.

Schemas say what a kernel takes, not what its numbers mean: one left over from before a change of
meaning would run, and be wrong. So both sides state the contract they keep.
"""

from __future__ import annotations

from pathlib import Path

# Also in csrc/kd/contract.h: raise both when what kernels take, leave or save changes its meaning.
CONTRACT = 3


def breach(extension: str | Path) -> str | None:
    """What is wrong with a compiled extension, read before any of it runs; None if nothing is."""
    path = Path(extension)
    if b"kdkernels contract %d." % CONTRACT in path.read_bytes():
        return None
    return f"{path.name} was built from other sources than these: rebuild it (make install)"
