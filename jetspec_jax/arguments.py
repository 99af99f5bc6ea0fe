"""What users write on a command line: every mistake in it is one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jetspec_jax.errors import JetSpecError

MAX_DIGITS = 18


class Parser(argparse.ArgumentParser):
    """Raises JetSpecError, where argparse prints how the program is used too and ends it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        raise JetSpecError(f"{one_line(message)[:300]} (--help lists all options)")


def integer(text: str) -> int:
    """An option's value of at most `MAX_DIGITS` digits: Python prints no number of more than 4,300."""
    try:
        if len(text) <= MAX_DIGITS:
            return int(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number of at most {MAX_DIGITS} digits")


def within(least: int, most: int) -> Callable[[str], int]:
    """The type of an option whose value is a whole number from `least` to `most`."""
    def read(text: str) -> int:
        value = integer(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not from {least} to {most}")
        return value

    return read


seed = within(0, 2**32 - 1)


def number(text: str) -> float:
    """An option's value that is finite."""
    try:
        if math.isfinite(value := float(text)):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text[:40]!r} is no finite number")


def utf8(text: str) -> str:
    """An option's text: what the terminal sent in another encoding has become half characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"the terminal sent text that is not UTF-8, at character {error.start}: set "
                                         "its encoding, or put the text into a file") from error
    return text


def user_path(text: str) -> Path:
    """An option's file or folder, "~" being the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path names no file: write one out")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # ~nobody
        raise argparse.ArgumentTypeError(f"{text[:100]}: {str(error).rstrip('.')}: write the path out") from error


def one_line(message: object) -> str:
    """A message without line breaks, which it may have from a user's names."""
    return " ".join(str(message).split())
