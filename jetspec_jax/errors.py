"""The exceptions that a user is meant to read, and how they show values."""

from __future__ import annotations

from typing import Any


class JetSpecError(ValueError):
    """Something the user gave is wrong: the message names the offender and the remedy.

    The command-line tools print it as one line and exit with status 2; a traceback means a defect of ours.
    """


class DamagedError(JetSpecError):
    """What this project wrote was changed or truncated since.

    Attributes:
        what: the message without the remedy.
    """

    def __init__(self, what: str, remedy: str = "convert the original weights again") -> None:
        super().__init__(f"{what}; {remedy}")
        self.what = what


def shown(value: Any) -> str:
    """A value as messages show it: in at most 80 characters of one line."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # an integer of more digits than Python prints, a list in a thousand lists
        text = f"{type(value).__name__} too large to be printed"
    return text if len(text) <= 80 else f"{text[:77]}..."


def first_line(error: BaseException) -> str:
    """An exception's message in at most 300 characters of one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].encode(errors="backslashreplace").decode()
