"""A residual sum and the norm that reads it, in plain JAX: the meaning of the kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis, statistics in float32 (float64 stays), as Qwen3 and Llama do."""
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return wide.astype(x.dtype) * scale.reshape((1,) * (x.ndim - 1) + (-1,))


def add_norm(x: Array, delta: Array, scale: Array, before: Array | None = None, *,
             eps: float) -> tuple[Array, Array]:
    """x + delta, and its norm.

    Args:
        x, delta: [B, N, D].
        scale: [D].
        before: [B, E, D], rows that are put before the normed ones as they are.
        eps: of the norm.

    Returns:
        (sum [B, N, D], normed [B, E + N, D]).
    """
    total = x + delta
    return total, put_before(before, rms_norm(total, scale, eps))


def put_before(before: Array | None, rows: Array) -> Array:
    """[B, E, D] and [B, N, D] -> [B, E + N, D]."""
    return rows if before is None else jnp.concatenate([before, rows], axis=1)
