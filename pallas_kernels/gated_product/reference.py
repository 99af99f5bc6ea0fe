"""Both products of a gated MLP and their gate in plain JAX: the meaning of the kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def gated_product(x: Array, weight: Array) -> Array:
    """silu(x gate) * (x up).

    Args:
        x: [B, N, D].
        weight: [D, 2F], gate and up side by side.

    Returns:
        [B, N, F].
    """
    return gate(jnp.matmul(x, weight, precision=jax.lax.Precision.HIGHEST))


def gate(products: Array) -> Array:
    """[B, N, 2F] -> [B, N, F]: silu of the first half times the second."""
    first, second = jnp.split(products, 2, axis=-1)
    return jax.nn.silu(first) * second
