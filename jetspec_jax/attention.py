"""`attend`: the one door to attention. Every caller differs only in bits: plain decoding, chunk, block, tree."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jetspec_jax.cache import KVCache
from jetspec_jax.config import AttentionBackend
from pallas_kernels.tree_attention import pallas, reference
from pallas_kernels.tree_attention.bits import pack_bits, unpack_bits

__all__ = ["Attend", "attend", "attend_with", "causal_bits", "pack_bits", "unpack_bits"]


Attend = Callable[[Array, Array, Array, int], Array]  # (q, new k, new v, layer) -> attended


def attend(q: Array, new_k: Array, new_v: Array, visible: Array, cache: KVCache, layer: int, cached: Array,
           backend: AttentionBackend = "auto") -> Array:
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
        return _BACKENDS[backend](q, new_k, new_v, visible, cache.k, cache.v, jnp.int32(layer), cached)


def attend_with(visible: Array, cache: KVCache, cached: Array, backend: AttentionBackend) -> Attend:
    """`attend` with everything but queries, new keys, new values and layer filled in: what a model's layers share."""
    return lambda q, new_k, new_v, layer: attend(q, new_k, new_v, visible, cache, layer, cached, backend)


def _by_platform(*arguments: Array) -> Array:
    """Decided when the program is lowered, so that a GPU program compiled elsewhere has the kernel too."""
    output: Array = lax.platform_dependent(*arguments, cuda=_kernel_or_reference, default=reference.tree_attention)
    return output


@jax.jit  # traced once for all layers
def _kernel_or_reference(*arguments: Array) -> Array:
    try:
        return pallas.tree_attention(*arguments)
    except NotImplementedError as reason:
        if jax.default_backend() == "gpu":
            warnings.warn(f"attention runs without its kernel, slowly: the kernel does not take {reason}", stacklevel=2)
        return reference.tree_attention(*arguments)


_BACKENDS: dict[AttentionBackend, Callable[..., Array]] = {
    "auto": _by_platform, "reference": reference.tree_attention, "pallas": pallas.tree_attention,
    "pallas_interpret": partial(pallas.tree_attention, interpret=True)}


def causal_bits(batch: int, size: int) -> Array:
    """Token n sees tokens 0..n: uint32 [B, N, ceil(N/32)]."""
    bits = pack_bits(jnp.tril(jnp.ones((size, size), bool)))
    return jnp.broadcast_to(bits[None], (batch, *bits.shape))
