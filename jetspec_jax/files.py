"""Files that somebody else wrote are opened only if they are ordinary files, and read only up to a size that they need;
our own are written whole."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from jetspec_jax.errors import JetSpecError

MAX_JSON = 2**24  # bytes; the index of a model with 36,000 tensors takes 3 MB
MAX_TEXT = 2**28
MAX_DEPTH = 64  # of lists and objects in JSON
NO_SUCH_NAME = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def local_path(source: str | os.PathLike[str]) -> Path | None:
    """The file or folder that a user names, "~" being the home folder; None where there is none.

    Raises:
        JetSpecError: the home of an unknown user, or a folder on the way that may not be searched.
    """
    if not str(source):  # and not the current folder
        return None
    try:
        path = Path(source).expanduser()
        path.stat()
    except RuntimeError as error:  # ~nobody
        raise JetSpecError(f"{source}: {error}".rstrip(".") + ": write the path out") from error
    except OSError as error:
        if error.errno in NO_SUCH_NAME:
            return None
        raise cannot_read(source, error) from error
    except ValueError:  # a zero byte
        return None
    return path


def check_ordinary(file: Path, most: int | None = None) -> int:
    """The size of a file, in bytes.

    Raises:
        JetSpecError: it cannot be read, is something else than a file (a pipe or a device, which may never end), or
            holds more than `most` bytes.
    """
    try:
        found = file.stat()
    except OSError as error:
        raise cannot_read(file, error) from error
    if not stat.S_ISREG(found.st_mode):
        raise JetSpecError(f"{file} is no ordinary file: put a copy of its content there")
    if most is not None and found.st_size > most:
        raise JetSpecError(f"{file} has {found.st_size / 1e6:.0f} MB, and no such file needs more than "
                           f"{most / 1e6:.0f} MB: is it damaged, or another file?")
    return found.st_size


def read_bytes(file: Path, most: int = MAX_JSON) -> bytes:
    """The content of an ordinary file; see `check_ordinary`."""
    check_ordinary(file, most)
    try:
        return file.read_bytes()
    except OSError as error:
        raise cannot_read(file, error) from error


def read_text(file: Path, most: int = MAX_TEXT) -> str:
    """The text of an ordinary file in UTF-8, without the mark that some editors begin it with.

    Raises:
        JetSpecError: see `check_ordinary`; or it is no UTF-8.
    """
    try:
        return read_bytes(file, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JetSpecError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): save it as "
                           "such") from error


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says. A name that occurs twice in an object is refused.

    Raises:
        ValueError: no JSON, or JSON that is nested too deeply.
    """
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not _is_shallow(value):
        raise ValueError("it is nested too deeply")
    return value


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        JetSpecError: see `read_bytes`; or it is something else.
    """
    text = read_text(file, MAX_JSON)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise JetSpecError(f"{file} is not valid JSON: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise JetSpecError(f"{file} should hold a JSON object, not {type(value).__name__}")
    return value


@contextlib.contextmanager
def locked(file: Path, busy: str) -> Iterator[None]:
    """Holds a lock, told by a file that vanishes with it; it ends with its process at the latest.

    Raises:
        JetSpecError: with the message `busy`, where another process (or thread) holds it.
    """
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise JetSpecError(busy) from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def write_text(file: Path, text: str) -> None:
    """Writes beside and renames, so that no half of a file is ever there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name[:200]}.partial")  # the name may be as long as names can be
    try:
        beside.write_text(text, encoding="utf-8")
        beside.rename(file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def cannot_read(file: str | os.PathLike[str], error: OSError) -> JetSpecError:
    """The error of a file that the system does not let us read."""
    return JetSpecError(f"cannot read {str(file)[:200]}: {error.strerror or error}")


def _is_shallow(value: Any) -> bool:
    """Whether it may be compared and printed without meeting Python's limit of recursion."""
    level, depth = [value], 0
    while level and depth < MAX_DEPTH:
        level = [item for inside in level if isinstance(inside, dict | list)
                 for item in (inside.values() if isinstance(inside, dict) else inside)]
        depth += 1
    return not level


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: a name that occurs twice in an object is an error, not the later one's victory."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return result
