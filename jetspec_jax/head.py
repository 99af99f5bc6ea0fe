"""The causal parallel draft head (arXiv 2606.18394 section 3; parameters as in the released checkpoints)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from jetspec_jax.attention import Attend, attend_with, pack_bits
from jetspec_jax.cache import KVCache
from jetspec_jax.collectives import own_part
from jetspec_jax.config import HeadConfig
from jetspec_jax.layers import AttentionContext, DecoderLayer, RMSNorm, dense
from jetspec_jax.rotary import rotary_tables


class HeadOutput(NamedTuple):
    """What one draft returns; the cache is not written.

    Attributes:
        hidden: [B, G, D], after the final norm; row i scores the token i places after the anchor, row 0 is unused.
        k, v: [L, B, E, K, C], keys and values of the pending rows, to be committed to the head's cache.
    """

    hidden: Array
    k: Array
    v: Array


class DraftHead(nn.Module):
    """Reads tapped target states as context and a block of masks, and scores every depth in one pass.

    It owns neither embedding nor LM head: both are the target's.
    """

    config: HeadConfig

    def setup(self) -> None:
        c = self.config
        self.fc = dense(c, c.hidden_size, split_input=True)
        self.hidden_norm = RMSNorm(c)
        self.layers = [DecoderLayer(c) for _ in range(c.num_layers)]
        self.norm = RMSNorm(c)

    def _tables(self, positions: Array) -> tuple[Array, Array]:
        return rotary_tables(self.config, positions)

    def _features(self, tapped: Array) -> Array:
        """Raw tapped states [B, E, T*D] -> [B, E, D], every layer's context."""
        return self.hidden_norm(self.fc(own_part(tapped, self.config.shards)))

    def __call__(self, block: Array, anchor_position: Array, pending: Array, pending_count: Array,
                 cache: KVCache) -> HeadOutput:
        """Drafts one block.

        Args:
            block: [B, G, D], embeddings of the anchor and G-1 mask tokens.
            anchor_position: int32 [B]. Context is strictly before it: `anchor_position - pending_count` cache
                slots and the pending rows.
            pending: [B, E, T*D], raw tapped states of the tokens before the anchor that are not in the cache yet.
            pending_count: int32 [B], how many of the E rows are real.
            cache: the head's own keys and values.
        """
        cached = anchor_position - pending_count
        size, extra = block.shape[1], pending.shape[1]
        positions = jnp.concatenate([cached[:, None] + jnp.arange(extra, dtype=jnp.int32)[None, :],
                                     anchor_position[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]], axis=1)
        visible = block_visibility(size, extra, pending_count, self.config.causal)
        return self.run(block, pending, positions, attend_with(visible, cache, cached, self.config.kernels))

    def run(self, block: Array, tapped: Array, positions: Array, attend: Attend) -> HeadOutput:
        """The layers over any rows; training runs many blocks of one sequence at once through it.

        Args:
            block: [B, N, D], embeddings of the block slots.
            tapped: [B, E, T*D], raw tapped states of the context rows.
            positions: int32 [B, E+N], absolute positions of context rows and slots.
            attend: attention of the N slots over E+N rows (and a cache, if it knows one).
        """
        extra = tapped.shape[1]
        context = AttentionContext(*self._tables(positions), attend)
        features = self._features(tapped)
        x, delta, keys, values = block, None, [], []
        for i, layer in enumerate(self.layers):
            x, delta, k, v = layer(x, delta, context, i, features)
            keys.append(k[:, :extra])
            values.append(v[:, :extra])
        return HeadOutput(self.norm.after_adding(x, delta)[1], jnp.stack(keys), jnp.stack(values))

    def context(self, tapped: Array, positions: Array) -> tuple[Array, Array]:
        """Keys and values, [L, B, E, K, C] each, of prompt tokens from their tapped states [B, E, T*D]."""
        cos, sin = self._tables(positions)
        features = self._features(tapped)
        rows = [layer.attention.keys_values(features, cos, sin) for layer in self.layers]
        return jnp.stack([k for k, _ in rows]), jnp.stack([v for _, v in rows])


def block_visibility(size: int, extra: int, pending_count: Array, causal: bool) -> Array:
    """Which of the E pending rows and G block slots each slot sees.

    For E = 3, G = 3 and two real pending rows (rows: slots; columns: pending, then block):

        causal       bidirectional
        110 100      110 111
        110 110      110 111
        110 111      110 111

    Returns:
        uint32 [B, G, ceil((E+G)/32)].
    """
    batch = pending_count.shape[0]
    real = jnp.arange(extra, dtype=jnp.int32)[None, :] < pending_count[:, None]  # [B, E]
    inside = jnp.tril(jnp.ones((size, size), bool)) if causal else jnp.ones((size, size), bool)
    return pack_bits(jnp.concatenate([jnp.broadcast_to(real[:, None, :], (batch, size, extra)),
                                      jnp.broadcast_to(inside[None], (batch, size, size))], axis=-1))


def head_forward(config: HeadConfig, params: dict, block: Array, anchor_position: Array, pending: Array,
                 pending_count: Array, cache: KVCache) -> HeadOutput:
    """`DraftHead.__call__` on explicit parameters."""
    output: Any = DraftHead(config).apply(params, block, anchor_position, pending, pending_count, cache)
    return output


def head_run(config: HeadConfig, params: dict, block: Array, tapped: Array, positions: Array,
             attend: Attend) -> HeadOutput:
    """`DraftHead.run` on explicit parameters."""
    output: Any = DraftHead(config).apply(params, block, tapped, positions, attend, method=DraftHead.run)
    return output


def head_context(config: HeadConfig, params: dict, tapped: Array, positions: Array) -> tuple[Array, Array]:
    """`DraftHead.context` on explicit parameters."""
    output: Any = DraftHead(config).apply(params, tapped, positions, method=DraftHead.context)
    return output


def init_head(config: HeadConfig, key: Array) -> dict:
    """Random parameters (standard deviation 0.02) of a head: `{"params": ...}`."""

    # Shapes only: a kernel would refuse the one-slot cache.
    config = replace(config, kernels="reference")

    def init(key: Array) -> Any:
        one = jnp.ones((1,), jnp.int32)
        pending = jnp.zeros((1, 1, len(config.target_layer_ids) * config.hidden_size), config.jnp_dtype)
        block = jnp.zeros((1, config.block_size, config.hidden_size), config.jnp_dtype)
        return DraftHead(config).init(key, block, one, pending, one, KVCache.create(config, batch=1, slots=1))

    return jax.jit(init)(key)


def head_shapes(config: HeadConfig) -> dict:
    """The parameters as `jax.ShapeDtypeStruct`s: the one description of names and shapes of a head."""
    return jax.eval_shape(lambda: init_head(config, jax.random.key(0)))
