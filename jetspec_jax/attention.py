"""`attend`: the one door to attention. Every caller differs only in bits: plain decoding, chunk, block, tree."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jetspec_jax import kernels
from jetspec_jax.cache import KVCache
from jetspec_jax.config import KernelBackend
from pallas_kernels.tree_attention.bits import pack_bits, unpack_bits

__all__ = ["Attend", "attend", "attend_with", "causal_bits", "pack_bits", "unpack_bits"]


Attend = Callable[[Array, Array, Array, int], Array]  # (q, new k, new v, layer) -> attended


def attend(q: Array, new_k: Array, new_v: Array, visible: Array, cache: KVCache, layer: int, cached: Array,
           backend: KernelBackend = "auto") -> Array:
    """Queries see the first `cached[b]` cache slots and those of the M new tokens that their bits allow.

    Args:
        q: [B, N, H, C].
        new_k, new_v: [B, M, K, C].
        visible: uint32 [B, N, ceil(M/32)].
        cache: committed keys and values of all layers.
        layer: which layer of the cache.
        cached: int32 [B].
        backend: "auto" takes the kernel on an NVIDIA GPU and the reference elsewhere.

    Returns:
        [B, N, H, C].
    """
    with jax.named_scope("attend"):
        attended: Array = kernels.tree_attention(backend)(q, new_k, new_v, visible, cache.k, cache.v, jnp.int32(layer),
                                                          cached)
        return attended


def attend_with(visible: Array, cache: KVCache, cached: Array, backend: KernelBackend) -> Attend:
    """`attend` with everything but queries, new keys, new values and layer filled in: what a model's layers share."""
    return lambda q, new_k, new_v, layer: attend(q, new_k, new_v, visible, cache, layer, cached, backend)


def causal_bits(batch: int, size: int) -> Array:
    """Token n sees tokens 0..n: uint32 [B, N, ceil(N/32)]."""
    bits = pack_bits(jnp.tril(jnp.ones((size, size), bool)))
    return jnp.broadcast_to(bits[None], (batch, *bits.shape))
