"""The conversions themselves: read a source into memory, write a checkpoint, export a head."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from converters.assemble import TensorSource, assemble, check_names, take_apart
from converters.fields import naming
from converters.gguf_file import GGUFFile
from converters.huggingface import read_head_config, read_target_config, released_head_config, unknown_fields
from converters.names import Slot, check_counts, head_slots, target_slots
from converters.safetensors_folder import SINGLE, SafetensorsFolder, write_safetensors
from converters.tokenizer import MORE_TEMPLATES, load_tokenizer, save_tokenizer
from jetspec_jax import checkpoint
from jetspec_jax.config import HeadConfig, TargetConfig
from jetspec_jax.errors import JetSpecError, shown
from jetspec_jax.files import local_path
from jetspec_jax.sharding import place, shards_of

HUB_FILES = ("*.json", "*.safetensors", "merges.txt", "chat_template.jinja", f"{MORE_TEMPLATES}/*.jinja",
             "tokenizer.model")
PATIENCE = 1.0  # seconds before a bar is worth showing


def read_target(source: Path, dtype: str | None = None, progress: bool = True,
                mesh: Mesh | None = None) -> tuple[TargetConfig, dict]:
    """Reads a target from a Hugging Face folder or a GGUF file.

    Args:
        dtype: of the result; None keeps the source's (float32 for GGUF).
        progress: show a progress bar.
        mesh: spread the parameters over it; the host then still holds one whole parameter at a time.

    Returns:
        (config, `{"params": ...}` on the default device or on the mesh).

    Warns:
        UserWarning: once, with the names of the fields that nobody knows.
    """
    if not source.is_dir():
        gguf = GGUFFile(source)
        _note(source, gguf.unknown_fields)
        return _read(gguf, gguf.config, target_slots(gguf.config), dtype, progress, mesh)
    config, tensors = read_target_config(source), SafetensorsFolder(source)
    _note(source / "config.json", unknown_fields(source, "target"))
    if config.tie_embeddings and "lm_head.weight" in tensors.shapes:
        _check_tied(tensors)
    fused_experts = any(name.endswith(".mlp.experts.gate_up_proj") for name in tensors.shapes)
    check_counts(tensors.label, config, len(tensors.shapes), fused_experts)
    return _read(tensors, config, target_slots(config, fused_experts), dtype, progress, mesh)


def read_head(source: Path, dtype: str | None = None, progress: bool = True,
              mesh: Mesh | None = None) -> tuple[HeadConfig, dict]:
    """Reads a released JetSpec or DFlash head; see `read_target`."""
    config, tensors = read_head_config(source), SafetensorsFolder(source)
    _note(source / "config.json", unknown_fields(source, "head"))
    check_counts(tensors.label, config, len(tensors.shapes))
    return _read(tensors, config, head_slots(config), dtype, progress, mesh)


def read_config(source: Path, kind: str) -> TargetConfig | HeadConfig:
    """The shape of a foreign "target" or "head", without its weights."""
    if kind == "head":
        return read_head_config(source)
    return read_target_config(source) if source.is_dir() else GGUFFile(source).config


def convert_target(source: Path, out: Path, dtype: str | None = None, progress: bool = True,
                   label: str | None = None) -> None:
    """Converts a target, with its tokenizer and chat template, into a checkpoint at `out`."""
    _check_unconverted(source)
    with checkpoint.written_beside(out) as folder:
        load_tokenizer(source)  # else nobody would know until it is needed
        save_tokenizer(source, folder / checkpoint.TOKENIZER)
        config, params = read_target(source, dtype, progress)
        checkpoint.save(folder, config, params, label or str(source))


def convert_head(source: Path, out: Path, dtype: str | None = None, progress: bool = True,
                 label: str | None = None) -> None:
    """Converts a released head into a checkpoint at `out`."""
    _check_unconverted(source)
    with checkpoint.written_beside(out) as folder:
        config, params = read_head(source, dtype, progress)
        checkpoint.save(folder, config, params, label or str(source))


def export_head(source: Path, out: Path, progress: bool = True) -> None:
    """Writes a head checkpoint in the released format: config.json and model.safetensors."""
    if not checkpoint.is_checkpoint(source) and (source / "config.json").is_file():
        raise JetSpecError(f"{source} is in the released format already (it has a config.json): use it as it is")
    with checkpoint.written_beside(out) as folder:
        config, params = checkpoint.load(source)
        if not isinstance(config, HeadConfig):
            raise JetSpecError(f"{source} holds no parallel draft head: only those have a released format")
        with naming(source):
            released = released_head_config(config)
        (folder / "config.json").write_text(json.dumps(released, indent=2) + "\n")
        slots = head_slots(config)
        shapes = {part.name: part.shape for slot in slots for part in slot.parts}
        size = sum(math.prod(shape) for shape in shapes.values()) * config.jnp_dtype.itemsize
        with tqdm(total=size, unit="B", unit_scale=True, desc=out.name, disable=not progress) as bar:
            write_safetensors(folder / SINGLE, shapes, config.jnp_dtype, take_apart(params, slots), bar.update)


def looks_like_hub_id(source: str) -> bool:
    """Whether a source has the form owner/name."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not source.endswith(".gguf")


def resolve_source(source: str) -> Path:
    """A local path, or the local copy of a hub id, which is downloaded with huggingface_hub's progress bar.

    Raises:
        JetSpecError: neither exists, the path may not be searched, or the hub cannot be reached.
    """
    path = local_path(source)
    if path is not None:
        return path
    if not looks_like_hub_id(source):
        raise JetSpecError(f"{source[:200]} does not exist, and is no hub id of the form owner/name")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # network, permission and name errors come in many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JetSpecError(f"{source[:200]} is no local path and cannot be fetched from the Hugging Face hub "
                           f"({type(error).__name__}: {reason[:200]})") from error


def _check_unconverted(source: Path) -> None:
    if checkpoint.is_checkpoint(source):
        raise JetSpecError(f"{source} is converted already (it has a {checkpoint.DESCRIPTION}): use it as it is")


def _read(source: TensorSource, config: Any, slots: list[Slot], dtype: str | None, progress: bool,
          mesh: Mesh | None) -> tuple[Any, dict]:
    config = config.with_dtype(dtype or config.dtype)
    config.share(shards_of(mesh)[1])
    if config.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise JetSpecError(f"{source.label} is float64, which needs jax_enable_x64: choose another dtype, like float32")
    check_names(source, slots, lambda name: _is_buffer(name) or (name == "lm_head.weight" and _tied(config)))
    total = sum(math.prod(part.shape) for slot in slots for part in slot.parts) * config.jnp_dtype.itemsize
    with tqdm(total=total, unit="B", unit_scale=True, desc=Path(source.label).name, disable=not progress,
              delay=PATIENCE) as bar:
        return config, assemble(source, slots, config.dtype, bar.update,
                                lambda name, value: place(name, value, config, mesh))


def _note(file: Path, unknown: list[str]) -> None:
    """What a user should know and need not act upon."""
    if unknown:
        names = ", ".join(map(shown, unknown[:20])) + (f" and {len(unknown) - 20} more" if len(unknown) > 20 else "")
        warnings.warn(f"{file}: fields that are not known here are ignored: {names}", stacklevel=3)


def _tied(config: Any) -> bool:
    return isinstance(config, TargetConfig) and config.tie_embeddings


def _is_buffer(name: str) -> bool:
    """Old checkpoints store the rotary frequencies, which follow from the config."""
    return name.endswith("rotary_emb.inv_freq")


def _check_tied(tensors: SafetensorsFolder) -> None:
    """A tied checkpoint may store its LM head too, if it is the embedding table."""
    embedding = "model.embed_tokens.weight"
    if embedding in tensors.shapes and not np.array_equal(tensors.read("lm_head.weight"), tensors.read(embedding)):
        raise JetSpecError(f"{tensors.label}: the config ties the embeddings, but lm_head.weight differs from "
                           f"{embedding}")
