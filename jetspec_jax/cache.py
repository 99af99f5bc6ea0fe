"""The key/value cache: committed tokens only, one stacked array per side, written in place."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from jetspec_jax.config import TransformerConfig


@struct.dataclass
class KVCache:
    """Keys and values of committed tokens.

    Who owns it knows how many slots of each sequence are valid; slots beyond that are never read.
    """

    k: Array  # [L, B, K, S, C]
    v: Array  # [L, B, K, S, C]

    @classmethod
    def create(cls, config: TransformerConfig, batch: int, slots: int) -> KVCache:
        """Zeros for B sequences of at most S tokens, in the model's dtype."""
        shape = (config.num_layers, batch, config.num_kv_heads, slots, config.head_dim)
        return cls(jnp.zeros(shape, config.jnp_dtype), jnp.zeros(shape, config.jnp_dtype))

    def commit(self, k: Array, v: Array, start: Array, count: Array, after: Array) -> KVCache:
        """Writes the first `count[b]` of R rows at slots `start[b]...`; other slots keep their bits.

        A row that would fall outside the cache is dropped, never moved onto a valid slot.

        Args:
            k, v: [L, B, R, K, C].
            start, count: int32 [B].
            after: int32 [B], token ids (not negative) that follow from the forward which read this cache. The new
                keys of the last layer exist before that layer has read the old ones: unless the write waits for the
                forward's result, XLA copies the whole cache to keep both. (An optimization barrier is dropped on the
                CPU before copies are placed.)
        """
        batch, rows = k.shape[1:3]
        start = start + jnp.minimum(after, 0)
        step = jnp.arange(rows, dtype=jnp.int32)[None, :]
        slot = jnp.where(step < count[:, None], start[:, None] + step, self.k.shape[3])  # [B, R]
        sequence = jnp.broadcast_to(jnp.arange(batch, dtype=jnp.int32)[:, None], slot.shape)

        def write(side: Array, new: Array) -> Array:
            # Advanced indices around slices: the indexed axes come first, [B, R, L, K, C].
            return side.at[:, sequence, :, slot].set(new.transpose(1, 2, 0, 3, 4), mode="drop")

        return KVCache(write(self.k, k), write(self.v, v))

    def write_chunk(self, k: Array, v: Array, start: Array) -> KVCache:
        """Writes all R rows [L, B, R, K, C] of every sequence at one common slot `start` (int32 scalar)."""

        def write(side: Array, new: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(side, new.transpose(0, 1, 3, 2, 4), start, axis=3)

        return KVCache(write(self.k, k), write(self.v, v))

    def insert(self, other: KVCache, rows: Array) -> KVCache:
        """Puts the sequences of `other` (R of them) into rows `rows` int32 [R] of this cache; a row >= B is dropped."""
        slots = min(self.k.shape[3], other.k.shape[3])

        def write(side: Array, new: Array) -> Array:
            return side.at[:, rows, :, :slots].set(new[:, :, :, :slots], mode="drop")

        return KVCache(write(self.k, other.k), write(self.v, other.v))
