"""Draft trees: a few static arrays, grown on the device from one distribution per depth. Knows nothing of models."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array, lax

from jetspec_jax.config import TreeConfig
from pallas_kernels.tree_attention.bits import pack_bits

# Log-probabilities are kept finite, so that an impossible token (-inf) still orders and adds.
LOWEST = -1e30


@struct.dataclass
class DraftTree:
    """A batch of draft trees of at most N nodes; node 0 is the root (the anchor), parents precede their children.

    Padding nodes (n >= size) have parent -1, depth 0 and only their own ancestor bit.
    """

    token: Array  # int32 [B, N]
    parent: Array  # int32 [B, N], -1 for the root
    depth: Array  # int32 [B, N]
    score: Array  # float [B, N], cumulative log-probability of the path, 0 for the root
    ancestors: Array  # uint32 [B, N, ceil(N/32)], packed; a node is its own ancestor
    size: Array  # int32 [B]


def tree_capacity(config: TreeConfig, depths: int) -> int:
    """N: nodes of the largest tree that `config` can grow over `depths` drafted depths."""
    width = 1 if config.builder == "chain" else config.width
    possible = depths + 1 if width == 1 else (width ** (depths + 1) - 1) // (width - 1)
    return min(config.budget, possible)


def build_tree(config: TreeConfig, anchor: Array, tokens: Array, logp: Array) -> DraftTree:
    """Grows a tree from one distribution per depth, shared by all nodes of that depth.

    Args:
        config: builder, width W and budget.
        anchor: int32 [B], the root's token.
        tokens: int32 [B, G-1, W], the W most likely tokens of each depth, most likely first.
        logp: float [B, G-1, W], their log-probabilities.
    """
    logp = jnp.maximum(logp, jnp.asarray(LOWEST, logp.dtype))
    nodes = tree_capacity(config, logp.shape[1])
    return _BUILDERS[config.builder](nodes, anchor, tokens, logp)


def root_only(anchor: Array) -> DraftTree:
    """The tree of plain decoding: the anchor alone."""
    batch = anchor.shape[0]
    return assemble_tree(anchor[:, None], jnp.full((batch, 1), -1, jnp.int32), jnp.zeros((batch, 1), jnp.int32),
                 jnp.zeros((batch, 1), jnp.float32), jnp.ones((batch,), jnp.int32), depths=0)


def chain_tree(tokens: Array, size: Array) -> DraftTree:
    """One path per sequence: its first `size` int32 [B] tokens of int32 [B, N], the root first."""
    nodes = tokens.shape[1]
    depth = jnp.broadcast_to(jnp.arange(nodes, dtype=jnp.int32)[None], tokens.shape)
    return assemble_tree(tokens, depth - 1, depth, jnp.zeros(tokens.shape, jnp.float32), size, depths=nodes - 1)


def _chain(nodes: int, anchor: Array, tokens: Array, logp: Array) -> DraftTree:
    """The argmax of each depth below the one before (DFlash's linear draft)."""
    batch = anchor.shape[0]
    depth = jnp.broadcast_to(jnp.arange(nodes, dtype=jnp.int32)[None], (batch, nodes))
    token = jnp.concatenate([anchor[:, None], tokens[:, :, 0]], axis=1)[:, :nodes]
    score = jnp.concatenate([jnp.zeros((batch, 1), logp.dtype), jnp.cumsum(logp[:, :, 0], axis=1)], axis=1)[:, :nodes]
    return assemble_tree(token, depth - 1, depth, score, jnp.full((batch,), nodes, jnp.int32), depths=nodes - 1)


def _accum_logp(nodes: int, anchor: Array, tokens: Array, logp: Array) -> DraftTree:
    """Pops the best node and adds its W children at once until the budget is spent (the published default)."""
    depths, width = logp.shape[1:]
    parents = max(1, -(-(nodes - 1) // width))  # each expansion fills W nodes, the last one perhaps fewer
    arena = _grow(parents, anchor, tokens, logp, expandable_depths=depths)
    cut = slice(0, nodes)
    return assemble_tree(arena.token[:, cut], arena.parent[:, cut], arena.depth[:, cut], arena.score[:, cut],
                 jnp.minimum(arena.filled, nodes), depths)


def _best_first(nodes: int, anchor: Array, tokens: Array, logp: Array) -> DraftTree:
    """The `nodes` best prefixes, in descending order of their cumulative log-probability (DDTree)."""
    depths = logp.shape[1]
    arena = _grow(nodes, anchor, tokens, logp, expandable_depths=depths + 1)
    slot = jnp.maximum(arena.popped, 0)  # [B, nodes]

    def pick(values: Array) -> Array:
        return jnp.take_along_axis(values, slot, axis=1)

    # A parent is named by its arena slot; as a node it is named by when it was popped.
    order = jnp.full(arena.token.shape, -1, jnp.int32)
    rows = jnp.arange(slot.shape[0], dtype=jnp.int32)[:, None]
    popped_at = jnp.arange(nodes, dtype=jnp.int32)[None, :]
    order = order.at[rows, jnp.where(arena.popped < 0, order.shape[1], slot)].set(popped_at, mode="drop")
    parent = jnp.take_along_axis(order, jnp.maximum(pick(arena.parent), 0), axis=1)
    size = jnp.sum(arena.popped >= 0, axis=1, dtype=jnp.int32)
    return assemble_tree(pick(arena.token), jnp.where(popped_at > 0, parent, -1), pick(arena.depth), pick(arena.score),
                         size, depths)


_BUILDERS = {"accum_logp": _accum_logp, "best_first": _best_first, "chain": _chain}


@struct.dataclass
class _Arena:
    """Candidates in the order of their insertion: slot 0 the root, slots 1+e*W... the children of the e-th pop."""

    token: Array  # int32 [B, A]
    parent: Array  # int32 [B, A], slot of the parent
    depth: Array  # int32 [B, A]
    score: Array  # float [B, A]
    waiting: Array  # bool [B, A], inserted and not popped
    popped: Array  # int32 [B, pops], slots in the order popped; -1 when none was left
    filled: Array  # int32 [B], slots in use


def _grow(pops: int, anchor: Array, tokens: Array, logp: Array, expandable_depths: int) -> _Arena:
    """The core of both builders: `pops` times, take the best waiting candidate and insert its W children.

    Among equal scores the earlier-inserted candidate goes first. A candidate at depth >= `expandable_depths` is never
    popped; one at the last depth has no children.
    """
    batch, depths, width = logp.shape
    capacity = 1 + pops * width

    def start(fill, dtype) -> Array:
        return jnp.full((batch, capacity), fill, dtype)

    arena = _Arena(token=start(0, jnp.int32).at[:, 0].set(anchor), parent=start(-1, jnp.int32),
                   depth=start(0, jnp.int32), score=start(0, logp.dtype), waiting=start(False, bool).at[:, 0].set(True),
                   popped=jnp.full((batch, pops), -1, jnp.int32), filled=jnp.ones((batch,), jnp.int32))
    slots = jnp.arange(capacity, dtype=jnp.int32)[None, :]

    def pop(step: Array, arena: _Arena) -> _Arena:
        best = jnp.argmax(jnp.where(arena.waiting, arena.score, -jnp.inf), axis=1).astype(jnp.int32)[:, None]  # [B, 1]
        found = jnp.take_along_axis(arena.waiting, best, axis=1)
        depth = jnp.take_along_axis(arena.depth, best, axis=1)
        # Rows whose trees are exhausted, and nodes of the last depth, insert nothing.
        grows = found & (depth < depths)
        child = slots - arena.filled[:, None]  # which child of `best` would sit in this slot
        here = grows & (child >= 0) & (child < width)  # [B, A]
        pick = jnp.clip(child, 0, width - 1)
        level = jnp.minimum(depth, depths - 1)[:, :, None]
        child_token = jnp.take_along_axis(jnp.take_along_axis(tokens, level, axis=1)[:, 0], pick, axis=1)
        child_logp = jnp.take_along_axis(jnp.take_along_axis(logp, level, axis=1)[:, 0], pick, axis=1)
        score = jnp.take_along_axis(arena.score, best, axis=1) + child_logp
        return _Arena(
            token=jnp.where(here, child_token, arena.token),
            parent=jnp.where(here, best, arena.parent),
            depth=jnp.where(here, depth + 1, arena.depth),
            score=jnp.where(here, score, arena.score),
            waiting=(arena.waiting & (slots != best)) | (here & (depth + 1 < expandable_depths)),
            popped=lax.dynamic_update_slice_in_dim(arena.popped, jnp.where(found, best, -1), step, axis=1),
            filled=arena.filled + jnp.where(grows[:, 0], width, 0).astype(jnp.int32))

    return lax.fori_loop(jnp.int32(0), jnp.int32(pops), pop, arena)


def assemble_tree(token: Array, parent: Array, depth: Array, score: Array, size: Array, depths: int) -> DraftTree:
    """Clears the padding and packs the ancestors, which pointer doubling finds in log2(depths) steps."""
    nodes = jnp.arange(token.shape[1], dtype=jnp.int32)[None, :]
    real = nodes < size[:, None]
    parent = jnp.where(real, parent, -1)
    jump = jnp.where(parent < 0, nodes, parent)
    bits = jnp.broadcast_to(pack_bits(nodes[0][:, None] == nodes), (*token.shape, -(-token.shape[1] // 32)))
    for _ in range(depths.bit_length()):
        bits = bits | jnp.take_along_axis(bits, jump[:, :, None], axis=1)
        jump = jnp.take_along_axis(jump, jump, axis=1)
    return DraftTree(token=jnp.where(real, token, 0), parent=parent, depth=jnp.where(real, depth, 0),
                     score=jnp.where(real, score, 0), ancestors=bits, size=size)
