"""Errors that a user sees.

A `TrilemmaError` is a user's mistake or a broken input, never a bug of ours: the command line prints its text without a
traceback and exits with code 2. The text says what, where (file and line), the nearest valid name, and how to mend it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrilemmaError(Exception):
    """Base of every user-facing error."""

    exit_code = 2


class ConfigError(TrilemmaError):
    """A configuration names an unknown key or holds a value that cannot be used."""


class DataError(TrilemmaError):
    """A data file is missing, empty, misaligned or not valid text."""


class CapabilityError(TrilemmaError):
    """A mixer, layout or run is asked for something that it declares it cannot do."""


class CheckpointError(TrilemmaError):
    """A run, checkpoint or saved state is missing, truncated, altered or foreign."""


class RunInUseError(TrilemmaError):
    """Another process holds the run directory."""


class LengthError(TrilemmaError):
    """A sequence is longer than the model's positions or the reserved capacity."""


class LawError(TrilemmaError):
    """A path without a law record is asked to run, or a law does not hold."""


class BackendError(TrilemmaError):
    """A backend cannot serve: not installed, another device or type, or another answer than our own form's."""


class TrainingError(TrilemmaError):
    """Training cannot go on: the loss or a gradient is not a number, in this step."""

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class Interrupted(TrilemmaError):
    """A signal ended training after its state was saved; the exit code is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def nearest(name: str, valid: Iterable[str]) -> str:
    """`'; did you mean "x"?'` for the closest valid name, else the list of valid names."""
    names = sorted(set(valid))
    by_case = {valid_name.lower(): valid_name for valid_name in names}
    close = difflib.get_close_matches(name.lower(), by_case, n=1, cutoff=0.6)
    if close:
        return f'; did you mean "{by_case[close[0]]}"?'
    return f"; valid: {', '.join(names)}" if names else ""
