"""Arrays on the host that JAX on a CPU takes over as they are: they begin where its own would."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import numpy as np

ALIGNMENT = 64  # bytes; JAX copies what begins elsewhere


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`np.empty`, well aligned. What is given to JAX must not be written any more."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start:start + size].view(dtype).reshape(shape)


def map_file(file: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """A file's numbers, read-only, in the pages that the system keeps of it; it is open as long as the array lives."""
    with file.open("rb") as stream:
        pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(pages, dtype).reshape(shape)
