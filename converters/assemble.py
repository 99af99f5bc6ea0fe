"""From the tensors of a file to our parameters and back, every name, shape and value checked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

import jax
import ml_dtypes
import numpy as np
from jax import Array

from converters.names import Part, Slot
from jetspec_jax.errors import JetSpecError
from jetspec_jax.host import empty

Progress = Callable[[int], object]  # told how many bytes of the result are done


class TensorSource(Protocol):
    """A checkpoint file or folder in a foreign format."""

    label: str
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in the file's dtype."""
        ...


def check_names(source: TensorSource, slots: list[Slot], ignorable: Callable[[str], bool] = lambda name: False) -> None:
    """Raises JetSpecError unless the source holds exactly the tensors of the table, in their shapes."""
    wanted = {part.name: part.shape for slot in slots for part in slot.parts}
    missing = [name for name in wanted if name not in source.shapes]
    if missing:
        raise JetSpecError(f"{source.label} lacks {_some(missing)}; is it complete, and does its config fit?")
    extra = [name for name in source.shapes if name not in wanted and not ignorable(name)]
    if extra:
        raise JetSpecError(f"{source.label} holds {_some(extra)}, which this kind of model does not have")
    for name, shape in wanted.items():
        if source.shapes[name] != shape:
            raise JetSpecError(f"{source.label}: tensor {name} has shape {list(source.shapes[name])}, "
                               f"expected {list(shape)} from the config")


def assemble(source: TensorSource, slots: list[Slot], dtype: str, progress: Progress = lambda n: None,
             put: Callable[[str, np.ndarray], Array] = lambda name, value: jax.device_put(value)) -> dict:
    """Builds `{"params": ...}`, one parameter at a time, so that memory holds the result once.

    Args:
        put: (path of the parameter, its value) -> where it shall live; the default device if not told otherwise.

    Raises:
        JetSpecError: a value that is not finite, in the file or after the cast to `dtype`.
    """
    params: dict = {}
    for slot in slots:
        value = _join(source, slot, np.dtype(dtype) if dtype != "bfloat16" else np.dtype(ml_dtypes.bfloat16))
        node = params
        for key in slot.path[:-1]:
            node = node.setdefault(key, {})
        node[slot.path[-1]] = put("/".join(("params", *slot.path)), value)
        progress(value.nbytes)
    return {"params": params}


def _join(source: TensorSource, slot: Slot, dtype: np.dtype) -> np.ndarray:
    """One parameter: its parts transposed, cast and put where they belong."""
    joined = empty(slot.shape, dtype)
    for part, piece in _pieces(slot, joined):
        tensor = source.read(part.name)
        with np.errstate(over="ignore"):
            piece[...] = tensor
        if not all_finite(piece):
            what = "after the cast to " + dtype.name if all_finite(tensor) else "in the file"
            raise JetSpecError(f"{source.label}: tensor {part.name} holds values that are not finite {what}")
    return joined


def _pieces(slot: Slot, joined: np.ndarray) -> Iterator[tuple[Part, np.ndarray]]:
    """The parts of a parameter with their places in it, views in the file's layout."""
    rows = joined if slot.stacked else joined[None]
    parts = iter(slot.parts)
    for row in rows:
        start = 0
        for part in itertools.islice(parts, len(slot.parts) // len(rows)):
            size = part.shape[-2 if slot.transposed else -1]
            piece = row[..., start:start + size]
            yield part, piece.swapaxes(-1, -2) if slot.transposed else piece
            start += size


def take_apart(params: dict, slots: list[Slot]) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `assemble`: (name, tensor as the foreign format stores it), one at a time."""
    for slot in slots:
        value = params["params"]
        for key in slot.path:
            value = value[key]
        for part, piece in _pieces(slot, np.asarray(value)):
            yield part.name, np.ascontiguousarray(piece)


def all_finite(x: np.ndarray) -> bool:
    """Whether no value is infinite or NaN; bfloat16 by its exponent bits, which is much faster."""
    if x.dtype == ml_dtypes.bfloat16:
        return not bool(np.any((x.view(np.uint16) & 0x7F80) == 0x7F80))
    return bool(np.all(np.isfinite(x)))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{', ...' if len(names) > 3 else ''})"
