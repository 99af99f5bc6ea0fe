"""What decoding takes of a device's memory, and how a user hears that it does not fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import jax
from jax.sharding import Mesh

from jetspec_jax.decode import Decoder, create_state
from jetspec_jax.errors import JetSpecError


@lru_cache(256)
def state_bytes(decoder: Decoder, batch: int, slots: int) -> int:
    """What the state of so many sequences takes on each device, most of it for keys and values."""
    state = jax.eval_shape(lambda: create_state(decoder, batch, slots, sampler=None, eos=None))  # type: ignore[arg-type]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@contextmanager
def enough_memory(decoder: Decoder, batch: int, slots: int, mesh: Mesh | None) -> Iterator[None]:
    """Within it, memory that runs out is a user's mistake.

    XLA says so where it gets no memory. Linux promises more than it has, and ends the process that then asks for it:
    what a CPU is asked for is compared with what is left. Not where several processes decode together: each would
    decide for itself, and the others wait for one that gave up.

    Args:
        batch: sequences of each device.
        slots: tokens of each sequence.

    Raises:
        JetSpecError: it does not fit.
    """
    size = state_bytes(decoder, batch, slots)
    full = (f"{batch} x {slots} tokens take {_gigabytes(size)} on a device, and there is not enough memory: lower "
            "batch_size or max_new_tokens")
    free = free_memory() if jax.default_backend() == "cpu" and jax.process_count() == 1 else None
    devices = 1 if mesh is None else len(mesh.local_devices)
    if free is not None and size * devices > free:
        raise JetSpecError(f"{full} ({_gigabytes(free)} are left)")
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise JetSpecError(full) from error


def free_memory() -> int | None:
    """Bytes that the machine can still give away; None where it does not tell."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
