"""Which experts a token goes to, in plain JAX: the meaning of the kernel."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def router(x: Array, matrix: Array, choices: int, normalised: bool) -> tuple[Array, Array]:
    """The `choices` most likely experts of each token; of equal ones the lower id.

    The logits stay wide, unlike those of transformers: rounded to bfloat16 they would often tie.

    Args:
        x: [N, D].
        matrix: [D, E].
        choices: A.
        normalised: the weights of the chosen experts sum to one; otherwise they are their shares of all experts.

    Returns:
        (experts int32 [N, A], most likely first; their weights float32 [N, A], float64 for float64). Of a token with a
        NaN among its logits they are any A different experts, with NaN for weights.
    """
    logits = jnp.matmul(x, matrix, precision=lax.Precision.HIGHEST,
                        preferred_element_type=np.promote_types(x.dtype, np.float32))
    best, experts = lax.top_k(logits, choices)
    total = jax.nn.logsumexp(best if normalised else logits, axis=-1, keepdims=True)
    # The best may be without a NaN: one with a sign comes last.
    return experts, jnp.where(jnp.any(jnp.isnan(logits), axis=-1, keepdims=True), jnp.nan, jnp.exp(best - total))
