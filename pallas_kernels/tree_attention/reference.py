"""Tree attention in plain JAX: the definition that every kernel must equal, and what runs off the GPU."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from pallas_kernels.tree_attention.bits import unpack_bits

# Cache slots looked at in one step: few steps, but pieces that stay in a CPU's cache. The loop ends at the longest
# committed length, so empty slots cost nothing.
MAX_BLOCK, MIN_BLOCK, PIECE = 512, 32, 2**19


def block_size(batch: int, kv_heads: int, width: int) -> int:
    """Cache slots per step: the largest power of two whose piece [B, K, block, C] has at most PIECE elements."""
    fitting = PIECE // (batch * kv_heads * width)
    return min(MAX_BLOCK, max(MIN_BLOCK, 1 << max(fitting, 1).bit_length() - 1))


def settle(keys: Array, values: Array) -> tuple[Array, Array]:
    """Moves what is not finite from values to keys, [..., C] each: such a value becomes zero and its key NaN.

    A mask chooses between scores but multiplies values by a weight of zero, and zero times infinity is NaN. So a query
    that sees such a token gets NaN through its score, and one that does not meets a zero.
    """
    finite = (jnp.abs(values) < jnp.inf).astype(jnp.int32)  # spelt so that Triton knows it
    sound = jnp.min(finite, axis=-1, keepdims=True) == 1
    return jnp.where(sound, keys, jnp.nan), jnp.where(sound, values, 0)


def tree_attention(q: Array, new_k: Array, new_v: Array, visible: Array, cache_k: Array, cache_v: Array,
                   layer: Array | int, cached: Array) -> Array:
    """Softmax attention over the first `cached` cache slots and the visible new tokens.

    A token that a query does not see adds nothing to it, whatever its key and value hold. Scores are scaled by
    1/sqrt(C); softmax and sums are float32 (float64 for float64). Keys are met block by block with a running maximum,
    so nothing of the size of the cache is ever materialised.

    Args:
        q: [B, N, H, C].
        new_k, new_v: [B, M, K, C]; query head h reads key/value head h // (H/K).
        visible: uint32 [B, N, ceil(M/32)], packed rows of the mask over new tokens.
        cache_k, cache_v: [L, B, K, S, C], read only below `cached`.
        layer: which of the L layers.
        cached: int32 [B].

    Returns:
        [B, N, H, C] in q's dtype; a query that sees nothing gets zeros.
    """
    batch, queries, heads, width = q.shape
    new, kv_heads, slots = new_k.shape[1], new_k.shape[2], cache_k.shape[3]
    group = heads // kv_heads
    wide = np.promote_types(q.dtype, np.float32)
    # Heads of a group become rows of one product: [B, K, group*N, C].
    rows = q.reshape(batch, queries, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(batch, kv_heads, group * queries, width)

    def partial_softmax(keys: Array, values: Array, mask: Array, carry: tuple[Array, Array, Array]):
        """Adds keys [B, K, X, C] under mask [B, 1, rows or 1, X] to the running (sum of values, sum, maximum)."""
        total, norm, peak = carry
        scores = jnp.einsum("bkrc,bkxc->bkrx", rows, keys, precision=lax.Precision.HIGHEST,
                            preferred_element_type=wide) * jnp.asarray(width**-0.5, wide)
        scores = jnp.where(mask, scores, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1, keepdims=True))
        finite_peak = jnp.where(jnp.isfinite(new_peak), new_peak, 0)
        weights = jnp.exp(scores - finite_peak)
        decay = jnp.exp(peak - finite_peak)
        total = total * decay + jnp.einsum("bkrx,bkxc->bkrc", weights.astype(values.dtype), values,
                                           precision=lax.Precision.HIGHEST, preferred_element_type=wide)
        return total, norm * decay + jnp.sum(weights, axis=-1, keepdims=True), new_peak

    empty = (jnp.zeros(rows.shape, wide), jnp.zeros((*rows.shape[:3], 1), wide),
             jnp.full((*rows.shape[:3], 1), -jnp.inf, wide))
    seen = jnp.tile(unpack_bits(visible, new), (1, group, 1))[:, None]  # [B, 1, group*N, M]
    carry = partial_softmax(*settle(new_k.transpose(0, 2, 1, 3), new_v.transpose(0, 2, 1, 3)), seen, empty)

    block = min(block_size(batch, kv_heads, width), slots)
    layer = jnp.asarray(layer, jnp.int32)
    zero = jnp.int32(0)

    def over_cache(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        wanted = i.astype(jnp.int32) * block  # outside jit, under 64-bit types, the counter is int64
        start = jnp.minimum(wanted, slots - block)  # the last block of an odd-sized cache overlaps the one before
        piece = (1, batch, kv_heads, block, width)
        at = (layer, zero, zero, start, zero)
        slot = start + jnp.arange(block, dtype=jnp.int32)[None, :]
        mask = (slot >= wanted) & (slot < cached[:, None])  # [B, block]
        keys, values = (lax.dynamic_slice(side, at, piece)[0] for side in (cache_k, cache_v))
        return partial_softmax(keys, jnp.where(mask[:, None, :, None], values, 0), mask[:, None, None, :], carry)

    blocks = (jnp.max(cached) + block - 1) // block
    total, norm, _ = lax.fori_loop(zero, blocks.astype(jnp.int32), over_cache, carry)
    out = total / jnp.where(norm > 0, norm, 1)
    out = out.reshape(batch, kv_heads, group, queries, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, queries, heads, width).astype(q.dtype)
