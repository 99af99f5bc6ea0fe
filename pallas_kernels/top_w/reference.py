"""The W most likely tokens in plain JAX: the meaning of the kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

BLOCK = 64  # divides the usual vocabularies


def top_w(logits: Array, width: int, skip: int = 0) -> tuple[Array, Array]:
    """The W most likely tokens of each row, most likely first (the lower id first among equals).

    Of a row that holds NaN or plus infinity they are any W different tokens, and the log-probabilities are not finite.

    Args:
        logits: float [B, N, V].
        width: W, at most V.
        skip: this many rows of every sequence are not looked at.

    Returns:
        (tokens int32, log-probabilities), each [B, N - skip, W].
    """
    logits = logits[:, skip:]
    if width == 1:
        tokens = argmax_last(logits)[..., None]
        top = jnp.take_along_axis(logits, tokens, axis=-1)
    else:
        # Where only some rows are used later, XLA on the CPU would cut the others off before, and then sort the
        # vocabulary instead of picking its best. One barrier for both would become one of top_k itself, on which XLA
        # aborts where it replaces top_k by a sort (float64).
        top, tokens = map(lax.optimization_barrier, lax.top_k(logits, width))
    return tokens.astype(jnp.int32), top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)


def argmax_last(x: Array) -> Array:
    """First index of the maximum over the last axis, int32; any index where there is a NaN.

    One pass over x takes the maximum of each block of `BLOCK` values, which vectorises where an argmax over the whole
    vocabulary does not; the rest looks at the winning block alone.
    """
    blocks = x.shape[-1] // BLOCK
    if blocks < 2:
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    grouped = x[..., :blocks * BLOCK].reshape(*x.shape[:-1], blocks, BLOCK)
    block = jnp.argmax(jnp.max(grouped, axis=-1), axis=-1).astype(jnp.int32)
    winner = jnp.take_along_axis(grouped, block[..., None, None], axis=-2)[..., 0, :]
    index = block * BLOCK + jnp.argmax(winner, axis=-1).astype(jnp.int32)
    if blocks * BLOCK == x.shape[-1]:
        return index
    tail = x[..., blocks * BLOCK:]
    in_tail = jnp.max(tail, axis=-1) > jnp.max(winner, axis=-1)
    return jnp.where(in_tail, blocks * BLOCK + jnp.argmax(tail, axis=-1).astype(jnp.int32), index)
