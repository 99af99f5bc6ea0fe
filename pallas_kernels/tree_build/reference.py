"""The builders of draft trees in plain JAX: the definition that the kernel must equal, and what runs off the GPU."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.tree_attention.bits import pack_bits

LOWEST = -1e30  # of log-probabilities: finite, so that an impossible token (-inf) still orders and adds

Tree = tuple[Array, Array, Array, Array, Array, Array]  # token, parent, depth, score, ancestors, size


def tree_build(anchor: Array, tokens: Array, logp: Array, nodes: int, best_first: bool) -> Tree:
    """Grows a tree from one distribution per depth, shared by all nodes of that depth.

    Args:
        anchor: int32 [B], the root's token.
        tokens: int32 [B, G-1, W], the W most likely tokens of each depth, most likely first.
        logp: float [B, G-1, W], their log-probabilities; any score at all gives a tree (see `bounded`).
        nodes: N; at most as many as the tree can have.
        best_first: the N best prefixes (DDTree); or all W children of the best node at once (the published default).

    Returns:
        (token, parent, depth int32 [B, N], score float [B, N], ancestors uint32 [B, N, ceil(N/32)], size int32 [B]), as
        `jetspec_jax.tree.DraftTree` says.
    """
    return (grow_best_first if best_first else grow_accum_logp)(nodes, anchor, tokens, bounded(logp))


def bounded(logp: Array) -> Array:
    """Log-probabilities from `LOWEST` to 0, a NaN the lowest: no child then scores above its parent.

    Zero has no sign, by which `lax.top_k` would order.
    """
    return jnp.where(logp > LOWEST, jnp.where(logp < 0, logp, 0), LOWEST)


def grow_accum_logp(nodes: int, anchor: Array, tokens: Array, logp: Array) -> Tree:
    """Pops the best node and adds its W children at once until the budget is spent (the published default)."""
    depths, width = logp.shape[1:]
    parents = max(1, -(-(nodes - 1) // width))  # each expansion fills W nodes, the last one perhaps fewer
    arena = grow(parents, anchor, tokens, logp, expandable_depths=depths)
    cut = slice(0, nodes)
    return finish(arena.token[:, cut], arena.parent[:, cut], arena.depth[:, cut], arena.score[:, cut],
                  jnp.minimum(arena.filled, nodes), depths)


def grow_best_first(nodes: int, anchor: Array, tokens: Array, logp: Array) -> Tree:
    """The `nodes` best prefixes, in descending order of their cumulative log-probability (DDTree)."""
    depths = logp.shape[1]
    arena = grow(nodes, anchor, tokens, logp, expandable_depths=depths + 1)
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
    return finish(pick(arena.token), jnp.where(popped_at > 0, parent, -1), pick(arena.depth), pick(arena.score),
                  size, depths)


class Arena(NamedTuple):
    """Candidates in the order of their insertion: slot 0 the root, slots 1+e*W... the children of the e-th pop."""

    token: Array  # int32 [B, A]
    parent: Array  # int32 [B, A], slot of the parent
    depth: Array  # int32 [B, A]
    score: Array  # float [B, A]
    waiting: Array  # bool [B, A], inserted and not popped
    popped: Array  # int32 [B, pops], slots in the order popped; -1 when none was left
    filled: Array  # int32 [B], slots in use


def grow(pops: int, anchor: Array, tokens: Array, logp: Array, expandable_depths: int) -> Arena:
    """The core of both builders: `pops` times, take the best waiting candidate and insert its W children.

    Among equal scores the earlier-inserted candidate goes first. A candidate at depth >= `expandable_depths` is never
    popped; one at the last depth has no children.
    """
    batch, depths, width = logp.shape
    capacity = 1 + pops * width

    def start(fill, dtype) -> Array:
        return jnp.full((batch, capacity), fill, dtype)

    arena = Arena(token=start(0, jnp.int32).at[:, 0].set(anchor), parent=start(-1, jnp.int32),
                  depth=start(0, jnp.int32), score=start(0, logp.dtype), waiting=start(False, bool).at[:, 0].set(True),
                  popped=jnp.full((batch, pops), -1, jnp.int32), filled=jnp.ones((batch,), jnp.int32))
    slots = jnp.arange(capacity, dtype=jnp.int32)[None, :]

    def pop(step: Array, arena: Arena) -> Arena:
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
        return Arena(
            token=jnp.where(here, child_token, arena.token),
            parent=jnp.where(here, best, arena.parent),
            depth=jnp.where(here, depth + 1, arena.depth),
            score=jnp.where(here, score, arena.score),
            waiting=(arena.waiting & (slots != best)) | (here & (depth + 1 < expandable_depths)),
            popped=lax.dynamic_update_slice_in_dim(arena.popped, jnp.where(found, best, -1), step, axis=1),
            filled=arena.filled + jnp.where(grows[:, 0], width, 0).astype(jnp.int32))

    return lax.fori_loop(jnp.int32(0), jnp.int32(pops), pop, arena)


def finish(token: Array, parent: Array, depth: Array, score: Array, size: Array, depths: int) -> Tree:
    """Clears the padding and packs the ancestors, which pointer doubling finds in log2(depths) steps."""
    nodes = jnp.arange(token.shape[1], dtype=jnp.int32)[None, :]
    real = nodes < size[:, None]
    parent = jnp.where(real, parent, -1)
    jump = jnp.where(parent < 0, nodes, parent)
    bits = jnp.broadcast_to(pack_bits(nodes[0][:, None] == nodes), (*token.shape, -(-token.shape[1] // 32)))
    for _ in range(depths.bit_length()):
        bits = bits | jnp.take_along_axis(bits, jump[:, :, None], axis=1)
        jump = jnp.take_along_axis(jump, jump, axis=1)
    return (jnp.where(real, token, 0), parent, jnp.where(real, depth, 0), jnp.where(real, score, 0), bits, size)
