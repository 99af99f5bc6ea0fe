"""The mixture of experts that takes the place of the MLP in Qwen3-MoE."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jetspec_jax.collectives import all_sum, own_start
from jetspec_jax.config import TargetConfig
from jetspec_jax.kernels import grouped_mlp, router


class MoE(nn.Module):
    """Every token goes through the gated MLPs of its best experts, whose outputs are added by weight.

    The experts' weights are stacked, one array a projection, so that a kernel reads only those that were chosen. Where
    devices share a layer, each holds some whole experts, knows the router's choices of all tokens, and adds its part.
    """

    config: TargetConfig

    def setup(self) -> None:
        c = self.config
        init, dtype = nn.initializers.normal(0.02), c.jnp_dtype
        held, d, f = c.num_experts // c.shards, c.hidden_size, c.moe_intermediate_size
        self.router = self.param("router", init, (d, c.num_experts), dtype)
        self.gate_up_proj = self.param("gate_up_proj", init, (held, d, 2 * f), dtype)
        self.down_proj = self.param("down_proj", init, (held, f, d), dtype)

    def __call__(self, x: Array) -> Array:
        c = self.config
        rows = x.reshape(-1, c.hidden_size)  # [B*N, D]
        with jax.named_scope("router"):  # never in `product_dtype`: a rounded logit could choose another expert
            experts, weights = router(c.kernels, c.num_experts_per_tok, c.norm_topk_prob)(rows, self.router)
        with jax.named_scope("experts"):
            product = jnp.dtype(c.product_dtype or c.dtype)
            own = experts - own_start(c.num_experts // c.shards, c.shards)  # others' lie outside and add nothing
            out = grouped_mlp(c.kernels)(rows.astype(product), own, weights, self.gate_up_proj.astype(product),
                                         self.down_proj.astype(product))
        return all_sum(out.astype(x.dtype), c.shards).reshape(x.shape)
