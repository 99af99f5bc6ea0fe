"""The next token from logits: argmax, or temperature / top-k / top-p and noise that is keyed by position.

Plain and tree decoding call the same function. A token is the argmax of warped log-probabilities plus Gumbel noise
that depends on (seed, sequence, absolute position) alone. Only one path is ever followed and the tree never sees the
noise, so this is exactly ancestral sampling, and both ways of decoding draw the same tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from jetspec_jax.config import SamplingParams
from pallas_kernels.top_w.reference import argmax_last


@struct.dataclass
class Sampler:
    """SamplingParams resolved once: which steps exist is static, their numbers are operands (no recompilation)."""

    temperature: Array  # float32 scalar
    top_k: Array  # int32 scalar
    top_p: Array  # float32 scalar
    greedy: bool = struct.field(pytree_node=False)
    use_top_k: bool = struct.field(pytree_node=False)
    use_top_p: bool = struct.field(pytree_node=False)

    @classmethod
    def create(cls, params: SamplingParams) -> Sampler:
        greedy = params.temperature == 0
        return cls(temperature=jnp.asarray(params.temperature, jnp.float32),
                   top_k=jnp.asarray(min(params.top_k or 1, 2**31 - 1), jnp.int32),
                   top_p=jnp.asarray(1.0 if params.top_p is None else params.top_p, jnp.float32),
                   greedy=greedy, use_top_k=not greedy and params.top_k is not None,
                   use_top_p=not greedy and params.top_p is not None and params.top_p < 1)


def choose(sampler: Sampler, logits: Array, keys: Array, position: Array, offset: Array, depths: int) -> Array:
    """The target's verdict at every node.

    Args:
        sampler: how to choose.
        logits: float [B, N, V].
        keys: [B] random keys, one per sequence.
        position: int32 [B], absolute position of the token drawn at offset 0.
        offset: int32 [B, N], how many positions further each row draws (a node's depth), below `depths`.
        depths: number of different offsets, so that noise is made once per position and not per node.

    Returns:
        int32 [B, N].
    """
    if sampler.greedy:
        return argmax_last(logits)
    logp = warp(sampler, logits)

    def noise(key: Array, start: Array) -> Array:
        draw = jax.vmap(lambda p: jax.random.gumbel(jax.random.fold_in(key, p), logits.shape[-1:], logits.dtype))
        return draw(start + jnp.arange(depths, dtype=jnp.int32))  # [depths, V]

    drawn = jax.vmap(noise)(keys, position)
    return argmax_last(logp + jnp.take_along_axis(drawn, offset[:, :, None], axis=1))


def warp(sampler: Sampler, logits: Array) -> Array:
    """Log-probabilities [..., V] after temperature, top-k and top-p; what is cut has -inf."""
    logits = logits / sampler.temperature.astype(logits.dtype)
    if sampler.use_top_k:
        ones = jnp.ones_like(logits)
        cut = mass_threshold(logits, ones, jnp.minimum(sampler.top_k, logits.shape[-1]).astype(logits.dtype))
        logits = jnp.where(logits >= cut, logits, -jnp.inf)
    logp = jax.nn.log_softmax(logits, axis=-1)
    if sampler.use_top_p:
        cut = mass_threshold(logp, jnp.exp(logp), sampler.top_p.astype(logp.dtype))
        logp = jax.nn.log_softmax(jnp.where(logp >= cut, logp, -jnp.inf), axis=-1)
    return logp


def mass_threshold(x: Array, weight: Array, mass: Array) -> Array:
    """The largest value t of x [..., V] with sum(weight where x >= t) >= mass, found without sorting.

    Floats are mapped to integers of the same order and the threshold is bisected bit by bit: 32 (64 for float64)
    passes over x, each a compare and a sum. Ties at the threshold are all kept. If rounding keeps the whole sum just
    below `mass`, the threshold falls below every value and nothing is cut.
    """
    ordered = _ordered_bits(x)
    word = ordered.dtype
    bits = word.itemsize * 8

    def refine(i: Array, low: Array) -> Array:
        tried = low | (jnp.ones((), word) << (jnp.asarray(bits - 1, word) - i.astype(word)))
        reached = jnp.sum(jnp.where(ordered >= tried, weight, 0), axis=-1, keepdims=True) >= mass
        return jnp.where(reached, tried, low)

    low = lax.fori_loop(jnp.int32(0), jnp.int32(bits), refine, jnp.zeros((*x.shape[:-1], 1), word))
    kept = ordered >= low
    return jnp.min(jnp.where(kept, x, jnp.inf), axis=-1, keepdims=True)


def _ordered_bits(x: Array) -> Array:
    """Unsigned integers that sort as the floats do (-inf lowest)."""
    word = jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32
    bits = lax.bitcast_convert_type(x, word)
    sign = jnp.asarray(1, word) << jnp.asarray(word(0).dtype.itemsize * 8 - 1, word)
    return jnp.where(bits & sign, ~bits, bits | sign)
