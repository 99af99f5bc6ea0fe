"""Compiled programs on disk: whole executables, found again without tracing by everything that they depend on.

JAX's own compilation cache saves the last step alone: a program is traced and lowered before it is looked up, which for
an unrolled stack of layers takes a second.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
import tempfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from inspect import isfunction
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
from jax.experimental.serialize_executable import deserialize_and_load, serialize

import pallas_kernels
from jetspec_jax.machine import cores, processor_details

MOST_BYTES = 2**27  # of a folder; the programs of one shape of prompts and answers take 1.7 MB for the default pair
CHECKSUM = 32  # bytes in front of each program

PACKAGES = (Path(__file__).parent, Path(pallas_kernels.__file__).parent)


@dataclass(frozen=True)
class Place:
    """Where a program is kept, for any number of processes of one user.

    Whatever happens to the folder, nothing fails: a program that cannot be read is compiled, and one that cannot be
    written is compiled again the next time.
    """

    file: Path
    device: jax.Device

    def load(self) -> Callable[..., Any] | None:
        """The program, ready to run; None where there is none that is whole."""
        try:
            content = self.file.read_bytes() if _is_private(self.file.parent) else b""
            packed = content[CHECKSUM:]
            if hashlib.sha256(packed).digest() != content[:CHECKSUM]:
                return None
            executable, taken, returned = pickle.loads(zlib.decompress(packed))
            program = deserialize_and_load(executable, taken, returned, execution_devices=[self.device])
        except Exception:  # whatever jaxlib says of it
            return None
        with suppress(OSError):  # a cache that can only be read
            os.utime(self.file)
        return program

    def save(self, program: jax.stages.Compiled) -> bool:
        """Keeps a program: written beside and renamed, so that no half of one is ever there. Whether it is there."""
        try:
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_private(self.file.parent):
                return False
            packed = zlib.compress(pickle.dumps(serialize(program)), level=1)
            with tempfile.NamedTemporaryFile(dir=self.file.parent, delete=False) as beside:
                try:
                    beside.write(hashlib.sha256(packed).digest() + packed)
                    beside.close()
                    os.replace(beside.name, self.file)
                except BaseException:
                    os.unlink(beside.name)
                    raise
            _make_room(self.file.parent)
        except Exception:  # a full disk, or a program that jaxlib does not write
            return False
        return True


def place_of(folder: Path, function: Callable[..., Any], static: tuple, args: tuple, donate: int | None,
             options: dict[str, Any]) -> Place | None:
    """Where the program is kept that `Programs` is asked for, by everything that it depends on.

    Args:
        folder: of all programs.
        function, static, args, donate: as `Programs` is called.
        options: what XLA is told.

    Returns:
        None for a program that is not kept: of another backend than a CPU, or of several devices; of a function whose
        source is not known; with a static argument that does not tell its value. Nor where JAX's compilation cache is
        on: what comes out of it runs, but lacks the functions without which it cannot be written again.
    """
    known = isfunction(function) and function.__module__.partition(".")[0] in {package.name for package in PACKAGES}
    if jax.default_backend() != "cpu" or not known or jax.config.values["jax_compilation_cache_dir"]:
        return None
    leaves, structure = jax.tree.flatten(args)
    devices = set().union(*(leaf.devices() for leaf in leaves)) if leaves else {jax.devices()[0]}
    called = repr((function.__module__, function.__qualname__, static, donate, str(structure), options,
                   list(map(jax.typeof, leaves))))
    if len(devices) > 1 or "<locals>" in called or " at 0x" in called:
        return None
    (device,) = devices
    settings = [item for item in sorted(jax.config.values.items()) if "cache" not in item[0]]
    depends = repr((called, device.id, settings, _surroundings()))
    return Place(folder / hashlib.sha256(depends.encode()).hexdigest(), device)


def _is_private(folder: Path) -> bool:
    """Whether only this user can write into a folder: to unpickle a file is to run what its writer wants."""
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o022 and (
        not hasattr(os, "geteuid") or found.st_uid == os.geteuid())


def _make_room(folder: Path) -> None:
    """Removes the files that were not used for longest; among them what a process left that was killed in writing."""
    found = [(entry.stat().st_mtime_ns, entry.stat().st_size, entry.path) for entry in os.scandir(folder)]
    room = MOST_BYTES
    for _, size, path in sorted(found, reverse=True):
        room -= size
        if room < 0:
            Path(path).unlink(missing_ok=True)


@cache
def _surroundings() -> tuple[Any, ...]:
    """What does not change while a process runs: sources, versions, flags, and the processor."""
    sources = hashlib.sha256()
    for folder in PACKAGES:
        for file in sorted(folder.rglob("*.py")):
            sources.update(f"{file.relative_to(folder.parent)}\0".encode() + file.read_bytes() + b"\0")
    return (sources.hexdigest(), jax.__version__, jaxlib.__version__, flax.__version__, os.environ.get("XLA_FLAGS"),
            jax.device_count(), cores(), processor_details())
