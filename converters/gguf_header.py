"""The header of a GGUF file: what it says, and where its tensors lie. Every count is compared with the file's size."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from converters.fields import is_plain
from jetspec_jax.config import is_integer
from jetspec_jax.errors import JetSpecError, shown
from jetspec_jax.files import cannot_read, check_ordinary

VERSIONS = (2, 3)
FLOAT32, BOOL, TEXT, LIST = 6, 7, 8, 9
SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"), 4: np.dtype("<u4"),
    5: np.dtype("<i4"), FLOAT32: np.dtype("<f4"), BOOL: np.dtype("?"), 10: np.dtype("<u8"),
    11: np.dtype("<i8"), 12: np.dtype("<f8")}
LEAST_FIELD, LEAST_TENSOR, LEAST_ITEM = 13, 32, {TEXT: 8, LIST: 12}  # bytes; a name takes 8 and its length
MAX_HEADER = 2**26  # bytes; with 260,000 tokens and their merges it is 15 MB
MAX_DIMENSIONS, MAX_NESTING, MAX_ALIGNMENT = 4, 4, 2**16


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies.

    Attributes:
        name: its name in the file.
        shape: rows first, as NumPy has it.
        kind: a `gguf.GGMLQuantizationType`.
        offset: of its first byte in the file.
        size: in bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: Any
    offset: int
    size: int


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata and tensors by name. What is stored as float32 is the shortest number that rounds to it (1e-5, and not
    9.999999747e-06)."""

    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_header(file: Path) -> GGUFHeader:
    """Reads and checks a header. The tensors are aligned, inside the file, and apart.

    Raises:
        JetSpecError: no ordinary file, no GGUF file of a known version, or a damaged one.
    """
    size = check_ordinary(file)
    try:
        with file.open("rb") as stream:
            return _Reader(file, stream, size).header()
    except OSError as error:
        raise cannot_read(file, error) from error


class _Reader:
    """Reads a header from its start to its end."""

    def __init__(self, file: Path, stream: BinaryIO, size: int) -> None:
        self._file, self._stream, self._size = file, stream, size
        self._left = min(size, MAX_HEADER)

    def header(self) -> GGUFHeader:
        start = self._take(8, "its start")
        if start[:4] != b"GGUF":
            raise self._damaged("it does not begin with GGUF")
        if int.from_bytes(start[4:], "big") in VERSIONS:
            raise JetSpecError(f"{self._file} is a big-endian GGUF file, and only little-endian ones are read: turn it "
                               "with gguf-convert-endian of the Python package gguf")
        if int.from_bytes(start[4:], "little") not in VERSIONS:
            raise JetSpecError(f"{self._file} is a GGUF file of version {int.from_bytes(start[4:], 'little')}, and "
                               f"versions {' and '.join(map(str, VERSIONS))} are read")
        tensors = self._count(LEAST_TENSOR, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(self._count(LEAST_FIELD, "fields")):
            name = self._name("field")
            if name in metadata:
                raise self._damaged(f"field {name} occurs twice")
            metadata[name] = self._value(f"field {name}", self._integer(4, f"field {name}"))
        found = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not is_integer(alignment) or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._damaged(f"general.alignment must be a power of two up to {MAX_ALIGNMENT}, not "
                                f"{shown(alignment)}")
        return GGUFHeader(metadata, self._placed(found, alignment))

    def _placed(self, found: list[GGUFTensor], alignment: int) -> dict[str, GGUFTensor]:
        """The tensors by name, with offsets in the file in the place of offsets in its data."""
        start = -(-self._stream.tell() // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for tensor in found:
            end = tensor.offset + tensor.size
            if tensor.name in tensors:
                raise self._damaged(f"tensor {tensor.name} occurs twice")
            if tensor.offset % alignment:
                raise self._damaged(f"tensor {tensor.name} begins at offset {tensor.offset}, which is no multiple of "
                                    f"the alignment {alignment}")
            if start + end > self._size:
                raise self._damaged(f"tensor {tensor.name} ends at offset {end}, beyond the end of the file (truncated "
                                    "download?)")
            tensors[tensor.name] = replace(tensor, offset=start + tensor.offset)
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for first, second in itertools.pairwise(ordered):
            if second.offset < first.offset + first.size:
                raise self._damaged(f"tensor {second.name} begins at offset {second.offset - start}, inside tensor "
                                    f"{first.name}")
        return tensors

    def _tensor(self) -> GGUFTensor:
        """The next description of a tensor; its offset counts from the start of the data."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self._name("tensor")
        what = f"tensor {name}"
        dimensions = self._integer(4, what)
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise self._damaged(f"{what} has {dimensions} dimensions")
        shape = tuple(self._integer(8, what) for _ in range(dimensions))[::-1]
        number, offset = self._integer(4, what), self._integer(8, what)
        try:
            kind = GGMLQuantizationType(number)
            block, size = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise self._damaged(f"{what} is of type {number}, which is not known") from error
        if 0 in shape or shape[-1] % block:
            raise self._damaged(f"{what} has shape {list(shape)}, which is empty or no rows of whole blocks of {block}")
        return GGUFTensor(name, shape, kind, offset, math.prod(shape) // block * size)

    def _value(self, what: str, kind: int, nesting: int = 0) -> Any:
        if kind == TEXT:
            return self._text(what)
        if kind == LIST:
            item = self._integer(4, what)
            if item in SCALARS:
                return self._numbers(what, item, self._count(SCALARS[item].itemsize, f"items of {what}")).tolist()
            if item not in LEAST_ITEM or nesting == MAX_NESTING:
                raise self._damaged(f"{what} is a list of what is not known, or nested too deeply")
            count = self._count(LEAST_ITEM[item], f"items of {what}")
            return [self._value(what, item, nesting + 1) for _ in range(count)]
        if kind not in SCALARS:
            raise self._damaged(f"{what} is of type {kind}, which is not known")
        (number,) = self._numbers(what, kind, 1)
        return float(str(number)) if kind == FLOAT32 else number.item()

    def _numbers(self, what: str, kind: int, count: int) -> np.ndarray:
        data = self._take(count * SCALARS[kind].itemsize, what)
        if kind == BOOL and max(data, default=0) > 1:
            raise self._damaged(f"{what} is neither true nor false")
        return np.frombuffer(data, SCALARS[kind])

    def _name(self, what: str) -> str:
        name = self._text(f"the name of a {what}")
        if not is_plain(name):
            raise self._damaged(f"{shown(name)} is no name of a {what}")
        return name

    def _text(self, what: str) -> str:
        data = self._take(self._integer(8, what), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(f"{what} is not UTF-8 text") from error

    def _count(self, least: int, what: str) -> int:
        """A count of what takes at least so many bytes each."""
        count = self._integer(8, what)
        if count * least > self._left:
            raise self._damaged(f"it counts {count} {what}, and is too small for them (truncated download?)")
        return count

    def _integer(self, size: int, what: str) -> int:
        return int.from_bytes(self._take(size, what), "little")

    def _take(self, size: int, what: str) -> bytes:
        data = self._stream.read(size) if size <= self._left else b""
        if len(data) != size:
            raise self._damaged(f"{what} reaches beyond its end (truncated download?)")
        self._left -= size
        return data

    def _damaged(self, why: str) -> JetSpecError:
        return JetSpecError(f"{self._file} is not a sound GGUF file: {why}")
