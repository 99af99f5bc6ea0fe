"""The seam where drafters differ: what they carry between rounds, and how they propose a tree."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from jetspec_jax.cache import KVCache
from jetspec_jax.collectives import own_start, side_by_side
from jetspec_jax.config import HeadConfig, KernelBackend, TargetConfig, TreeConfig
from jetspec_jax.head import head_context, head_forward
from jetspec_jax.kernels import top_w
from jetspec_jax.target import target_embed, target_logits
from jetspec_jax.tree import DraftTree, build_tree, root_only, tree_capacity


@struct.dataclass
class Params:
    """The parameters of a pair; `head` is empty without a head."""

    target: dict
    head: dict

    def __repr__(self) -> str:
        return f"Params(target: {count_parameters(self.target)}, head: {count_parameters(self.head)})"


def count_parameters(params: dict) -> str:
    """How many numbers they are, for a person; from their shapes alone."""
    return f"{sum(getattr(leaf, 'size', 0) for leaf in jax.tree.leaves(params)):,} parameters"


class Prompt(NamedTuple):
    """Prompts that are being read."""

    tokens: Array  # int32 [B, P], padded on the right
    length: Array  # int32 [B]


class Drafter(Protocol):
    """A frozen, hashable description of a drafter; decode.py knows nothing else of it. States are pytrees."""

    @property
    def taps(self) -> tuple[int, ...]:
        """Target layers whose outputs it reads."""

    @property
    def nodes(self) -> int:
        """N, nodes of its trees."""

    @property
    def max_path(self) -> int:
        """R, nodes of the longest path through them."""

    def create(self, batch: int, slots: int) -> Any:
        """A state for B sequences of at most `slots` tokens."""

    def read_prompt(self, params: Params, state: Any, prompt: Prompt, tapped: Array, start: Array) -> Any:
        """Takes in one chunk of every prompt: tapped states [B, chunk, T*D] of positions `start`..."""

    def insert(self, state: Any, other: Any, rows: Array) -> Any:
        """Takes over freshly read prompts into rows int32 [R]; a row >= B is dropped."""

    def propose(self, params: Params, state: Any, tokens: Array, position: Array) -> tuple[DraftTree, Any]:
        """A tree below each anchor.

        Args:
            tokens: int32 [B, S], the committed ones; the anchor is the last of them.
            position: int32 [B], the anchor's absolute position (0 for a finished sequence).
        """

    def observe(self, state: Any, tapped: Array, path: Array, count: Array) -> Any:
        """Learns which path int32 [B, R] was accepted, `count` nodes of it (0 for a finished sequence), and the tapped
        states [B, N, T*D]."""


def anchor_of(tokens: Array, position: Array) -> Array:
    """The token of each sequence [B, S] at its position int32 [B]."""
    return jnp.take_along_axis(tokens, position[:, None], axis=1)[:, 0]


def top_logp(logits: Array, width: int, backend: KernelBackend, shards: int = 1, skip: int = 0) -> tuple[Array, Array]:
    """The W most likely tokens, most likely first, and their log-probabilities.

    Args:
        logits: [B, N, V], or this device's part of the vocabulary.
        width: W.
        backend: which implementation of `top_w`.
        shards: devices that hold a part of the vocabulary each; the result is the same on all of them.
        skip: rows at the start that are not wanted.

    Returns:
        (int32, float), [B, N - skip, W] each.
    """
    tokens, logp = top_w(backend, width=min(width, logits.shape[-1]), skip=skip)(logits)
    if shards == 1:
        return tokens, logp
    top = jnp.take_along_axis(logits[:, skip:], tokens, axis=-1)
    total = top[..., :1] - logp[..., :1]  # log-sum-exp of this part
    # Equal values stay in the order of their indices: parts lie in order, and top_k takes the first of equals.
    tokens = side_by_side(tokens + own_start(logits.shape[-1], shards), shards)
    top, chosen = lax.top_k(side_by_side(top, shards), width)
    total = jax.nn.logsumexp(side_by_side(total, shards), axis=-1, keepdims=True)
    return jnp.take_along_axis(tokens, chosen, axis=-1), top - total


class StatelessDrafter:
    """Carries nothing between rounds and taps nothing."""

    @property
    def taps(self) -> tuple[int, ...]:
        return ()

    def create(self, batch: int, slots: int) -> Any:
        return None

    def read_prompt(self, params: Params, state: Any, prompt: Prompt, tapped: Array, start: Array) -> Any:
        return state

    def insert(self, state: Any, other: Any, rows: Array) -> Any:
        return state

    def observe(self, state: Any, tapped: Array, path: Array, count: Array) -> Any:
        return state


# XLA on a GPU makes a sum of a product with a single row, far slower than the weights can be read, and pads products of
# few rows to eight: decoding one sequence plainly takes a fifth less time with eight rows (docs/h100_measured.md).
ROWS_ON_GPU = 8


def plain_nodes(batch: int, on_gpu: bool) -> int:
    """Node slots that plain decoding of `batch` sequences pads its trees to: so many that there are eight rows."""
    return -(-ROWS_ON_GPU // max(batch, 1)) if on_gpu else 1


@dataclass(frozen=True)
class NoDrafter(StatelessDrafter):
    """Plain decoding: every tree is its root.

    Attributes:
        nodes: N, node slots of a tree, of which one is used; see `plain_nodes`.
    """

    nodes: int = field(default=1, kw_only=True)

    @property
    def max_path(self) -> int:
        return 1

    def propose(self, params: Params, state: Any, tokens: Array, position: Array) -> tuple[DraftTree, Any]:
        return root_only(anchor_of(tokens, position), self.nodes), state


@struct.dataclass
class HeadState:
    """What the head carries between rounds.

    The tapped states of the last accepted path wait in `pending`: they enter the cache in the next draft, so that the
    head's weights are read once a round.
    """

    cache: KVCache
    pending: Array  # [B, R, T*D]
    pending_count: Array  # int32 [B]


@dataclass(frozen=True)
class HeadDrafter:
    """Drafts with the parallel head: one pass scores all depths, a builder grows the tree."""

    target: TargetConfig
    head: HeadConfig
    tree: TreeConfig

    @property
    def taps(self) -> tuple[int, ...]:
        return self.head.target_layer_ids

    @property
    def nodes(self) -> int:
        return tree_capacity(self._tree, self.head.block_size - 1)

    @property
    def max_path(self) -> int:
        return min(self.head.block_size, self.nodes)

    @property
    def slots(self) -> int:
        """Slots of a draft, the anchor's included: G; but N nodes are at most N-1 deep, and a causal head's first slots
        do not see the later ones."""
        return min(self.head.block_size, max(self.nodes, 2)) if self.head.causal else self.head.block_size

    @property
    def _tree(self) -> TreeConfig:
        """A vocabulary smaller than W has no W tokens to offer."""
        return TreeConfig(self.tree.builder, min(self.tree.width, self.head.vocab_size), self.tree.budget)

    def create(self, batch: int, slots: int) -> HeadState:
        width = len(self.taps) * self.head.hidden_size
        return HeadState(KVCache.create(self.head, batch, slots),
                         jnp.zeros((batch, self.max_path, width), self.target.jnp_dtype),
                         jnp.zeros((batch,), jnp.int32))

    def read_prompt(self, params: Params, state: HeadState, prompt: Prompt, tapped: Array, start: Array) -> HeadState:
        batch, rows = tapped.shape[:2]
        positions = jnp.broadcast_to((start + jnp.arange(rows, dtype=jnp.int32))[None], (batch, rows))
        k, v = head_context(self.head, params.head, tapped.astype(self.head.jnp_dtype), positions)
        return replace(state, cache=state.cache.write_chunk(k, v, start))

    def insert(self, state: HeadState, other: HeadState, rows: Array) -> HeadState:
        return replace(state, cache=state.cache.insert(other.cache, rows),
                       pending_count=state.pending_count.at[rows].set(0, mode="drop"))

    def propose(self, params: Params, state: HeadState, tokens: Array, position: Array) -> tuple[DraftTree, HeadState]:
        anchor = anchor_of(tokens, position)
        with jax.named_scope("draft"):
            logits, k, v = self.draft_logits(params, state, anchor, position)
        with jax.named_scope("tree"):
            tree = self.grow(anchor, logits)
        with jax.named_scope("draft"):
            cache = state.cache.commit(k, v, position - state.pending_count, state.pending_count,
                                       after=tree.token[:, -1])
        return tree, replace(state, cache=cache)

    def draft_logits(self, params: Params, state: HeadState, anchor: Array,
                     position: Array) -> tuple[Array, Array, Array]:
        """The head's forward: logits [B, slots, V], row 0 unused, and keys and values of the pending rows."""
        masks = jnp.full((anchor.shape[0], self.slots - 1), self.head.mask_token_id, jnp.int32)
        slots = jnp.concatenate([anchor[:, None], masks], axis=1)
        block = target_embed(self.target, params.target, slots).astype(self.head.jnp_dtype)
        out = head_forward(self.head, params.head, block, position, state.pending.astype(self.head.jnp_dtype),
                           state.pending_count, state.cache)
        # All rows: the product costs a GPU the same, and a slice of its result would be a copy.
        return target_logits(self.target, params.target, out.hidden.astype(self.target.jnp_dtype)), out.k, out.v

    def grow(self, anchor: Array, logits: Array) -> DraftTree:
        """Top-W log-probabilities of each depth from logits [B, slots, V], row 0 unused, then the builder."""
        width = 1 if self._tree.builder == "chain" else self._tree.width
        tokens, logp = top_logp(logits, width, self.head.kernels, self.target.shards, skip=1)
        return build_tree(self._tree, anchor, tokens, logp, self.head.kernels)

    def observe(self, state: HeadState, tapped: Array, path: Array, count: Array) -> HeadState:
        rows = jnp.take_along_axis(tapped, path[:, :, None], axis=1)
        return replace(state, pending=jnp.where(count[:, None, None] > 0, rows, state.pending), pending_count=count)
