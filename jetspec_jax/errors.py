"""The exceptions that a user is meant to read, and how they show values."""

from __future__ import annotations

from typing import Any


class JetSpecError(ValueError):
    """Something the user gave is wrong: the message names the offender and the remedy.

    The command-line tools print it as one line and exit with status 2; a traceback means a defect of ours.
    """


class DamagedError(JetSpecError):
    """What this project wrote was changed or truncated since."""


def shown(value: Any) -> str:
    """A value in at most 80 characters, however large it is."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of more than 4300 digits
        return f"a value of type {type(value).__name__} with too many digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
