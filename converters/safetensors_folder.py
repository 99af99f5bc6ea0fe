"""Reads single or sharded safetensors without mapping them into memory; distrusts every byte of the headers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters.fields import is_plain
from jetspec_jax.config import is_integer
from jetspec_jax.errors import JetSpecError, shown
from jetspec_jax.files import cannot_read, check_ordinary, local_path, parse_json, read_json

DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16)}
MAX_HEADER = 100_000_000  # as the format's own implementation allows
# Integers in a file are quantised weights, or a buffer that the architecture does not need.
INTEGERS = ("BOOL", "I16", "I32", "I64", "U16", "U32", "U64")
QUANTISED = ("qweight", "qzeros", "g_idx", "absmax", "quant_", "_packed", "_zero_point", "weight_shape")  # in names
MAX_DIMENSIONS = 8
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class SafetensorsFolder:
    """A `TensorSource` over a Hugging Face folder."""

    def __init__(self, folder: Path) -> None:
        self.label = str(folder)
        self._entries: dict[str, _Entry] = {}
        for file in _weight_files(folder):
            for name, entry in _read_header(file).items():
                if name in self._entries:
                    raise JetSpecError(f"tensor {name} is stored twice: in {self._entries[name].file.name} and "
                                       f"in {file.name}")
                self._entries[name] = entry
        _check_index(folder, self._entries)
        if not self._entries:
            raise JetSpecError(f"{folder} holds no tensors")
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def widest_dtype(self) -> str:
        """The name of the widest dtype that any tensor is stored in."""
        return max((entry.dtype for entry in self._entries.values()), key=lambda dtype: dtype.itemsize).name

    def read(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        count = math.prod(entry.shape)
        try:
            values = np.fromfile(entry.file, dtype=entry.dtype, count=count, offset=entry.offset)
        except OSError as error:
            raise cannot_read(entry.file, error) from error
        if values.size != count:
            raise JetSpecError(f"{entry.file} is truncated in tensor {name}: download it again")
        return values.reshape(entry.shape)


def write_safetensors(file: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype,
                      tensors: Iterable[tuple[str, np.ndarray]], progress: Callable[[int], object]) -> None:
    """Writes tensors of one dtype, one at a time, so that memory never holds them twice.

    Args:
        shapes: every tensor's name and shape, in the order in which `tensors` yields them.
        tensors: (name, value) in that order.
        progress: told how many bytes were written.
    """
    name_of = {numpy: name for name, numpy in DTYPES.items()}[np.dtype(dtype)]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": name_of, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligned, as the format's own writer does
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for (name, value), expected in zip(tensors, shapes, strict=True):
            assert name == expected  # both come from one table
            stream.write(value.tobytes())
            progress(value.nbytes)


def stored_dtype(folder: Path) -> str:
    """The dtype that the tensors of a folder are stored in (the widest, if they differ)."""
    return SafetensorsFolder(folder).widest_dtype()


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a checkpoint."""
    if local_path(folder / INDEX):
        return [folder / name for name in sorted(set(_weight_map(folder).values()))]
    if local_path(folder / SINGLE):
        return [folder / SINGLE]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    if found:
        raise JetSpecError(f"{folder} holds {len(found)} safetensors files but no {INDEX} that says which belong "
                           "together")
    pickles = [file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in sorted(folder.glob(pattern))]
    if pickles:
        raise JetSpecError(f"{folder} holds only pickle files ({pickles[0]}), which can run code when opened and are "
                           "refused: get the safetensors version of the model")
    raise JetSpecError(f"{folder} holds no safetensors file ({SINGLE} or {INDEX})")


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise JetSpecError(f"{folder / INDEX} has no weight_map")
    for name, file in weight_map.items():
        if not is_plain(name):
            raise JetSpecError(f"{folder / INDEX}: {shown(name)} is no name of a tensor")
        if not isinstance(file, str) or not is_plain(file) or file in (".", "..") or set(file) & set("/\\"):
            raise JetSpecError(f"{folder / INDEX}: tensor {name} points to {shown(file)}, which is not a file name "
                               "inside the folder")
        if not file.endswith(".safetensors"):
            raise JetSpecError(f"{folder / INDEX}: tensor {name} points to {file!r}, which is no safetensors file")
        if not local_path(folder / file):
            raise JetSpecError(f"{folder / file} is missing, although the index names it: download it again")
    return weight_map


def _check_index(folder: Path, entries: dict[str, _Entry]) -> None:
    """The index and the shards must tell the same story."""
    if not local_path(folder / INDEX):
        return
    weight_map = _weight_map(folder)
    for name in sorted(set(weight_map) | set(entries)):
        named, stored = weight_map.get(name), entries[name].file.name if name in entries else None
        if named != stored:
            raise JetSpecError(f"{folder / INDEX} and the shards disagree on tensor {name}: the index says {named}, "
                               f"it is in {stored}")


def _read_header(file: Path) -> dict[str, _Entry]:
    """Names, dtypes, shapes and offsets of a safetensors file, checked against its size."""

    def damaged(why: str) -> JetSpecError:
        return JetSpecError(f"{file} is not a sound safetensors file: {why}")

    size = check_ordinary(file)
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > MAX_HEADER or 8 + length > size:
                raise damaged("it is truncated, or its header length is wrong")
            header = parse_json(stream.read(length))
    except OSError as error:
        raise cannot_read(file, error) from error
    except ValueError as error:
        if isinstance(error, JetSpecError):
            raise
        raise damaged(f"header: {str(error)[:200]}") from error
    if not isinstance(header, dict):
        raise damaged("its header is not a JSON object")
    header.pop("__metadata__", None)

    entries, spans = {}, []
    for name, info in header.items():
        if not is_plain(name):
            raise damaged(f"{shown(name)} is no name of a tensor")
        try:
            dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise damaged(f"tensor {name} lacks dtype, shape or data_offsets") from error
        if not isinstance(dtype, str):
            raise damaged(f"tensor {name} has dtype {shown(dtype)}")
        if dtype in INTEGERS and not any(mark in name for mark in QUANTISED):
            raise JetSpecError(f"{file}: tensor {name} holds integers (dtype {dtype}), which no weight of a supported "
                               "model does: remove it from the file")
        if dtype not in DTYPES:
            raise JetSpecError(f"{file}: tensor {name} has dtype {shown(dtype)}, supported are {', '.join(DTYPES)}; "
                               "quantised checkpoints must be dequantised first")
        numbers: list[Any] = [*shape, begin, end] if isinstance(shape, list) else [None]
        if len(numbers) > MAX_DIMENSIONS + 2 or not all(is_integer(n) and 0 <= n < 2**63 for n in numbers):
            raise damaged(f"tensor {name} has shape {shown(shape)} and offsets {shown(begin)}, {shown(end)}")
        if math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
            raise damaged(f"tensor {name} of shape {shape} and dtype {dtype} does not take {end - begin} bytes")
        if begin == end:
            raise damaged(f"tensor {name} of shape {shape} holds nothing")
        spans.append((begin, end))
        entries[name] = _Entry(file, DTYPES[dtype], tuple(shape), 8 + length + begin)
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise damaged("its tensors overlap or leave gaps")
        position = end
    if 8 + length + position != size:
        raise damaged(f"it should have {8 + length + position} bytes and has {size} (truncated download?)")
    return entries
