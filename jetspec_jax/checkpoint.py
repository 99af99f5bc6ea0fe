"""Checkpoints: Orbax arrays with a description beside them, written beside the destination and renamed.

    OUT/jetspec.json    {"format": "jetspec-jax", "version": 2, "kind": "target" or "head", "config": {}, "source": "",
                        "checksums": {"FILE below arrays/": CRC-32 in hexadecimal}}; version 1 has no checksums,
                        version 3 is written where earlier releases would not understand the config
    OUT/arrays/         the parameters, as Orbax writes them
    OUT/tokenizer/      Hugging Face tokenizer files, where the source had them
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jetspec_jax.autoregressive import autoregressive_shapes
from jetspec_jax.collectives import TENSOR
from jetspec_jax.config import (
    AutoregressiveHeadConfig,
    DrafterConfig,
    HeadConfig,
    RopeScaling,
    TargetConfig,
    is_integer,
    require,
)
from jetspec_jax.errors import DamagedError, JetSpecError, first_line, shown
from jetspec_jax.files import MAX_JSON, check_ordinary, local_path, locked, read_json
from jetspec_jax.head import head_shapes
from jetspec_jax.host import map_file
from jetspec_jax.layout import check_layout, read_array
from jetspec_jax.machine import cores
from jetspec_jax.sharding import arrange, named_map, place, shards_of, stored_spec
from jetspec_jax.target import target_shapes
from jetspec_jax.tiles import from_tiles

FORMAT, VERSION = "jetspec-jax", 3
PLAIN_VERSION = 2  # earlier releases read it too
READABLE = (1, PLAIN_VERSION, VERSION)
DESCRIPTION, ARRAYS, TOKENIZER = "jetspec.json", "arrays", "tokenizer"
_NOT_STORED = ("weight_tile", "shards", "kernels")  # of the config: how a model runs, not what it is; but see `save`
_NEWER = ("weight_tile", "accept_lengths")  # that version 3 may have
_LATER = ("rope_scaling", *_NEWER)  # fields that the first files lack
SMALL_BYTES = 2**16  # of a file that describes others
PIECE_BYTES = 2**27  # of one file: an array in one piece can be mapped, and who reads a share reads whole pieces
MOST_MAPPED = 128  # arrays: each keeps a file open, and some systems allow a process 256
_KINDS: dict[str, tuple[Any, Any]] = {
    "target": (TargetConfig, target_shapes), "head": (HeadConfig, head_shapes),
    "autoregressive_head": (AutoregressiveHeadConfig, autoregressive_shapes)}


@contextlib.contextmanager
def written_beside(out: Path) -> Iterator[Path]:
    """Yields a fresh folder next to `out` that becomes `out` if the block succeeds and vanishes if it does not.

    What a process that was killed left of an earlier try vanishes too.

    Raises:
        JetSpecError: `out` exists already, another process is writing it, or its parent folder cannot be written.
    """
    if local_path(out) is not None or out.is_symlink():
        raise JetSpecError(f"{out} exists already: choose another name or remove it first")
    out = out.expanduser()
    prefix = f".{out.name[:200]}."  # together with what follows it must be a name that file systems take
    with contextlib.ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            busy = f"another process is writing {out}: wait for it, or choose another name"
            stack.enter_context(locked(out.with_name(f"{prefix}lock"), busy))
            for leftover in out.parent.iterdir():
                if re.fullmatch(rf"{re.escape(prefix)}[^.]+\.partial", leftover.name):
                    shutil.rmtree(leftover, ignore_errors=True)
            beside = Path(tempfile.mkdtemp(prefix=prefix, suffix=".partial", dir=out.parent))
        except OSError as error:
            raise JetSpecError(f"cannot write into {out.parent}: {error.strerror or error}") from error
        try:
            beside.chmod(0o755)
            yield beside
            beside.rename(out)
        except BaseException as error:
            shutil.rmtree(beside, ignore_errors=True)
            if isinstance(error, OSError):
                raise JetSpecError(f"cannot write {out}: {error.strerror or error}; nothing was left behind") from error
            raise


def save(folder: Path, config: TargetConfig | DrafterConfig, params: dict, source: str, tiles: bool = False) -> None:
    """Writes a checkpoint into the existing folder `folder` (see `written_beside`).

    Args:
        config: what the parameters belong to.
        params: `{"params": ...}` of JAX arrays; committed ones are written without a copy.
        source: where the parameters came from, for people to read.
        tiles: write tiles as they are, which earlier releases do not read; otherwise as the matrices that they make up.

    Raises:
        JetSpecError: the disk is too small or refuses the data; one of several processes; or a model that several
            devices share.
    """
    if jax.process_count() > 1:
        raise JetSpecError(f"several processes cannot write {folder.parent} together: convert or train in one process "
                           "first")
    meshes = [leaf.sharding.mesh for leaf in jax.tree.leaves(params) if isinstance(leaf.sharding, NamedSharding)]
    if any(mesh.shape.get(TENSOR, 1) > 1 for mesh in meshes):  # columns are dealt out in another order
        raise JetSpecError("a model whose layers are shared by several devices cannot be written: load it without a "
                           "mesh")
    if not tiles:
        config, params = from_tiles(config, params)
    _reserve(folder, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
    kind = _kind_of(config)
    import orbax.checkpoint as ocp  # takes long, and decoding on one device does without

    # Weights do not compress, and uncompressed pieces need no second copy in memory.
    handler = ocp.PyTreeCheckpointHandler(save_concurrent_gb=1, use_compression=False, use_ocdbt=False)
    try:
        with quiet(), ocp.Checkpointer(handler) as writer:
            pieces = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=PIECE_BYTES), params)
            writer.save((folder / ARRAYS).absolute(), args=ocp.args.PyTreeSave(params, save_args=pieces))
    except Exception as error:  # tensorstore reports a full disk as ValueError or OSError, by version
        raise JetSpecError(f"writing into {folder.parent} failed: {first_line(error)}; nothing was left "
                           "behind") from error
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_STORED}
    if config.rope_scaling is not None:
        fields["rope_scaling"] = {name: value for name, value in fields["rope_scaling"].items() if value is not None}
    newer = {name: getattr(config, name, None) for name in _NEWER}
    fields = {name: value for name, value in fields.items() if name not in _NEWER}
    fields |= {name: value for name, value in newer.items() if value}
    version = VERSION if any(newer.values()) else PLAIN_VERSION
    description = {"format": FORMAT, "version": version, "kind": kind, "config": fields, "source": source,
                   "checksums": checksums(folder)}
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")


def _kind_of(config: TargetConfig | DrafterConfig) -> str:
    return next(kind for kind, (config_class, _) in _KINDS.items() if type(config) is config_class)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder claims to be a checkpoint of this format."""
    return (folder / DESCRIPTION).is_file()


def checksums(folder: Path) -> dict[str, str]:
    """What `jetspec.json` tells of the files below arrays/: their CRC-32."""
    arrays = folder / ARRAYS
    files = sorted(file for file in arrays.rglob("*") if file.is_file())
    with _threads(cores()) as pool:
        return dict(zip([str(file.relative_to(arrays)) for file in files], pool.map(_checksum, files), strict=True))


def load_config(folder: Path) -> TargetConfig | DrafterConfig:
    """Reads and checks the description of a checkpoint.

    Raises:
        JetSpecError: no checkpoint, a foreign format, a newer version, or a damaged description.
    """
    return _read_description(folder)[0]


def _read_description(folder: Path) -> tuple[TargetConfig | DrafterConfig, dict[str, str] | None]:
    """(the config, the checksums) of a checkpoint; see `load_config`. The first version has no checksums."""
    try:
        description = read_json(folder / DESCRIPTION)
    except JetSpecError as error:
        raise DamagedError(f"{folder} is no readable checkpoint: {error}") from error
    if description.get("format") != FORMAT:
        raise JetSpecError(f"{folder} holds a foreign checkpoint: format {shown(description.get('format'))}, expected "
                           f"{FORMAT!r}")
    version, kind, config = (description.get(name) for name in ("version", "kind", "config"))
    if not is_integer(version) or version not in READABLE:
        raise JetSpecError(f"{folder} has format version {shown(version)} and this release reads version "
                           f"{', '.join(map(str, READABLE))}: update jetspec-jax, or convert the original weights "
                           "again")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise JetSpecError(f"{folder} holds a checkpoint of unknown kind {shown(kind)}")
    try:
        return (_read_config(_KINDS[kind][0], config, tiles=version == VERSION),
                None if version == 1 else _read_checksums(description))
    except (TypeError, JetSpecError) as error:
        raise DamagedError(f"the description of {folder} is damaged: {first_line(error)}") from error


def _read_config(config_class: Any, config: Any, tiles: bool) -> TargetConfig | DrafterConfig:
    """A config from what the description says of it; earlier versions do not tell of tiles."""
    require(isinstance(config, dict), "it has no config")
    fields = {name: value for name, value in config.items() if name not in _NOT_STORED}
    if tiles:
        fields["weight_tile"] = config.get("weight_tile")
    known = {entry.name for entry in dataclasses.fields(config_class)}
    missing = sorted(known - fields.keys() - {*_NOT_STORED, *_LATER})
    require(not missing, f"its config lacks {', '.join(missing)}")
    unknown = sorted(fields.keys() - known)
    require(not unknown, f"its config has fields that are not known, like {shown(unknown[0] if unknown else '')}")
    if fields.get("rope_scaling") is not None:
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    return config_class(**fields)


def _read_checksums(description: dict[str, Any]) -> dict[str, str]:
    """The checksums, by names that stay below arrays/."""
    found = description.get("checksums")
    if not isinstance(found, dict):
        raise JetSpecError("it has no checksums")
    for name, value in found.items():
        if not isinstance(value, str) or {"", ".", ".."} & set(name.split("/")):
            raise JetSpecError(f"the checksum {shown(value)} of {shown(name)} is none")
    return found


def load(folder: Path, dtype: str | None = None, mesh: Mesh | None = None, verify: bool = True,
         tiles: bool = False) -> tuple[TargetConfig | DrafterConfig, dict]:
    """Loads a checkpoint onto the first local device, or straight into the shares of a mesh's devices.

    On a CPU, arrays that keep their dtype and lie in one piece are not copied: they are the file's own pages, which
    the system reads when they are needed, shares between processes and can let go. A checkpoint that is in use may be
    removed or replaced, as `written_beside` does, but must not be written into or cut short.

    Args:
        folder: what `save` wrote.
        dtype: cast to this dtype while reading; None keeps the stored one.
        mesh: from `jetspec_jax.sharding.make_mesh`, or None.
        verify: compare every file with its checksum, while the arrays are read. Each process of a mesh does so, for
            the shares of the others too.
        tiles: keep tiles where the matrices lie in them (without a mesh); otherwise they are made plain.

    Returns:
        (config with the dtype and the tiles of the arrays, `{"params": ...}`).

    Raises:
        JetSpecError: see `load_config`; or arrays that are missing, truncated, changed or of another shape; or a model
            that the mesh cannot share.
    """
    stored, expected = _read_description(folder)
    config = stored.with_dtype(dtype or stored.dtype)
    dataclasses.replace(config, weight_tile=None).share(shards_of(mesh)[1])
    try:
        config, params = _read_arrays(folder / ARRAYS, stored, config, mesh, expected if verify else None)
    except Exception as error:  # missing files, wrong shapes and damaged data each raise another type
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise JetSpecError(f"{folder} does not fit into the memory that is free ({first_line(error)}): load it "
                               "in a smaller dtype, or over several devices (--tensor-parallel)") from error
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        if isinstance(error, OSError | jax.errors.JaxRuntimeError) and not missing:  # open files, a disk, a device
            raise JetSpecError(f"the arrays of {folder} cannot be read: {first_line(error)}") from error
        raise DamagedError(f"the arrays of {folder} are damaged or do not match its description: "
                           f"{first_line(error)}") from error
    return (config, params) if tiles else from_tiles(config, params, consume=True)


def _read_arrays(arrays: Path, stored: TargetConfig | DrafterConfig, config: TargetConfig | DrafterConfig,
                 mesh: Mesh | None, expected: dict[str, str] | None) -> tuple[TargetConfig | DrafterConfig, dict]:
    """(config, parameters) of a checkpoint of the shape `stored`, as `config` wants them; plain over a mesh."""
    entries = [entry.name for entry in arrays.iterdir()]
    # Before anything is made for each layer: their names say how many there are.
    if stored.num_layers > len(entries):
        raise ValueError(f"its config has {stored.num_layers} layers, and it holds {len(entries)} arrays")
    for file in arrays.rglob("*"):
        if not file.name.startswith(".") and not file.is_dir():
            check_ordinary(file)
    sizes = {name: check_ordinary(arrays / name) for name in expected or ()}
    _compare(arrays, expected, [name for name, size in sizes.items() if size <= SMALL_BYTES])
    shapes = _KINDS[_kind_of(stored)][1](stored)
    used = check_layout(arrays, shapes)
    if expected is not None and used - expected.keys():
        raise ValueError(f"the description has no checksum of {min(used - expected.keys())}")
    for name in sizes.keys() - used:
        check_ordinary(arrays / name, MAX_JSON)  # what else Orbax writes is never large
    with _threads(cores()) as beside:
        large = [beside.submit(_compare, arrays, expected, [name])
                 for name, size in sizes.items() if size > SMALL_BYTES]
        if mesh is None:
            params = _read_whole(arrays, shapes, config)
        elif stored.weight_tile is None:
            params = _read_shares(arrays, shapes, config, mesh)
        else:
            config, params = from_tiles(config, _read_whole(arrays, shapes, config), consume=True)
            params = named_map(lambda name, leaf: place(name, leaf, config, mesh), params)
        jax.block_until_ready(params)
        for compared in large:
            compared.result()
    return config, params


def _read_whole(arrays: Path, shapes: dict, config: TargetConfig | DrafterConfig) -> dict:
    """Parameters on the first local device; the largest are mapped where they can be."""
    device, sizes = jax.local_devices()[0], sorted((leaf.size for leaf in jax.tree.leaves(shapes)), reverse=True)
    small = sizes[MOST_MAPPED] if len(sizes) > MOST_MAPPED else 0

    def read(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        value = read_array(arrays / name.replace("/", "."), leaf, config.jnp_dtype, mapped=leaf.size > small)
        return jax.device_put(value, device)

    return named_map(read, shapes)


def _read_shares(arrays: Path, shapes: dict, config: TargetConfig | DrafterConfig, mesh: Mesh) -> dict:
    """Parameters over a mesh: Orbax reads for each process the pieces that hold its shares."""
    import orbax.checkpoint as ocp

    def read(name: str, leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
        return ocp.ArrayRestoreArgs(dtype=leaf.dtype, sharding=NamedSharding(mesh, stored_spec(name, len(leaf.shape))),
                                    global_shape=leaf.shape, strict=True)

    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, config.jnp_dtype), shapes)
    with quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=1)) as reader:
        params = reader.restore(arrays.absolute(), args=ocp.args.PyTreeRestore(
            item=wanted, restore_args=named_map(read, wanted)))
    return named_map(lambda name, leaf: arrange(name, leaf, config, mesh), params)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that begin nothing more once the block has ended, by Ctrl-C too."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _compare(arrays: Path, expected: dict[str, str] | None, names: list[str]) -> None:
    """Raises ValueError where one of these files does not have the checksum that it should have."""
    for name in names:
        if expected is not None and _checksum(arrays / name) != expected[name]:
            raise ValueError(f"{ARRAYS}/{name} was changed since it was written")


def _checksum(file: Path) -> str:
    """CRC-32 of a file's bytes, without Python's lock: two threads take half the time."""
    size = check_ordinary(file)
    return f"{zlib.crc32(map_file(file, (size,), np.dtype(np.uint8)).data) if size else 0:08x}"


def _reserve(folder: Path, size: int) -> None:
    """Lets the disk promise `size` bytes for a moment, where the system can: running out of space in the middle would
    end in a storm of messages from Orbax's threads."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return  # a file system that cannot promise
        raise JetSpecError(f"the disk of {folder.parent} refuses the {size / 1e9:.3f} GB that the checkpoint needs: "
                           f"{error.strerror}; nothing was left behind") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Orbax's log off the user's screen: what fails is raised to us as well, and told in one line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
