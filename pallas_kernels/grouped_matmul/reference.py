"""Experts in plain JAX: the meaning of the kernel. Experts that no token chose are skipped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def grouped_mlp(x: Array, experts: Array, weights: Array, gate_up: Array, down: Array) -> Array:
    """sum over a of weights[n, a] * down[e](silu(gate[e](x[n])) * up[e](x[n])), where e = experts[n, a].

    Args:
        x: [N, D], the tokens of all sequences.
        experts: int32 [N, A], the A different experts of each token. An id outside 0..E-1 (an expert that another
            device owns) adds nothing.
        weights: float32 [N, A] (float64 for float64).
        gate_up: [E, D, 2F], gate and up projections side by side.
        down: [E, F, D].

    Returns:
        float32 (float64 for float64) [N, D].
    """
    wide = np.promote_types(x.dtype, np.float32)

    def product(rows: Array, matrix: Array) -> Array:
        return jnp.matmul(rows, matrix, precision=lax.Precision.HIGHEST, preferred_element_type=wide)

    def add(expert: Array, chosen: Array, total: Array) -> Array:
        gate, up = jnp.split(product(x, gate_up[expert]), 2, axis=-1)
        out = product((jax.nn.silu(gate) * up).astype(x.dtype), down[expert])
        weight = jnp.sum(jnp.where(chosen, weights, 0), axis=1, keepdims=True)
        # Other tokens' results are not multiplied by zero: they may be infinite.
        return total + jnp.where(jnp.any(chosen, axis=1, keepdims=True), weight * out, 0)

    def one_expert(expert: Array, total: Array) -> Array:
        chosen = experts == expert
        return lax.cond(jnp.any(chosen), add, lambda expert, chosen, total: total, expert, chosen, total)

    return lax.fori_loop(jnp.int32(0), jnp.int32(gate_up.shape[0]), one_expert, jnp.zeros(x.shape, wide))
