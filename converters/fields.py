"""Fields of a config or header, read with errors that name the file, the field and the value."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jetspec_jax.config import MAX_INT, is_integer, is_within, range_of
from jetspec_jax.errors import JetSpecError, shown

MAX_NAME = 256  # characters


@dataclass(frozen=True)
class Fields:
    """What a file says, under its own names; null is the same as absent, and 0 is not.

    Attributes:
        file: in messages.
        values: by the full name of the field.
    """

    file: Path
    values: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """A value of any type; `default` where it is absent."""
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None, least: int = 1, most: int = MAX_INT) -> int:
        """An integer from `least` to `most`; without a default its absence is an error."""
        value = self._needed(name, default)
        if not is_integer(value) or not least <= value <= most:
            large = is_integer(value) and value > most
            raise self.error(name, f"must be an integer of at {f'most {most}' if large else f'least {least}'}")
        return int(value)

    def number(self, name: str, default: float | None = None, limits: tuple[float, float] = (-1e30, 1e30)) -> float:
        """A number within limits; without a default its absence is an error."""
        value = self._needed(name, default)
        if not is_within(value, limits):
            raise self.error(name, f"must be {range_of(limits)}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "must be true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string; without a default its absence is an error."""
        value = self._needed(name, default)
        if not isinstance(value, str):
            raise self.error(name, "must be a text")
        return value

    def integers(self, name: str) -> list[int]:
        """A list of integers; empty where it is absent."""
        value = self.get(name, [])
        if not isinstance(value, list) or not all(is_integer(i) for i in value):
            raise self.error(name, "must be a list of integers")
        return value

    def within(self, name: str) -> dict[str, Any]:
        """The object under a name; empty where it is absent."""
        value = self.get(name, {})
        if not isinstance(value, dict) or not all(map(is_plain, value)):
            raise self.error(name, "must be an object with plain names")
        return value

    def refuse(self, inactive: Mapping[str, tuple[Any, ...]], remedies: Mapping[str, str]) -> None:
        """Refuses what is not computed here.

        Args:
            inactive: the fields, each with the values besides null that leave its feature out.
            remedies: ends of their messages.
        """
        for name, values in inactive.items():
            if self.get(name) is not None and not is_one_of(self.get(name), values):
                only = f", only {' or '.join(map(json_like, values))}" if values else ""
                raise JetSpecError(f"{self.file}: {name} {shown(self.get(name))} is not supported{only}"
                                   f"{remedies.get(name, '')}")

    def error(self, name: str, message: str) -> JetSpecError:
        """An error about a field that is there."""
        return JetSpecError(f"{self.file}: {name} {message}, not {shown(self.get(name))}")

    def _needed(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            raise JetSpecError(f"{self.file} lacks {name!r}")
        return value


def is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a value is among others; true is not 1."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in values)


def json_like(value: Any) -> str:
    """A value as config files write it."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def is_plain(name: str) -> bool:
    """Whether a name that a file gives can stand in a message as it is: one line, not too long, and no halves of
    characters."""
    return 0 < len(name) <= MAX_NAME and name.isprintable()


@contextlib.contextmanager
def naming(file: Path | str) -> Iterator[None]:
    """Puts the file before what a description says of its own fields."""
    try:
        yield
    except JetSpecError as error:
        raise JetSpecError(f"{file}: {error}") from error
