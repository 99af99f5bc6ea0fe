"""The frozen target model: Qwen3, dense or with experts, and Llama-style by the switches of `TargetConfig`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jetspec_jax.attention import attend_with
from jetspec_jax.cache import KVCache
from jetspec_jax.collectives import all_sum, own_start
from jetspec_jax.config import TargetConfig
from jetspec_jax.layers import MLP, PRECISION, AttentionContext, DecoderLayer, RMSNorm, rounded_product
from jetspec_jax.moe import MoE
from jetspec_jax.rotary import rotary_tables
from jetspec_jax.tiles import columns, tile_count, tiled_product


class TargetOutput(NamedTuple):
    """What one forward of the target returns; the cache is not written.

    Attributes:
        hidden: [B, N, D], after the final norm; `Target.logits` turns chosen rows into logits.
        tapped: [B, N, T*D], outputs of the tapped layers side by side (raw, before any norm).
        k, v: [L, B, N, K, C], keys and values of the N new tokens.
    """

    hidden: Array
    tapped: Array
    k: Array
    v: Array


class Target(nn.Module):
    """Decoder-only transformer over new tokens that see a cache and, by bits, each other."""

    config: TargetConfig

    def setup(self) -> None:
        c = self.config
        init, vocabulary = nn.initializers.normal(0.02), c.vocab_size // c.shards
        tile = c.weight_tile
        tiles = (tile_count(vocabulary, tile), c.hidden_size, tile) if tile else None
        self.embedding = self.param("embedding", init, (tiles if c.tie_embeddings and tiles else
                                                        (vocabulary, c.hidden_size)), c.jnp_dtype)
        self.layers = [DecoderLayer(c, MoE if c.has_experts(i) else MLP) for i in range(c.num_layers)]
        self.norm = RMSNorm(c)
        if not c.tie_embeddings:
            self.lm_head = self.param("lm_head", init, tiles or (c.hidden_size, vocabulary), c.jnp_dtype)

    def __call__(self, tokens: Array, positions: Array, visible: Array, cache: KVCache, cached: Array,
                 taps: tuple[int, ...] = ()) -> TargetOutput:
        """One forward pass.

        Args:
            tokens: int32 [B, N].
            positions: int32 [B, N], absolute positions (of a tree node: its depth, not its slot).
            visible: uint32 [B, N, ceil(N/32)]; bit m of row n: token n sees token m.
            cache: committed keys and values.
            cached: int32 [B], how many cache slots each sequence sees.
            taps: ids of the layers whose output is wanted.
        """
        c = self.config
        cos, sin = rotary_tables(c, positions)
        context = AttentionContext(cos, sin, attend_with(visible, cache, cached, c.kernels))
        x, delta = self.embed(tokens), None
        keys, values, outputs = [], [], {}
        for i, layer in enumerate(self.layers):
            x, delta, k, v = layer(x, delta, context, i)
            keys.append(k)
            values.append(v)
            if i in taps:
                outputs[i] = x + delta
        tapped = jnp.concatenate([outputs[i] for i in taps], axis=-1) if taps else x[..., :0]
        return TargetOutput(self.norm.after_adding(x, delta)[1], tapped, jnp.stack(keys), jnp.stack(values))

    def embed(self, tokens: Array) -> Array:
        """int32 [B, N] -> [B, N, D]."""
        if self.config.weight_tile is not None and self.config.tie_embeddings:
            return columns(self.embedding, tokens)
        rows, shards = self.embedding.shape[0], self.config.shards
        if shards == 1:
            return self.embedding[tokens]
        own = tokens - own_start(rows, shards)
        held = (own >= 0) & (own < rows)
        return all_sum(jnp.where(held[..., None], self.embedding[jnp.where(held, own, 0)], 0), shards)

    def logits(self, hidden: Array, subset: Array | None = None) -> Array:
        """[..., D] after the final norm -> float32 (float64 for float64) [..., V]; the draft head uses it too.

        Where devices share the vocabulary, each scores its own part of it, [..., V/shards].

        Args:
            subset: int32 [X], the only tokens to score; the result is then [..., X].
        """
        wide = np.promote_types(hidden.dtype, np.float32)
        axis = 0 if self.config.tie_embeddings else 1
        matrix = self.embedding if self.config.tie_embeddings else self.lm_head
        if self.config.weight_tile is not None:
            if subset is None:
                with jax.named_scope("lm_head"):
                    return tiled_product(hidden, matrix, wide)
            matrix, axis = columns(matrix, subset), 0
        elif subset is not None:
            matrix = jnp.take(matrix, subset, axis=axis)
        with jax.named_scope("lm_head"):
            if self.config.product_dtype is not None:
                return rounded_product(jnp.dtype(self.config.product_dtype), hidden.astype(wide),
                                       (matrix.T if axis == 0 else matrix).astype(wide))
            return jax.lax.dot_general(hidden, matrix, (((hidden.ndim - 1,), (1 - axis,)), ((), ())),
                                       precision=PRECISION, preferred_element_type=wide)


def target_forward(config: TargetConfig, params: dict, tokens: Array, positions: Array, visible: Array,
                   cache: KVCache, cached: Array, taps: tuple[int, ...] = ()) -> TargetOutput:
    """`Target.__call__` on explicit parameters."""
    output: Any = Target(config).apply(params, tokens, positions, visible, cache, cached, taps)
    return output


def target_embed(config: TargetConfig, params: dict, tokens: Array) -> Array:
    """`Target.embed` on explicit parameters."""
    output: Any = Target(config).apply(params, tokens, method=Target.embed)
    return output


def target_norm(config: TargetConfig, params: dict, states: Array) -> Array:
    """The final norm: outputs of the last layer [..., D] -> what `target_logits` takes."""
    norm = RMSNorm(config)
    output: Any = norm.apply({"params": params["params"]["norm"]}, states)
    return output


def target_logits(config: TargetConfig, params: dict, hidden: Array, subset: Array | None = None) -> Array:
    """`Target.logits` on explicit parameters."""
    output: Any = Target(config).apply(params, hidden, subset, method=Target.logits)
    return output


def init_target(config: TargetConfig, key: Array) -> dict:
    """Random parameters (standard deviation 0.02) of a target: `{"params": ...}`."""

    # Shapes only: a kernel would refuse the one-slot cache.
    config = replace(config, kernels="reference")

    def init(key: Array) -> Any:
        cache = KVCache.create(config, batch=1, slots=1)
        one = jnp.zeros((1, 1), jnp.int32)
        return Target(config).init(key, one, one, jnp.ones((1, 1, 1), jnp.uint32), cache, jnp.zeros((1,), jnp.int32),
                                   method=_touch_all)

    return jax.jit(init)(key)


def _touch_all(module: Target, *args) -> Array:
    """Runs everything that owns parameters, so that `init` makes them all."""
    return module.logits(module(*args).hidden)


def target_shapes(config: TargetConfig) -> dict:
    """The parameters as `jax.ShapeDtypeStruct`s: the one description of names and shapes of a target.

    Only the first layer of each kind is traced: the others are like it.
    """
    kinds = [config.has_experts(i) for i in range(config.num_layers)]
    firsts = list(dict.fromkeys(kinds))
    few = replace(config, num_layers=len(firsts), dense_layers=tuple(
        i for i, experts in enumerate(firsts) if config.num_experts and not experts))
    made = jax.eval_shape(lambda: init_target(few, jax.random.key(0)))["params"]
    layers = {f"layers_{i}": made[f"layers_{firsts.index(kind)}"] for i, kind in enumerate(kinds)}
    return {"params": {**made, **layers}}
