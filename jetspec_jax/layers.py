"""The blocks that target and head are made of: RMSNorm, gated MLP, one decoder layer."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jetspec_jax.attention import Attend
from jetspec_jax.collectives import all_sum
from jetspec_jax.config import TransformerConfig
from jetspec_jax.kernels import add_norm, gated_product, qk_norm_rope
from jetspec_jax.tiles import tile_count, tiled_product
from pallas_kernels.add_norm.reference import put_before, rms_norm
from pallas_kernels.gated_product.reference import gate

# float32 products must be float32 on every backend (a GPU would otherwise round the operands to TF32).
PRECISION = jax.lax.Precision.HIGHEST


class AttentionContext(NamedTuple):
    """What the attention of every layer of one forward shares.

    Attributes:
        cos, sin: [B, M, C/2] rotary tables of the M new rows.
        attend: (q [B, N, H, C], new k and v [B, M, K, C], layer) -> [B, N, H, C]; knows what each query sees.
    """

    cos: Array
    sin: Array
    attend: Attend


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, of `size` (by default D)."""

    config: TransformerConfig
    size: int | None = None

    def setup(self) -> None:
        c = self.config
        self.scale = self.param("scale", nn.initializers.ones, (self.size or c.hidden_size,), c.jnp_dtype)

    def __call__(self, x: Array) -> Array:
        return rms_norm(x, self.scale, self.config.rms_norm_eps)

    def after_adding(self, x: Array, delta: Array | None, before: Array | None = None) -> tuple[Array, Array]:
        """(x + delta, its norm after the rows `before`); a layer leaves its last residual sum to the norm that reads
        it."""
        if delta is None:
            return x, put_before(before, self(x))
        rows = (x, delta, self.scale) if before is None else (x, delta, self.scale, before)
        total, normed = add_norm(self.config.kernels, self.config.rms_norm_eps)(*rows)
        return total, normed


def dense(config: TransformerConfig, features: int, bias: bool = False, product: Any = None,
          split_input: bool = False) -> nn.Module:
    """A projection as every part of a model has it.

    Args:
        product: stands in for `lax.dot_general` (called with dimension numbers and more), or for `tiled_product`.
        split_input: the devices that share a layer hold parts of its input, and their products are summed (before the
            bias is added).
    """
    if config.weight_tile is not None:
        return TiledDense(features, config.weight_tile, bias, config.jnp_dtype, product or tiled_product)
    if product is None and config.product_dtype is not None:
        product = partial(rounded_dot_general, jnp.dtype(config.product_dtype))
    if split_input and config.shards > 1:
        product = partial(summed_dot_general, product or jax.lax.dot_general, config.shards)
    return nn.Dense(features, use_bias=bias, dtype=config.jnp_dtype, param_dtype=config.jnp_dtype, precision=PRECISION,
                    kernel_init=nn.initializers.normal(0.02), dot_general=product)


class TiledDense(nn.Module):
    """`nn.Dense` with its matrix in tiles."""

    features: int
    tile: int
    use_bias: bool
    dtype: jnp.dtype
    product: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (tile_count(self.features, self.tile), x.shape[-1], self.tile)
        out: Array = self.product(x, self.param("kernel", nn.initializers.normal(0.02), shape, self.dtype))
        if not self.use_bias:
            return out
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.dtype)
        return out + bias.reshape((1,) * (out.ndim - 1) + (-1,))


def summed_dot_general(product: Any, shards: int, *args: Any, **kwargs: Any) -> Array:
    """A product whose contracted axis is spread over the devices that share a layer."""
    return all_sum(product(*args, **kwargs), shards)


def rounded_dot_general(dtype: jnp.dtype, x: Array, w: Array, dimension_numbers: Any, precision: Any = None,
                        preferred_element_type: Any = None) -> Array:
    """`lax.dot_general` of x [..., A] with a matrix w [A, Z] for `nn.Dense`: operands rounded to `dtype`, sums in x's.

    The backward products are rounded the same way, which plain autodiff would not do.
    """
    assert dimension_numbers == (((x.ndim - 1,), (0,)), ((), ()))
    return rounded_product(dtype, x, w)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def rounded_product(dtype: jnp.dtype, x: Array, w: Array) -> Array:
    """x [..., A] @ w [A, Z] with operands rounded to `dtype` and sums in x's dtype."""
    return jnp.matmul(x.astype(dtype), w.astype(dtype), preferred_element_type=x.dtype)


def _rounded_forward(dtype: jnp.dtype, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return rounded_product(dtype, x, w), (x.astype(dtype), w.astype(dtype))


def _rounded_backward(dtype: jnp.dtype, operands: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, w = operands
    rounded = g.astype(dtype)
    rows = rounded.reshape(-1, w.shape[1])
    return (jnp.matmul(rounded, w.T, preferred_element_type=g.dtype),
            jnp.matmul(x.reshape(-1, w.shape[0]).T, rows, preferred_element_type=g.dtype))


rounded_product.defvjp(_rounded_forward, _rounded_backward)


class Attention(nn.Module):
    """Grouped-query attention. Queries, keys and values come from one product, so the input is read once."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        self.qkv_proj = dense(c, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.qkv_bias)
        self.o_proj = dense(c, c.hidden_size, c.out_bias, split_input=True)
        if c.qk_norm:
            self.q_norm = RMSNorm(c, c.head_dim)
            self.k_norm = RMSNorm(c, c.head_dim)

    def _project(self, x: Array, cos: Array, sin: Array, queries: int) -> tuple[Array, Array, Array]:
        """x [B, M, D] -> q [B, N, H, C] of its last N rows, k and v [B, M, K, C], normed and rotated."""
        c = self.config
        scales = (self.q_norm.scale, self.k_norm.scale) if c.qk_norm else (None, None)
        step = qk_norm_rope(c.kernels, heads=c.num_heads, kv_heads=c.num_kv_heads, queries=queries, eps=c.rms_norm_eps)
        q, k, v = step(self.qkv_proj(x), *scales, cos, sin)
        return q, k, v

    def keys_values(self, x: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
        """Keys and values alone, [B, M, K, C] each, of rows that ask nothing."""
        _, k, v = self._project(x, cos, sin, x.shape[1])
        return k, v

    def __call__(self, x: Array, context: AttentionContext, layer: int, queries: int) -> tuple[Array, Array, Array]:
        """Attends with the last `queries` rows of x [B, M, D]; returns (out [B, N, D], k, v [B, M, K, C])."""
        with jax.named_scope("qk_norm_rope"):
            q, k, v = self._project(x, context.cos, context.sin, queries)
        out = context.attend(q, k, v, layer)
        return self.o_proj(out.reshape(*out.shape[:2], -1)), k, v


class MLP(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x)), gate and up in one product."""

    config: TransformerConfig

    def setup(self) -> None:
        c = self.config
        self.gate_up_proj = dense(c, 2 * c.intermediate_size, product=self._gated_product)
        self.down_proj = dense(c, c.hidden_size, split_input=True)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(self.gate_up_proj(x))

    def _gated_product(self, x: Array, w: Array, *_: Any, **__: Any) -> Array:
        """x [B, N, D] and both matrices [D, 2F] -> [B, N, F]; the gate is applied where the product is made."""
        if self.config.weight_tile is not None:
            return gate(tiled_product(x, w))
        if self.config.product_dtype is not None:
            return gate(rounded_product(jnp.dtype(self.config.product_dtype), x, w))
        gated: Array = gated_product(self.config.kernels)(x, w)
        return gated


class DecoderLayer(nn.Module):
    """One pre-norm decoder layer of the Qwen3 / Llama family.

    Attributes:
        mlp_type: what follows the attention: a module made from the config, [B, N, D] -> [B, N, D].
    """

    config: TransformerConfig
    mlp_type: type[nn.Module] = MLP

    def setup(self) -> None:
        c = self.config
        self.input_layernorm = RMSNorm(c)
        self.attention = Attention(c)
        self.post_attention_layernorm = RMSNorm(c)
        self.mlp = self.mlp_type(c)

    def __call__(self, x: Array, delta: Array | None, context: AttentionContext, layer: int,
                 extra: Array | None = None) -> tuple[Array, Array, Array, Array]:
        """Runs the layer on x + delta.

        Args:
            x: [B, N, D], the residual stream.
            delta: [B, N, D], what the layer before adds to it; None at the first.
            extra: [B, E, D] rows that are seen but do not ask (a draft head's target features). They enter the
                key/value projections without the input norm, before the rows of x; M = E + N.

        Returns:
            (x [B, N, D] and delta [B, N, D], whose sum is the layer's output; k, v [B, M, K, C]).
        """
        x, rows = self.input_layernorm.after_adding(x, delta, extra)
        with jax.named_scope("attention"):
            attended, k, v = self.attention(rows, context, layer, x.shape[1])
        x, normed = self.post_attention_layernorm.after_adding(x, attended)
        with jax.named_scope("mlp"):
            return x, self.mlp(normed), k, v
