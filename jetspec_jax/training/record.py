"""Answers of the target together with the states that a head is trained on.

Decoding computes every state that training needs, so nothing is run twice: a drafter that drafts nothing keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax

from jetspec_jax import draft
from jetspec_jax.config import SamplingParams
from jetspec_jax.decode import Decoder, DecodeState
from jetspec_jax.draft import NoDrafter, Params, plain_nodes
from jetspec_jax.errors import JetSpecError
from jetspec_jax.generate import Prompt, Request, Run, StreamChunk, read_requests
from jetspec_jax.pair import Pair
from jetspec_jax.sampling import Sampler
from jetspec_jax.tree import DraftTree


@struct.dataclass
class _Record:
    """States of every position so far, as the bits of bfloat16 (a CPU would widen a bfloat16 array at every write)."""

    states: Array  # uint16 [B, S, T*D]
    position: Array  # int32 [B], of the anchor


@dataclass(frozen=True)
class _Recorder(NoDrafter):
    """Plain decoding that keeps the outputs of some target layers."""

    layers: tuple[int, ...]
    width: int  # D

    @property
    def taps(self) -> tuple[int, ...]:
        return self.layers

    def create(self, batch: int, slots: int) -> Any:
        return _Record(jnp.zeros((batch, slots, len(self.layers) * self.width), jnp.uint16),
                       jnp.zeros((batch,), jnp.int32))

    def read_prompt(self, params: Params, state: Any, prompt: draft.Prompt, tapped: Array, start: Array) -> Any:
        return replace(state, states=lax.dynamic_update_slice_in_dim(state.states, _bits(tapped), start, axis=1))

    def insert(self, state: Any, other: Any, rows: Array) -> Any:
        slots = min(state.states.shape[1], other.states.shape[1])
        return replace(state, states=state.states.at[rows, :slots].set(other.states[:, :slots], mode="drop"))

    def propose(self, params: Params, state: Any, tokens: Array, position: Array) -> tuple[DraftTree, Any]:
        return super().propose(params, replace(state, position=position), tokens, position)

    def observe(self, state: Any, tapped: Array, path: Array, count: Array) -> Any:
        batch, slots = state.states.shape[:2]
        # An anchor has a prompt before it, so position 0 is a sequence that had finished before this round. (`count`
        # is 0 for the round that finishes a sequence too, and its state is wanted.)
        at = jnp.where(state.position > 0, state.position, slots)
        return replace(state, states=state.states.at[jnp.arange(batch, dtype=jnp.int32), at].set(
            _bits(tapped[:, 0]), mode="drop"))


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


@dataclass(frozen=True)
class Recording:
    """One prompt with the target's answer.

    Attributes:
        index: which prompt.
        tokens: int32 [n], prompt and answer.
        prompt_length: tokens of the prompt.
        states: uint16 [n-1, T*D], bits of the bfloat16 outputs of the tapped layers; the target has not run on the
            last token.
    """

    index: int
    tokens: np.ndarray
    prompt_length: int
    states: np.ndarray


class _RecordingRun(Run):
    """A run of plain decoding that hands out each finished row's states before the row is refilled."""

    recordings: list[Recording]

    def _report(self, state: DecodeState, rows: list[Request | None], with_text: bool) -> Iterator[StreamChunk]:
        before = {request.index: (b, request) for b, request in enumerate(rows) if request is not None}
        for chunk in super()._report(state, rows, with_text):
            if chunk.result is not None:
                if chunk.result.error is not None:  # a target that overflows has nothing to teach
                    raise JetSpecError(chunk.result.error)
                b, request = before[chunk.index]
                tokens = np.asarray(request.ids + chunk.result.token_ids, np.int32)
                states = np.asarray(state.drafter.states[b])[:len(tokens) - 1].copy()
                self.recordings.append(Recording(chunk.index, tokens, len(request.ids), states))
            yield chunk


def record_answers(pair: Pair, prompts: Sequence[Prompt], layers: tuple[int, ...], *, max_new_tokens: int,
                   batch_size: int, sampling: SamplingParams, seed: int,
                   indices: list[int] | None = None) -> Iterator[Recording]:
    """Answers many prompts at full batch and yields each as it finishes.

    Args:
        layers: the target layers whose outputs are kept.
        indices: the prompts' own numbers, which key their noise; by default their place in the list.

    Raises:
        JetSpecError: prompts that cannot be read, a pair on a mesh, or logits that are not finite.
    """
    if pair.mesh is not None:
        raise JetSpecError("answers are recorded on one device: load the pair without a mesh (several processes can "
                           "record other prompts)")
    requests = read_requests(pair, list(prompts), max_new_tokens)
    nodes = plain_nodes(min(batch_size, len(requests)), jax.default_backend() == "gpu")
    decoder = Decoder(pair.target_config, _Recorder(layers, pair.target_config.hidden_size, nodes=nodes))
    for request, index in zip(requests, indices or range(len(prompts)), strict=True):
        request.index = index
    run = _RecordingRun(pair, decoder, Sampler.create(sampling), pair.target_config.eos_token_ids, seed,
                        max_new_tokens)
    run.recordings = []
    for _ in run.steps(requests, min(batch_size, len(requests)), None):
        while run.recordings:
            yield run.recordings.pop()
    yield from run.recordings


def record_texts(pair: Pair, texts: Sequence[tuple[list[int], int]], layers: tuple[int, ...], *, batch_size: int,
                 indices: list[int] | None = None) -> Iterator[Recording]:
    """Other people's answers with the states that the target has on them.

    Args:
        texts: (token ids of prompt and answer, tokens of the prompt).
    """
    indices = indices or list(range(len(texts)))
    lengths = {index: length for index, (_, length) in zip(indices, texts, strict=True)}
    for found in record_answers(pair, [ids for ids, _ in texts], layers, max_new_tokens=1, batch_size=batch_size,
                                sampling=SamplingParams(), seed=0, indices=indices):
        # The target's own next token is dropped; its state on the text's last token is too, as nothing follows it.
        yield Recording(found.index, found.tokens[:-1], lengths[found.index],
                        found.states[:len(found.tokens) - 2])
