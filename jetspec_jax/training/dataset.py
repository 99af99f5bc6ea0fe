"""Recorded answers on disk: one folder of shards that are only ever added to.

    dataset.json            what was recorded, and how
    shard-00000.tokens.npz  tokens int32, offsets and prompt lengths int64, indices int64
    shard-00000.states.npy  uint16 [tokens, T*D], bits of bfloat16, row t the states after token t (optional)
"""

from __future__ import annotations

import copy
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jetspec_jax.config import is_integer
from jetspec_jax.errors import JetSpecError, first_line
from jetspec_jax.files import check_ordinary, local_path, read_json
from jetspec_jax.training.record import Recording

DESCRIPTION = "dataset.json"


@dataclass(frozen=True)
class DatasetInfo:
    """What a dataset holds.

    Args:
        target: name of the target whose answers these are.
        layers: the layers of the stored states, in this order; empty where none are stored.
        hidden_size: D.
        vocab_size: V.
        recipe: how it was made: prompts, sampling, seed (for the reader; not interpreted).
    """

    target: str
    layers: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    recipe: dict


class DatasetWriter:
    """Adds shards to a dataset, each complete or absent."""

    def __init__(self, folder: Path, info: DatasetInfo) -> None:
        self.folder, self.info = folder, info
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / DESCRIPTION).exists():
            present = read_info(folder)
            if present != info:
                different = [k for k, v in asdict(present).items() if v != asdict(info)[k]]
                raise JetSpecError(f"{folder} holds a dataset made otherwise ({', '.join(different)} differ): resume "
                                   "with the same options, or choose another folder")
        else:
            _write_beside(folder / DESCRIPTION, json.dumps(asdict(info), indent=2).encode())

    def done(self) -> set[int]:
        """Indices of the prompts that are already there."""
        return {int(i) for shard in _shards(self.folder) for i in _read(shard)["indices"]}

    def add(self, recordings: list[Recording]) -> None:
        """Writes one shard: states first, so that a shard whose tokens are there is complete."""
        numbers = [int(shard.name.split("-")[1].split(".")[0]) for shard in _shards(self.folder)]
        stem = f"shard-{max(numbers, default=-1) + 1:05d}"
        try:
            if self.info.layers:
                # The last token of each answer has no states: a row of zeros keeps tokens and states aligned.
                states = np.concatenate([np.pad(r.states, ((0, 1), (0, 0))) for r in recordings])
                self._write(f"{stem}.states.npy", lambda file: np.save(file, states))
            self._write(f"{stem}.tokens.npz", lambda file: np.savez(
                file, tokens=np.concatenate([r.tokens for r in recordings]),
                offsets=np.cumsum([0] + [len(r.tokens) for r in recordings]),
                prompt_lengths=np.asarray([r.prompt_length for r in recordings], np.int64),
                indices=np.asarray([r.index for r in recordings], np.int64)))
        except OSError as error:  # NumPy's own do not name the file
            raise JetSpecError(f"cannot write {stem} into {self.folder}: {error.strerror or error}") from error

    def _write(self, name: str, save: Callable[[BinaryIO], object]) -> None:
        """A file, complete or absent."""
        partial = self.folder / f".{name}.partial"
        try:
            with partial.open("wb") as file:
                save(file)
            partial.rename(self.folder / name)
        finally:
            partial.unlink(missing_ok=True)


class Dataset:
    """All sequences of one or more folders, states mapped into memory.

    Attributes:
        infos: of the folders, in their order; `info` is the first.
        prompt_lengths: tokens of each sequence's prompt.
        indices: each sequence's prompt, as its folder numbers them.
    """

    def __init__(self, folders: list[Path]) -> None:
        if not folders:
            raise JetSpecError("no dataset was given")
        self.infos = [read_info(folder) for folder in folders]
        self.info = self.infos[0]
        for folder, info in zip(folders, self.infos, strict=True):
            for name in ("layers", "hidden_size", "vocab_size", "target"):
                if getattr(info, name) != getattr(self.info, name):
                    raise JetSpecError(f"{folder} does not go with {folders[0]}: its {name} is "
                                       f"{getattr(info, name)!r}, not {getattr(self.info, name)!r}")
        self._tokens: list[np.ndarray] = []
        self._states: list[np.ndarray] = []
        self.prompt_lengths: list[int] = []
        self.indices: list[int] = []
        for shard in (shard for folder in folders for shard in _shards(folder)):
            self._add(shard)
        if not self._tokens:
            raise JetSpecError(f"{', '.join(map(str, folders))}: no recorded answers yet; run "
                               "experiments/generate_data.py")

    def _add(self, shard: Path) -> None:
        arrays = _read(shard)
        tokens, offsets = arrays["tokens"], arrays["offsets"]
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.info.vocab_size:
            raise JetSpecError(f"{shard} holds token ids outside the vocabulary of {self.info.vocab_size}: record it "
                               "again")
        states = None
        if self.info.layers:
            file = shard.with_name(shard.name.replace(".tokens.npz", ".states.npy"))
            expected = (len(tokens), len(self.info.layers) * self.info.hidden_size)
            try:
                check_ordinary(file)
                states = np.load(file, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise JetSpecError(f"{file} is missing or damaged: delete {shard.name} and record it again") from error
            if states.shape != expected or states.dtype != np.uint16:
                raise JetSpecError(f"{file} holds {states.dtype} {states.shape}, expected uint16 {expected}: record it "
                                   "again")
        self.indices += arrays["indices"].tolist()
        for start, end, prompt in zip(offsets, offsets[1:], arrays["prompt_lengths"], strict=False):
            self._tokens.append(tokens[start:end])
            if states is not None:
                self._states.append(states[start:end])
            self.prompt_lengths.append(int(prompt))

    def select(self, indices: list[int]) -> Dataset:
        """The sequences of these prompts alone, in this order.

        Raises:
            JetSpecError: a prompt that is not there, or is there more than once.
        """
        places = {index: i for i, index in enumerate(self.indices)}
        if len(places) < len(self) or not set(indices) <= set(places):
            raise JetSpecError("prompts can be chosen from one dataset that holds each of them once")
        chosen = copy.copy(self)
        for name in ("_tokens", "_states", "prompt_lengths", "indices"):
            values = getattr(self, name)
            setattr(chosen, name, [values[places[index]] for index in indices] if values else [])
        return chosen

    def __len__(self) -> int:
        return len(self._tokens)

    def tokens(self, i: int) -> np.ndarray:
        """int32 [n], prompt and answer of sequence i."""
        return self._tokens[i]

    def states(self, i: int) -> np.ndarray:
        """uint16 [n, T*D]; the last row is zeros."""
        return self._states[i]

    @property
    def answer_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(t) - p for t, p in zip(self._tokens, self.prompt_lengths, strict=True))


def read_info(folder: Path) -> DatasetInfo:
    """The description of a dataset.

    Raises:
        JetSpecError: the folder holds none, or a damaged one.
    """
    file = folder / DESCRIPTION
    if local_path(file) is None:
        raise JetSpecError(f"{folder} is no dataset: it has no {DESCRIPTION}; make one with "
                           "experiments/generate_data.py")
    fields = read_json(file)
    try:
        info = DatasetInfo(**{**fields, "layers": tuple(fields["layers"])})
        if not all(is_integer(value) for value in (*info.layers, info.hidden_size, info.vocab_size)):
            raise ValueError("sizes are no integers")
    except (ValueError, KeyError, TypeError) as error:
        raise JetSpecError(f"{file} is damaged: {first_line(error)}") from error
    return info


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.tokens.npz"))


def _read(shard: Path) -> dict[str, np.ndarray]:
    try:
        check_ordinary(shard)
        with np.load(shard, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in ("tokens", "offsets", "prompt_lengths", "indices")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise JetSpecError(f"{shard} is damaged: delete it and record again") from error


def _write_beside(file: Path, content: bytes) -> None:
    partial = file.with_name(f".{file.name}")
    partial.write_bytes(content)
    os.replace(partial, file)
