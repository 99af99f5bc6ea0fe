"""How Orbax lays the arrays of a checkpoint out, and how one device reads them without it.

Checked before anybody reads them: Orbax's threads would tell of damage at length, or read what nobody needs.
"""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jetspec_jax.config import is_integer
from jetspec_jax.files import check_ordinary, parse_json, read_bytes
from jetspec_jax.host import empty, map_file
from jetspec_jax.sharding import named_map

TREE = "_METADATA"
ZARR = {"zarr_format": 2, "order": "C", "compressor": None, "filters": None, "fill_value": None,
        "dimension_separator": "."}


def check_layout(arrays: Path, shapes: dict) -> set[str]:
    """Checks a folder of arrays against the shapes and dtypes that it should hold. What else lies there is ignored.

    Returns:
        The files that make the arrays up, as names below the folder.

    Raises:
        Exception: it holds something else, or holds it otherwise than `checkpoint.save` does.
    """
    leaves: dict[str, jax.ShapeDtypeStruct] = {}
    named_map(lambda name, leaf: leaves.setdefault(name.replace("/", "."), leaf), shapes)
    if {file.parent.name for file in arrays.glob("*/.zarray")} != leaves.keys():
        raise ValueError("the names of the stored arrays differ")
    _check_tree(_read(arrays / TREE), set(leaves))
    used, pieces = {TREE}, {}
    for name, leaf in leaves.items():
        pieces[name], files = _check_pieces(arrays / name, leaf)
        used.update(f"{name}/{file}" for file in (*files, ".zarray"))
    for file in arrays.glob("array_metadatas/process_*"):
        for entry in _read(file)["array_metadatas"]:
            told = entry["array_metadata"]
            shape = leaves[told["param_name"]].shape
            if told["chunk_shape"] != pieces[told["param_name"]] or not _is_shape(told["write_shape"], len(shape)):
                raise ValueError(f"{file.name} differs")
        used.add(str(file.relative_to(arrays)))
    return used


def read_array(folder: Path, leaf: jax.ShapeDtypeStruct, dtype: np.dtype, mapped: bool = True) -> np.ndarray:
    """An array whose layout was checked, where JAX can use it on a CPU without another copy.

    Args:
        folder: of the array.
        leaf: its shape and its stored dtype.
        dtype: of the result.
        mapped: whether the file may be kept open.

    Returns:
        The file itself, mapped and read-only, if it holds all and nothing else; otherwise a copy.
    """
    piece, stored = tuple(_read(folder / ".zarray")["chunks"]), jnp.dtype(leaf.dtype)
    counts = [-(-size // n) for size, n in zip(leaf.shape, piece, strict=True)]
    files = {at: folder / ".".join(map(str, at)) for at in itertools.product(*map(range, counts))}
    if mapped and piece == leaf.shape and stored == dtype:
        (file,) = files.values()
        return map_file(file, piece, stored)
    copy = empty(leaf.shape, dtype)
    with np.errstate(over="ignore"):
        for at, file in files.items():
            part = copy[tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, piece, strict=True))]
            part[...] = map_file(file, piece, stored)[tuple(map(slice, part.shape))]  # the last pieces may be filled up
    return copy


def _check_tree(metadata: dict[str, Any], names: set[str]) -> None:
    """That Orbax's own description names the same arrays."""
    if metadata.get("use_ocdbt") is not False or metadata.get("use_zarr3", False) is not False:
        raise ValueError("the arrays are stored in another format")
    entries = metadata["tree_metadata"]
    paths = {key: [part["key"] for part in entry["key_metadata"]] for key, entry in entries.items()}
    if {".".join(path) for path in paths.values()} != names or any(key != str(tuple(paths[key])) for key in paths):
        raise ValueError("the names of the stored arrays differ")
    if any(entry["value_metadata"]["value_type"] != "jax.Array" for entry in entries.values()):
        raise ValueError("something is stored that is no array")


def _check_pieces(folder: Path, leaf: jax.ShapeDtypeStruct) -> tuple[list[int], set[str]]:
    """(the shape, the names) of the pieces of an array, which are all there and whole; uncompressed Zarr, version 2."""
    described, dtype = _read(folder / ".zarray"), jnp.dtype(leaf.dtype)
    stored_as = dtype.name if dtype == jnp.bfloat16 else dtype.str
    expected, piece = {**ZARR, "shape": list(leaf.shape), "dtype": stored_as}, described.get("chunks")
    if any(name not in described or described[name] != value for name, value in expected.items()) or not _is_shape(
            piece, len(leaf.shape)):
        raise ValueError(f"the shape or dtype of {folder.name} differs, or how it is stored")
    counts = [-(-size // n) for size, n in zip(leaf.shape, piece, strict=True)]
    found = {file.name: check_ordinary(file) for file in folder.iterdir() if re.fullmatch(r"[0-9.]*[0-9]", file.name)}
    size = math.prod(piece) * dtype.itemsize
    if len(found) != math.prod(counts) or any(other != size for other in found.values()):
        raise ValueError(f"{folder.name} is truncated or too long: {math.prod(counts)} pieces of {size} bytes make it "
                         f"up, and {len(found)} are there with {sum(found.values())}")
    if found.keys() != {".".join(map(str, at)) for at in itertools.product(*map(range, counts))}:
        raise ValueError(f"the pieces of {folder.name} have other names")
    return piece, set(found)


def _read(file: Path) -> Any:
    """JSON as Orbax writes it: in no other encoding."""
    return parse_json(read_bytes(file).decode())


def _is_shape(value: Any, dimensions: int) -> bool:
    return isinstance(value, list) and len(value) == dimensions and all(is_integer(n) and n > 0 for n in value)
