"""One decoding round and the loop around it, all on the device (design of arXiv 2606.18394 section 3).

A round: draft a tree, run the target on its nodes under their ancestor bits, accept the longest branch that the target
agrees with, commit that branch alone. Nothing is ever rolled back, because nothing else is ever written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from jetspec_jax.attention import causal_bits
from jetspec_jax.cache import KVCache
from jetspec_jax.collectives import count_everywhere
from jetspec_jax.config import TargetConfig
from jetspec_jax.draft import Drafter, Params, Prompt
from jetspec_jax.sampling import NO_TOKEN, Sampler, choose, sound
from jetspec_jax.target import TargetOutput, target_forward, target_logits
from jetspec_jax.tree import DraftTree
from jetspec_jax.verify import AcceptedPath, accept


@dataclass(frozen=True)
class Decoder:
    """What is static of a decoding run.

    Attributes:
        target: its shape, or a device's share of it.
        drafter: how trees are drafted.
        data_shards: groups of devices that decode other sequences each.
    """

    target: TargetConfig
    drafter: Drafter
    data_shards: int = 1


@struct.dataclass
class DecodeState:
    """State between rounds.

    The last committed token is the anchor: decided, but the target has not run on it yet, so `length - 1` tokens are
    in the target's cache. A sequence that is done keeps all its arrays as they are.
    """

    tokens: Array  # int32 [B, S], prompt and answer; the latter ends in NO_TOKEN if the target gave no sound logits
    length: Array  # int32 [B], committed tokens
    limit: Array  # int32 [B], length at which the sequence must end
    done: Array  # bool [B]
    cache: KVCache  # of the target
    drafter: Any  # what the drafter carries
    sampler: Sampler
    keys: Array  # [B] random keys, one per sequence
    eos: Array  # int32 [E], token ids that end a sequence, padded with -1
    rounds: Array  # int32 [B]
    accept_lengths: Array  # int32 [B, S], per round, the free token included
    tree_sizes: Array  # int32 [B, S], per round


@struct.dataclass
class Prefix:
    """Prompts that have been read: caches, and the token that follows each."""

    cache: KVCache
    drafter: Any
    first_token: Array  # int32 [R], NO_TOKEN where the target gave no sound logits


def create_state(decoder: Decoder, batch: int, slots: int, sampler: Sampler, eos: Array) -> DecodeState:
    """A state of B finished rows, to be filled by `insert`.

    Args:
        batch: B.
        slots: S; at least the longest length plus the drafter's `max_path`.
        sampler: how tokens are chosen.
        eos: int32 [E], token ids that end a sequence.

    Returns:
        The state; `run_rounds` on it does nothing.
    """
    zeros = jnp.zeros((batch,), jnp.int32)
    log = jnp.zeros((batch, slots), jnp.int32)
    return DecodeState(
        tokens=log, length=zeros + 1, limit=zeros, done=jnp.ones((batch,), bool),
        cache=KVCache.create(decoder.target, batch, slots), drafter=decoder.drafter.create(batch, slots),
        sampler=sampler, keys=jax.vmap(jax.random.key)(zeros), eos=eos, rounds=zeros, accept_lengths=log,
        tree_sizes=log)


def prefill(decoder: Decoder, chunk: int, params: Params, sampler: Sampler, tokens: Array, count: Array,
            keys: Array) -> Prefix:
    """Reads prompts chunk by chunk; only as many chunks as the longest prompt needs.

    Args:
        chunk: tokens per forward; divides P.
        tokens: int32 [R, P], padded on the right.
        count: int32 [R], prompt lengths, at least 1.
        keys: [R] random keys.

    Returns:
        Caches of R prompts with P slots, and each one's first answer token.
    """
    batch, width = tokens.shape
    visible = causal_bits(batch, chunk)

    def read(i: Array, carry: tuple[KVCache, Any, Array]) -> tuple[KVCache, Any, Array]:
        cache, drafter, last = carry
        start = i.astype(jnp.int32) * chunk
        positions = jnp.broadcast_to((start + jnp.arange(chunk, dtype=jnp.int32))[None], (batch, chunk))
        piece = lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
        # A prompt that ended in an earlier chunk has nothing left to attend to.
        cached = jnp.where(start < count, start, 0)
        out = target_forward(decoder.target, params.target, piece, positions, visible, cache, cached,
                             decoder.drafter.taps)
        final = jnp.clip(count - 1 - start, 0, chunk - 1)
        here = (count > start) & (count <= start + chunk)
        last = jnp.where(here[:, None], jnp.take_along_axis(out.hidden, final[:, None, None], axis=1)[:, 0], last)
        return (cache.write_chunk(out.k, out.v, start),
                decoder.drafter.read_prompt(params, drafter, Prompt(tokens, count), out.tapped, start), last)

    carry = (KVCache.create(decoder.target, batch, width), decoder.drafter.create(batch, width),
             jnp.zeros((batch, decoder.target.hidden_size), decoder.target.jnp_dtype))
    chunks = ((jnp.max(count) + chunk - 1) // chunk).astype(jnp.int32)
    cache, drafter, last = lax.fori_loop(jnp.int32(0), chunks, read, carry)
    logits = target_logits(decoder.target, params.target, last[:, None])
    first = choose(sampler, logits, keys, count, jnp.zeros((batch, 1), jnp.int32), depths=1)
    return Prefix(cache, drafter, jnp.where(sound(logits, sampler.shards), first, NO_TOKEN)[:, 0])


def insert(decoder: Decoder, state: DecodeState, prefix: Prefix, rows: Array, tokens: Array, count: Array,
           limit: Array, keys: Array) -> DecodeState:
    """Starts R read prompts in rows `rows` int32 [R] of the state; a row >= B is dropped (padding of R).

    Args:
        tokens, count, keys: as given to `prefill`.
        limit: int32 [R], length at which each sequence must end.

    Returns:
        The state with those rows started; the others keep their bits.
    """
    width = min(tokens.shape[1], state.tokens.shape[1])
    slot = jnp.arange(state.tokens.shape[1], dtype=jnp.int32)[None, :]
    padded = jnp.pad(tokens[:, :width], ((0, 0), (0, state.tokens.shape[1] - width)))
    prompt = jnp.where(slot < count[:, None], padded, 0)
    started = jnp.where(slot == count[:, None], prefix.first_token[:, None], prompt)
    length = count + 1
    done = (length >= limit) | ends(prefix.first_token, state.eos)

    def put(old: Array, new: Array) -> Array:
        return old.at[rows].set(new, mode="drop")

    return replace(
        state,
        tokens=put(state.tokens, started), length=put(state.length, length), limit=put(state.limit, limit),
        done=put(state.done, done), cache=state.cache.insert(prefix.cache, rows),
        drafter=decoder.drafter.insert(state.drafter, prefix.drafter, rows), keys=put(state.keys, keys),
        rounds=put(state.rounds, jnp.zeros_like(count)))


def decode_round(decoder: Decoder, params: Params, state: DecodeState) -> DecodeState:
    """One round for every sequence that is not done."""
    active = ~state.done
    position = jnp.where(active, state.length - 1, 0)  # of the anchor, and the number of cached tokens
    tree, drafter = decoder.drafter.propose(params, state.drafter, state.tokens, position)
    out, logits = run_target(decoder, params, state.cache, tree, position)
    path = judge(decoder, state, tree, logits, position)
    count = jnp.where(active, path.count, 0)
    with jax.named_scope("commit"):
        cache = commit(state.cache, out, path, position, count)
        new = record(state, path, count, tree.size)
        drafter = decoder.drafter.observe(drafter, out.tapped, path.nodes, jnp.where(new.done, 0, count))
        return replace(new, cache=cache, drafter=drafter)


def run_target(decoder: Decoder, params: Params, cache: KVCache, tree: DraftTree,
               position: Array) -> tuple[TargetOutput, Array]:
    """The target's forward on all nodes of the tree, and its logits [B, N, V] there."""
    with jax.named_scope("verify"):
        out = target_forward(decoder.target, params.target, tree.token, position[:, None] + tree.depth,
                             tree.ancestors, cache, position, decoder.drafter.taps)
        return out, target_logits(decoder.target, params.target, out.hidden)


def judge(decoder: Decoder, state: DecodeState, tree: DraftTree, logits: Array, position: Array) -> AcceptedPath:
    """The target's choice after every node, and the longest branch that agrees with it.

    What follows a node whose logits are not sound is NO_TOKEN, with which the answer ends.
    """
    with jax.named_scope("accept"):
        longest = decoder.drafter.max_path
        verdict = choose(state.sampler, logits, state.keys, position + 1, tree.depth, depths=longest)
        path = accept(tree, verdict, longest)
        on_path = jnp.take_along_axis(logits, path.nodes[:, :, None], axis=1)
        return replace(path, tokens=jnp.where(sound(on_path, state.sampler.shards), path.tokens, NO_TOKEN))


def commit(cache: KVCache, out: TargetOutput, path: AcceptedPath, position: Array, count: Array) -> KVCache:
    """Writes the keys and values of the accepted path, and of nothing else."""
    rows = path.nodes[None, :, :, None, None]
    return cache.commit(jnp.take_along_axis(out.k, rows, axis=2), jnp.take_along_axis(out.v, rows, axis=2), position,
                        count, after=path.tokens[:, 0] & jnp.int32(2**31 - 1))  # NO_TOKEN is negative


def record(state: DecodeState, path: AcceptedPath, count: Array, tree_size: Array) -> DecodeState:
    """Appends the new tokens, finds out who is done, and logs the round."""
    batch, slots = state.tokens.shape
    step = jnp.arange(path.tokens.shape[1], dtype=jnp.int32)[None, :]
    new = step < count[:, None]  # [B, R]
    sequence = jnp.arange(batch, dtype=jnp.int32)[:, None]
    at = jnp.where(new, state.length[:, None] + step, slots)
    tokens = state.tokens.at[sequence, at].set(path.tokens, mode="drop")

    is_end = new & ends(path.tokens, state.eos)
    up_to_end = jnp.where(jnp.any(is_end, axis=1), jnp.argmax(is_end, axis=1).astype(jnp.int32) + 1, count)
    length = jnp.minimum(state.length + up_to_end, state.limit)
    active = ~state.done
    done = state.done | (length >= state.limit) | jnp.any(is_end, axis=1)

    here = jnp.where(active, state.rounds, slots)[:, None]  # a finished sequence logs nothing
    return replace(
        state,
        tokens=tokens, length=jnp.where(active, length, state.length), done=done,
        rounds=state.rounds + active.astype(jnp.int32),
        accept_lengths=state.accept_lengths.at[sequence, here].set(count[:, None], mode="drop"),
        tree_sizes=state.tree_sizes.at[sequence, here].set(tree_size[:, None], mode="drop"))


def ends(tokens: Array, eos: Array) -> Array:
    """Which tokens int32 [...] end a sequence: those of `eos` int32 [E], and where there is none."""
    return (tokens == NO_TOKEN) | jnp.any(tokens[..., None] == eos.reshape((1,) * tokens.ndim + (-1,)), axis=-1)


def run_rounds(decoder: Decoder, params: Params, state: DecodeState, max_rounds: Array,
               min_active: Array) -> DecodeState:
    """Rounds in one device-resident loop, with nothing fetched by the host in between.

    Stops after `max_rounds` (int32) rounds, or as soon as fewer than `min_active` (int32, at least 1) sequences are
    unfinished: 1 to finish all, the present number to stop when a row can be refilled.
    """

    def count_active(state: DecodeState) -> Array:
        return count_everywhere(~state.done, decoder.data_shards)

    def unfinished(carry: tuple[Array, Array, DecodeState]) -> Array:
        i, active, _ = carry
        return (i < max_rounds) & (active >= min_active)

    def step(carry: tuple[Array, Array, DecodeState]) -> tuple[Array, Array, DecodeState]:
        i, _, state = carry
        state = decode_round(decoder, params, state)
        return i + 1, count_active(state), state

    return lax.while_loop(unfinished, step, (jnp.int32(0), count_active(state), state))[2]
