"""An EAGLE-3-style head (arXiv 2503.01840), the baseline that pays one pass per drafted depth.

Row j reads the embedding of token j beside a feature of position j-1: the fused tapped states where the target has
run, the head's own output where it has not. It attends causally to the rows before it and scores token j+1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from jetspec_jax.attention import Attend, attend, attend_with, causal_bits, pack_bits
from jetspec_jax.cache import KVCache
from jetspec_jax.collectives import own_part
from jetspec_jax.config import AutoregressiveHeadConfig, KernelBackend, TargetConfig, TreeConfig
from jetspec_jax.draft import Params, Prompt, anchor_of, top_logp
from jetspec_jax.layers import AttentionContext, DecoderLayer, RMSNorm, dense
from jetspec_jax.rotary import rotary_tables
from jetspec_jax.target import target_embed, target_logits
from jetspec_jax.tree import DraftTree, assemble_tree
from pallas_kernels.tree_build.reference import bounded


class AutoregressiveOutput(NamedTuple):
    """What one pass returns.

    Attributes:
        hidden: [B, N, D], after the final norm: scores the next token through the target's LM head.
        feature: [B, N, D], before it: what the next depth reads.
        k, v: [L, B, N, K, C], of these rows.
    """

    hidden: Array
    feature: Array
    k: Array
    v: Array


class AutoregressiveHead(nn.Module):
    """The layers; owns neither embedding nor LM head."""

    config: AutoregressiveHeadConfig

    def setup(self) -> None:
        c = self.config
        self.fc = dense(c, c.hidden_size, split_input=True)
        self.token_norm = RMSNorm(c)
        self.feature_norm = RMSNorm(c)
        self.join = dense(c, c.hidden_size)
        self.layers = [DecoderLayer(c) for _ in range(c.num_layers)]
        self.norm = RMSNorm(c)

    def fuse(self, tapped: Array) -> Array:
        """Tapped states [B, N, T*D] -> features [B, N, D]."""
        return self.fc(own_part(tapped, self.config.shards))

    def __call__(self, tokens: Array, feature: Array, positions: Array, attend: Attend) -> AutoregressiveOutput:
        """Runs rows.

        Args:
            tokens: [B, N, D], embeddings.
            feature: [B, N, D], of the position before each row.
            positions: int32 [B, N].
            attend: attention of these rows over whatever they may see.
        """
        c = self.config
        context = AttentionContext(*rotary_tables(c, positions), attend)
        x = self.join(jnp.concatenate([self.token_norm(tokens), self.feature_norm(feature)], axis=-1))
        delta, keys, values = None, [], []
        for i, layer in enumerate(self.layers):
            x, delta, k, v = layer(x, delta, context, i)
            keys.append(k)
            values.append(v)
        feature, hidden = self.norm.after_adding(x, delta)
        return AutoregressiveOutput(hidden, feature, jnp.stack(keys), jnp.stack(values))


def autoregressive_forward(config: AutoregressiveHeadConfig, params: dict, tokens: Array, feature: Array,
                           positions: Array, attend: Attend) -> AutoregressiveOutput:
    """`AutoregressiveHead.__call__` on explicit parameters."""
    output: Any = AutoregressiveHead(config).apply(params, tokens, feature, positions, attend)
    return output


def fuse_features(config: AutoregressiveHeadConfig, params: dict, tapped: Array) -> Array:
    """`AutoregressiveHead.fuse` on explicit parameters."""
    output: Any = AutoregressiveHead(config).apply(params, tapped, method=AutoregressiveHead.fuse)
    return output


def init_autoregressive(config: AutoregressiveHeadConfig, key: Array) -> dict:
    """Random parameters (standard deviation 0.02)."""

    # Shapes only: a kernel would refuse the one-slot cache.
    config = replace(config, kernels="reference")

    def init(key: Array) -> Any:
        row = jnp.zeros((1, 1, config.hidden_size), config.jnp_dtype)
        tapped = jnp.zeros((1, 1, len(config.target_layer_ids) * config.hidden_size), config.jnp_dtype)
        seen = attend_with(jnp.ones((1, 1, 1), jnp.uint32), KVCache.create(config, 1, 1), jnp.zeros((1,), jnp.int32),
                           config.kernels)

        def all_of(module: AutoregressiveHead) -> Array:
            return module(row, module.fuse(tapped), jnp.zeros((1, 1), jnp.int32), seen).hidden

        return AutoregressiveHead(config).init(key, method=all_of)

    return jax.jit(init)(key)


def autoregressive_shapes(config: AutoregressiveHeadConfig) -> dict:
    """The parameters as `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(lambda: init_autoregressive(config, jax.random.key(0)))


@struct.dataclass
class AutoregressiveState:
    """Between rounds: rows of the tokens up to `pending_count` before the anchor are in the cache (slot j-1 holds row
    j); the fused states that the next rows need wait."""

    cache: KVCache
    pending: Array  # [B, R, T*D], the last `pending_count` of them are not known
    pending_count: Array  # int32 [B]


@struct.dataclass
class _Pool:
    """Every drafted node so far, level by level."""

    token: Array  # int32 [B, X]
    parent: Array  # int32 [B, X], index into the pool, -1 below the root
    depth: Array  # int32 [B, X]
    score: Array  # float [B, X], cumulative log-probability


@dataclass(frozen=True)
class AutoregressiveDrafter:
    """Grows the tree level by level: the W best nodes of a level are run and give W children each; of all nodes the
    best `budget - 1` are verified."""

    target: TargetConfig
    head: AutoregressiveHeadConfig
    tree: TreeConfig

    @property
    def taps(self) -> tuple[int, ...]:
        return self.head.target_layer_ids

    @property
    def _most_below(self) -> int:
        """Nodes below the root, by the budget: no level, and no node of one, beyond that many can be among the best."""
        return max(self.tree.budget - 1, 1)

    @property
    def depths(self) -> int:
        """Levels that are drafted, a pass each."""
        return min(self.head.block_size - 1, self._most_below)

    @property
    def _width(self) -> int:
        return 1 if self.tree.builder == "chain" else min(self.tree.width, self.head.vocab_size, self._most_below)

    @property
    def nodes(self) -> int:
        return min(self.tree.budget, 1 + self._width + (self.depths - 1) * self._width**2)

    @property
    def max_path(self) -> int:
        return min(self.head.block_size, self.nodes)

    def create(self, batch: int, slots: int) -> AutoregressiveState:
        width = len(self.taps) * self.head.hidden_size
        return AutoregressiveState(KVCache.create(self.head, batch, slots),
                                   jnp.zeros((batch, self.max_path, width), self.target.jnp_dtype),
                                   jnp.zeros((batch,), jnp.int32))

    def read_prompt(self, params: Params, state: AutoregressiveState, prompt: Prompt, tapped: Array,
                    start: Array) -> AutoregressiveState:
        """Rows start+1.. of the prompt; the row of the first answer token waits, as its token is not known yet."""
        batch, rows = tapped.shape[:2]
        tokens = jnp.pad(prompt.tokens, ((0, 0), (0, 1)))
        tokens = lax.dynamic_slice_in_dim(tokens, start + 1, rows, axis=1)
        positions = jnp.broadcast_to((start + 1 + jnp.arange(rows, dtype=jnp.int32))[None], (batch, rows))
        visible = causal_bits(batch, rows)
        cached = jnp.broadcast_to(start, (batch,))
        out = self._run(params, tokens, fuse_features(self.head, params.head, tapped.astype(self.head.jnp_dtype)),
                        positions, attend_with(visible, state.cache, cached, self.head.kernels))
        last = jnp.clip(prompt.length - 1 - start, 0, rows - 1)
        here = (prompt.length > start) & (prompt.length <= start + rows)
        state_of_last = jnp.take_along_axis(tapped, last[:, None, None], axis=1)
        pending = jnp.where(here[:, None, None], state_of_last, state.pending[:, :1])
        return AutoregressiveState(state.cache.write_chunk(out.k, out.v, start),
                                   lax.dynamic_update_slice_in_dim(state.pending, pending, 0, axis=1),
                                   jnp.ones_like(state.pending_count))

    def insert(self, state: AutoregressiveState, other: AutoregressiveState, rows: Array) -> AutoregressiveState:
        return AutoregressiveState(state.cache.insert(other.cache, rows),
                                   state.pending.at[rows].set(other.pending, mode="drop"),
                                   state.pending_count.at[rows].set(other.pending_count, mode="drop"))

    def _run(self, params: Params, tokens: Array, feature: Array, positions: Array, seen: Attend) -> Any:
        embedded = target_embed(self.target, params.target, tokens).astype(self.head.jnp_dtype)
        return autoregressive_forward(self.head, params.head, embedded, feature, positions, seen)

    def _score(self, params: Params, hidden: Array) -> tuple[Array, Array]:
        """The W most likely next tokens of each row and their log-probabilities."""
        with jax.named_scope("lm_head"):
            logits = target_logits(self.target, params.target, hidden.astype(self.target.jnp_dtype))
        tokens, logp = top_logp(logits, self._width, self.head.kernels, self.target.shards)
        return tokens, bounded(logp)

    def propose(self, params: Params, state: AutoregressiveState, tokens: Array,
                position: Array) -> tuple[DraftTree, AutoregressiveState]:
        with jax.named_scope("draft"):
            anchor, feature, state = self._root(params, state, tokens, position)
            pool = self._grow(params, state.cache, anchor, feature, position)
        with jax.named_scope("tree"):
            return self._select(anchor[0], pool), state

    def _root(self, params: Params, state: AutoregressiveState, tokens: Array, position: Array) -> tuple[Any, Any, Any]:
        """Runs the rows of the tokens accepted last; the anchor's is the last of them."""
        batch, rows = state.pending.shape[:2]
        first = position - state.pending_count + 1
        places = first[:, None] + jnp.arange(rows, dtype=jnp.int32)[None, :]
        near = jnp.take_along_axis(tokens, jnp.clip(places, 0, tokens.shape[1] - 1), axis=1)
        visible = causal_bits(batch, rows)
        cached = jnp.maximum(position - state.pending_count, 0)
        fused = fuse_features(self.head, params.head, state.pending.astype(self.head.jnp_dtype))
        out = self._run(params, near, fused, places, attend_with(visible, state.cache, cached, self.head.kernels))
        at = jnp.maximum(state.pending_count - 1, 0)[:, None, None]
        hidden, feature = (jnp.take_along_axis(x, at, axis=1) for x in (out.hidden, out.feature))
        best, logp = self._score(params, hidden)  # [B, 1, W]
        cache = state.cache.commit(out.k, out.v, cached, state.pending_count, after=best[:, 0, 0])
        return (anchor_of(tokens, position), best[:, 0], logp[:, 0]), feature, replace(state, cache=cache)

    def _grow(self, params: Params, cache: KVCache, root: tuple[Array, Array, Array], feature: Array,
              position: Array) -> _Pool:
        """All levels. A level's rows see the committed rows, their own ancestors and themselves."""
        _, token, score = root
        batch, width = token.shape
        below_root = jnp.full((batch, width), -1, jnp.int32)
        pools = [_Pool(token, below_root, jnp.ones_like(token), score)]
        feature = jnp.broadcast_to(feature, (batch, width, feature.shape[-1]))
        in_pool = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], (batch, width))
        ancestors = jnp.zeros((batch, width, 0), bool)  # over the rows of earlier levels
        past: list[tuple[Array, Array]] = []
        offset = width
        for depth in range(1, self.depths):
            itself = jnp.broadcast_to(jnp.eye(width, dtype=bool)[None], (batch, width, width))
            seen = jnp.concatenate([ancestors, itself], axis=-1)
            out = self._run(params, token, feature, position[:, None] + jnp.full((batch, width), depth, jnp.int32),
                            _attend_levels(past, pack_bits(seen), cache, position, self.head.kernels))
            past.append((out.k, out.v))
            best, logp = self._score(params, out.hidden)  # [B, W, W]
            total = (score[..., None] + logp).reshape(batch, -1)
            children = best.reshape(batch, -1)
            parent = jnp.repeat(in_pool, width, axis=1)
            pools.append(_Pool(children, parent, jnp.full_like(children, depth + 1), total))
            score, chosen = lax.top_k(total, width)
            came_from = chosen // width

            def of(x: Array, index: Array = came_from) -> Array:
                return jnp.take_along_axis(x, index[..., None], axis=1)

            token = jnp.take_along_axis(children, chosen, axis=1)
            feature, ancestors = of(out.feature), of(seen)
            in_pool, offset = offset + chosen, offset + width * width
        return jax.tree.map(lambda *level: jnp.concatenate(level, axis=1), *pools)

    def _select(self, anchor: Array, pool: _Pool) -> DraftTree:
        """The best nodes of the pool. A parent scores at least what its child scores and stands before it, so the
        selection is closed under parents."""
        batch, size = pool.token.shape
        _, chosen = lax.top_k(pool.score, self.nodes - 1)
        chosen = jnp.sort(chosen, axis=1)
        node_of = jnp.zeros((batch, size), jnp.int32).at[jnp.arange(batch, dtype=jnp.int32)[:, None], chosen].set(
            jnp.broadcast_to(jnp.arange(1, self.nodes, dtype=jnp.int32)[None], chosen.shape))

        def pick(x: Array) -> Array:
            return jnp.take_along_axis(x, chosen, axis=1)

        def with_root(root: Any, x: Array) -> Array:
            return jnp.concatenate([jnp.broadcast_to(jnp.asarray(root, x.dtype), (batch, 1)), x], axis=1)

        above = pick(pool.parent)
        parent = jnp.where(above < 0, 0, jnp.take_along_axis(node_of, jnp.maximum(above, 0), axis=1))
        return assemble_tree(with_root(anchor[:, None], pick(pool.token)), with_root(-1, parent),
                             with_root(0, pick(pool.depth)), with_root(0, pick(pool.score)),
                             jnp.full((batch,), self.nodes, jnp.int32), depths=self.depths)

    def observe(self, state: AutoregressiveState, tapped: Array, path: Array, count: Array) -> AutoregressiveState:
        rows = jnp.take_along_axis(tapped, path[:, :, None], axis=1)
        return replace(state, pending=jnp.where(count[:, None, None] > 0, rows, state.pending), pending_count=count)


def _attend_levels(past: list[tuple[Array, Array]], visible: Array, cache: KVCache, position: Array,
                   backend: KernelBackend) -> Attend:
    """Attention of one level over the committed rows, those of earlier levels, and its own.

    Rows 1..position are in the cache, in slots 0..position-1.
    """

    def of_layer(q: Array, k: Array, v: Array, layer: int) -> Array:
        keys = jnp.concatenate([*(level[0][layer] for level in past), k], axis=1)
        values = jnp.concatenate([*(level[1][layer] for level in past), v], axis=1)
        return attend(q, keys, values, visible, cache, layer, position, backend)

    return of_layer
