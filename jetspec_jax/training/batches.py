"""From recorded answers to packed batches. Every batch is a function of (seed, step): resuming needs no other state."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from flax import struct

from jetspec_jax.errors import JetSpecError
from jetspec_jax.training.config import TrainConfig
from jetspec_jax.training.dataset import Dataset


@struct.dataclass
class Batch:
    """B packed rows of P tokens, NumPy arrays until they are put on a device.

    Sequences follow each other in a row; none attends to another.
    """

    tokens: Any  # int32 [B, P]
    segment: Any  # int32 [B, P], 1, 2, ... for the sequences of a row, 0 for padding
    position: Any  # int32 [B, P], within the sequence
    states: Any  # uint16 [B, P, T*D], bits of bfloat16; T = 0 where the dataset stores none
    anchor: Any  # int32 [B, A], places in the row
    anchor_real: Any  # bool [B, A]
    subset: Any  # int32 [X], the vocabulary that the loss looks at; empty: all of it


class Batches:
    """All batches of a training run.

    Args:
        dataset: recorded answers.
        config: sizes and seed.
        held_out: the last sequences, which are never trained on, nor other answers to their prompts.
    """

    def __init__(self, dataset: Dataset, config: TrainConfig, held_out: int = 0) -> None:
        if len(dataset) <= held_out:
            raise JetSpecError(f"the dataset has {len(dataset)} sequences and {held_out} are held out: record more")
        self.dataset, self.config = dataset, config
        usable = [i for i in range(len(dataset)) if self._anchors(i).size]
        self.held_out = [i for i in usable if i >= len(dataset) - held_out]
        kept = {self._prompt(i) for i in self.held_out}
        self.train = np.asarray([i for i in usable if i < len(dataset) - held_out and self._prompt(i) not in kept])
        if not self.train.size:
            raise JetSpecError("no sequence of the dataset has an answer of two tokens within "
                               f"{config.row_tokens} tokens: record longer answers, or raise row_tokens")
        counts = np.zeros((dataset.info.vocab_size,), np.int64)
        for i in self.train:
            counts += np.bincount(dataset.tokens(i), minlength=counts.size)
        held_out_tokens = {token for i in self.held_out for token in dataset.tokens(i).tolist()}
        distinct = len({0, *np.flatnonzero(counts).tolist(), *held_out_tokens})  # 0 is padding
        most = min(distinct, config.rows * config.row_tokens)
        if config.vocab_subset is not None and config.vocab_subset < most:
            raise JetSpecError(f"vocab_subset {config.vocab_subset} is too small for batches that may hold {most} "
                               "different tokens: raise it, or lower row_tokens")
        self._frequent = np.argsort(-counts, kind="stable")
        self._plan = lru_cache(maxsize=2)(self._pack_epoch)

    def _prompt(self, i: int) -> bytes:
        return self.dataset.tokens(i)[:self.dataset.prompt_lengths[i]].tobytes()

    def _anchors(self, i: int) -> np.ndarray:
        """Where sequence i can be drafted from: answer tokens that another follows."""
        end = min(len(self.dataset.tokens(i)), self.config.row_tokens)
        return np.arange(max(self.dataset.prompt_lengths[i], 1), end - 1)

    def _pack_epoch(self, epoch: int) -> list[list[int]]:
        """Rows of sequences, in a random order, each put into the first row that has room."""
        order = np.random.default_rng([self.config.seed, epoch]).permutation(self.train)
        return pack([(int(i), min(len(self.dataset.tokens(i)), self.config.row_tokens)) for i in order],
                    self.config.row_tokens)

    def batch(self, step: int, micro: int = 0) -> Batch:
        """Micro-batch `micro` of step `step`."""
        rng = np.random.default_rng([self.config.seed, 1, step, micro])
        number = (step * self.config.accumulate + micro) * self.config.rows
        rows = [self._row(number + i) for i in range(self.config.rows)]
        return self.assemble(rows, rng)

    def _row(self, number: int) -> list[int]:
        """Row `number` of the endless stream of epochs. Each epoch is cut to the length of the first."""
        length = len(self._plan(0))
        plan = self._plan(number // length)
        return plan[number % length % len(plan)]

    @property
    def rows_per_epoch(self) -> int:
        """Packed rows until every training sequence was seen."""
        return len(self._plan(0))

    def held_out_batches(self) -> list[Batch]:
        """The held-out sequences, packed, with anchors that are the same every time."""
        lengths = [(i, min(len(self.dataset.tokens(i)), self.config.row_tokens)) for i in self.held_out]
        rows = pack(lengths, self.config.row_tokens)
        return [self.assemble([row], np.random.default_rng([self.config.seed, 2, i])) for i, row in enumerate(rows)]

    def assemble(self, rows: list[list[int]], rng: np.random.Generator) -> Batch:
        """A batch of given rows, each a list of sequences."""
        config, info = self.config, self.dataset.info
        shape = (len(rows), config.row_tokens)
        tokens, segment, position = (np.zeros(shape, np.int32) for _ in range(3))
        states = np.zeros((*shape, len(info.layers) * info.hidden_size), np.uint16)
        anchor = np.zeros((len(rows), config.anchors), np.int32)
        real = np.zeros((len(rows), config.anchors), bool)
        for b, sequences in enumerate(rows):
            start, candidates = 0, []
            for number, i in enumerate(sequences, 1):
                end = min(start + len(self.dataset.tokens(i)), config.row_tokens)
                tokens[b, start:end] = self.dataset.tokens(i)[:end - start]
                segment[b, start:end] = number
                position[b, start:end] = np.arange(end - start)
                if info.layers:
                    states[b, start:end] = self.dataset.states(i)[:end - start]
                candidates.append(start + self._anchors(i))
                start = end
            chosen = rng.permutation(np.concatenate(candidates))[:config.anchors]
            anchor[b, :len(chosen)], real[b, :len(chosen)] = np.sort(chosen), True
        return Batch(tokens, segment, position, states, anchor, real, self._subset(tokens, rng))

    def _subset(self, tokens: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The batch's own tokens, then the most frequent, then (a quarter) random ones; sorted."""
        size, vocab = self.config.vocab_subset, self.dataset.info.vocab_size
        if size is None or size >= vocab:
            return np.zeros((0,), np.int32)
        own = np.unique(tokens)
        frequent = self._frequent[:size * 3 // 4]
        ranked = np.concatenate([own, frequent[:size - own.size], rng.permutation(vocab)])
        _, first = np.unique(ranked, return_index=True)
        return np.sort(ranked[np.sort(first)[:size]]).astype(np.int32)


def pack(lengths: list[tuple[int, int]], room: int) -> list[list[int]]:
    """Puts (item, length) pairs into rows of at most `room`, each into the first row that still has room.

    Only the 64 rows opened last are looked at, so packing stays fast and nearly as tight.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for item, length in lengths:
        for r in range(max(0, len(rows) - 64), len(rows)):
            if free[r] >= length:
                break
        else:
            r = len(rows)
            rows.append([])
            free.append(room)
        rows[r].append(item)
        free[r] -= length
    return rows
