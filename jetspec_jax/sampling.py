"""The next token from logits: argmax, or temperature / top-k / top-p and noise that is keyed by position.

Plain and tree decoding call the same function. A token is the argmax of warped log-probabilities plus Gumbel noise
that depends on (seed, sequence, absolute position) alone. Only one path is ever followed and the tree never sees the
noise, so this is exactly ancestral sampling, and both ways of decoding draw the same tokens (but where two candidates
are closer than rounding).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from jetspec_jax.collectives import all_max, all_sum, own_part, own_start, side_by_side
from jetspec_jax.config import SamplingParams
from pallas_kernels.top_w.reference import argmax_last

NO_TOKEN = -1  # in the place of a token where logits are not sound; it ends an answer


@struct.dataclass
class Sampler:
    """SamplingParams resolved once: which steps exist is static, their numbers are operands (no recompilation)."""

    temperature: Array  # float32 scalar
    top_k: Array  # int32 scalar
    top_p: Array  # float32 scalar
    greedy: bool = struct.field(pytree_node=False)
    use_top_k: bool = struct.field(pytree_node=False)
    use_top_p: bool = struct.field(pytree_node=False)
    shards: int = struct.field(pytree_node=False, default=1)  # devices that the vocabulary is spread over

    @classmethod
    def create(cls, params: SamplingParams, shards: int = 1) -> Sampler:
        """The settings as operands of a program, so that others compile nothing; `shards` share the vocabulary."""
        greedy = params.temperature == 0
        return cls(temperature=jnp.asarray(params.temperature, jnp.float32),
                   top_k=jnp.asarray(min(params.top_k or 1, 2**31 - 1), jnp.int32),
                   top_p=jnp.asarray(1.0 if params.top_p is None else params.top_p, jnp.float32),
                   greedy=greedy, use_top_k=not greedy and params.top_k is not None,
                   use_top_p=not greedy and params.top_p is not None and params.top_p < 1, shards=shards)


def sequence_keys(seed: Array, index: Array) -> Array:
    """One random key per sequence, [R], from the seed (uint32 scalar) and the sequences' indices uint32 [R]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), index)


def choose(sampler: Sampler, logits: Array, keys: Array, position: Array, offset: Array, depths: int) -> Array:
    """The target's verdict at every node.

    Args:
        sampler: how to choose.
        logits: float [B, N, V], or this device's part of the vocabulary.
        keys: [B] random keys, one per sequence.
        position: int32 [B], absolute position of the token drawn at offset 0.
        offset: int32 [B, N], how many positions further each row draws (a node's depth), below `depths`.
        depths: number of different offsets, so that noise is made once per position and not per node.

    Returns:
        int32 [B, N]; meaningless where the logits are not `sound`.
    """
    if sampler.greedy:
        return argmax_everywhere(logits, sampler.shards)
    logp = warp(sampler, logits)
    vocabulary = logits.shape[-1] * sampler.shards

    def noise(key: Array, start: Array) -> Array:
        draw = jax.vmap(lambda p: jax.random.gumbel(jax.random.fold_in(key, p), (vocabulary,), logits.dtype))
        return draw(start + jnp.arange(depths, dtype=jnp.int32))  # [depths, V]

    drawn = own_part(jax.vmap(noise)(keys, position), sampler.shards)
    return argmax_everywhere(logp + jnp.take_along_axis(drawn, offset[:, :, None], axis=1), sampler.shards)


def argmax_everywhere(x: Array, shards: int) -> Array:
    """`argmax_last` where each device holds a part of the last axis: the index in the whole axis, on all of them."""
    best = argmax_last(x)
    if shards == 1:
        return best
    peak = jnp.take_along_axis(x, best[..., None], axis=-1)
    index = side_by_side((best + own_start(x.shape[-1], shards))[..., None], shards)  # [..., shards]
    winner = jnp.argmax(side_by_side(peak, shards), axis=-1, keepdims=True)  # the first of equals has the lowest index
    return jnp.take_along_axis(index, winner, axis=-1)[..., 0]


def sound(logits: Array, shards: int) -> Array:
    """Whether a token can be chosen from logits [..., V] at all: bool [...].

    Not from a NaN or plus infinity, nor where all are minus infinity. (A CPU's maximum drops a NaN.)
    """
    return jnp.isfinite(all_max(jnp.max(jnp.where(jnp.isnan(logits), jnp.inf, logits), axis=-1), shards))


def normalised(x: Array, shards: int) -> Array:
    """Log-probabilities from numbers of which the largest is at or little below zero, so that none overflows; over a
    last axis that may be spread over devices."""
    return x - jnp.log(all_sum(jnp.sum(jnp.exp(x), axis=-1, keepdims=True), shards))


def warp(sampler: Sampler, logits: Array) -> Array:
    """Log-probabilities [..., V] after temperature, top-k and top-p; what is cut has -inf."""
    # The best is at zero before the division, which a small temperature would otherwise make infinite, and stays there.
    peak = all_max(jnp.max(logits, axis=-1, keepdims=True), sampler.shards)
    logits = (logits - peak) / sampler.temperature.astype(logits.dtype)
    if sampler.use_top_k:
        ones = jnp.ones_like(logits)
        count = jnp.minimum(sampler.top_k, logits.shape[-1] * sampler.shards).astype(logits.dtype)
        cut = mass_threshold(logits, ones, count, sampler.shards)
        logits = jnp.where(logits >= cut, logits, -jnp.inf)
    logp = normalised(logits, sampler.shards)
    if sampler.use_top_p:
        cut = mass_threshold(logp, jnp.exp(logp), sampler.top_p.astype(logp.dtype), sampler.shards)
        logp = normalised(jnp.where(logp >= cut, logp, -jnp.inf), sampler.shards)
    return logp


def mass_threshold(x: Array, weight: Array, mass: Array, shards: int = 1) -> Array:
    """The largest value t of x [..., V] with sum(weight where x >= t) >= mass, found without sorting.

    Floats are mapped to integers of the same order and the threshold is bisected bit by bit: 32 (64 for float64)
    passes over x, each a compare and a sum (over all devices where they share the axis). Ties at the threshold are all
    kept. If rounding keeps the whole sum just below `mass`, the threshold falls below every value and nothing is cut;
    if `mass` is so small that it counts as zero, the threshold is still no higher than the largest value.
    """
    ordered = _ordered_bits(x)
    word = ordered.dtype
    bits = word.itemsize * 8

    def refine(i: Array, low: Array) -> Array:
        tried = low | (jnp.ones((), word) << (jnp.asarray(bits - 1, word) - i.astype(word)))
        above = all_sum(jnp.sum(jnp.where(ordered >= tried, weight, 0), axis=-1, keepdims=True), shards)
        return jnp.where((above >= mass) & (above > 0), tried, low)

    low = lax.fori_loop(jnp.int32(0), jnp.int32(bits), refine, jnp.zeros((*x.shape[:-1], 1), word))
    kept = ordered >= low
    return -all_max(-jnp.min(jnp.where(kept, x, jnp.inf), axis=-1, keepdims=True), shards)


def _ordered_bits(x: Array) -> Array:
    """Unsigned integers that sort as the floats do (-inf lowest)."""
    word = jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32
    bits = lax.bitcast_convert_type(x, word)
    sign = jnp.asarray(1, word) << jnp.asarray(word(0).dtype.itemsize * 8 - 1, word)
    return jnp.where(bits & sign, ~bits, bits | sign)
