# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can put right; the command line prints them without a traceback."""

from __future__ import annotations


class TrainError(Exception):
    """A training run cannot start or go on."""


class InputError(TrainError, ValueError):
    """An option, data set or file that cannot be used: its name, what was expected, what came."""


class DivergedError(TrainError):
    """A loss term stopped being finite; what was checkpointed before is kept."""
