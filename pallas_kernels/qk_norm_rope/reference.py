"""The step between the fused query/key/value product and attention, in plain JAX: the meaning of the kernel."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from pallas_kernels.add_norm.reference import rms_norm


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Half-split rotary embedding of x [B, M, heads, C] by tables [B, M, C/2]."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def qk_norm_rope(projected: Array, q_scale: Array | None, k_scale: Array | None, cos: Array, sin: Array, heads: int,
                 kv_heads: int, queries: int, eps: float) -> tuple[Array, Array, Array]:
    """Splits, norms and rotates.

    Args:
        projected: [B, M, (H+2K)*C], queries, keys and values of every row side by side.
        q_scale, k_scale: [C], of the norms; None for models without them.
        cos, sin: float32 [B, M, C/2] (float64 for float64).
        heads, kv_heads: H, K.
        queries: N; the last N rows ask.
        eps: of the norms.

    Returns:
        (q [B, N, H, C], k [B, M, K, C], v [B, M, K, C]).
    """
    batch, rows, _ = projected.shape
    split = projected.reshape(batch, rows, heads + 2 * kv_heads, -1)
    q, k, v = jnp.split(split, (heads, heads + kv_heads), axis=2)
    asking = slice(rows - queries, None)
    q = q[:, asking]
    if q_scale is not None:
        q = rms_norm(q, q_scale, eps)
    if k_scale is not None:
        k = rms_norm(k, k_scale, eps)
    return rotate(q, cos[:, asking], sin[:, asking]), rotate(k, cos, sin), v
