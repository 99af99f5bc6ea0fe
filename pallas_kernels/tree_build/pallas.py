"""The same for NVIDIA GPUs in Pallas, lowered through Triton: one launch where XLA makes nine per expanded node.

A block grows one sequence's tree in registers: node n is lane n. Nothing is sorted: every step takes the arg-max over
the lanes of a rank, which is minus infinity where there is nothing to take. Children are written by masks, so no lane
is ever addressed by a computed number. Nodes are inserted in ascending lanes, and an arg-max takes the first of equals,
as the reference does.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.tree_build.reference import Tree, bounded

WORD = 32  # nodes per word of ancestor bits
BITS_PER_THREAD = 32  # words of ancestor bits held by one thread
# A lane's number, depth and count of taken children travel as one integer, so that one reduction finds all three.
DEPTH_BITS, TAKEN_BITS = 8, 5


def tree_build(anchor: Array, tokens: Array, logp: Array, nodes: int, best_first: bool, *,
               interpret: bool = False) -> Tree:
    """The same as `reference.tree_build`.

    Raises:
        NotImplementedError: a shape or dtype that the kernel does not take.
    """
    batch, depths, width = logp.shape
    if logp.dtype != jnp.float32:
        raise NotImplementedError(f"dtype {logp.dtype}")
    if depths >= 2**DEPTH_BITS or width >= 2**TAKEN_BITS or nodes > 1024:
        raise NotImplementedError(f"{depths} depths of width {width} for {nodes} nodes")
    lanes, words = max(WORD, pl.next_power_of_2(nodes)), -(-nodes // WORD)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    shapes = [jax.ShapeDtypeStruct((batch, nodes), dtype) for dtype in (jnp.int32, jnp.int32, jnp.int32, jnp.float32)]
    shapes += [jax.ShapeDtypeStruct((batch, nodes, words), jnp.int32), jax.ShapeDtypeStruct((batch,), jnp.int32)]
    warps = min(8, max(1, lanes * pl.next_power_of_2(words) // (32 * BITS_PER_THREAD)))
    token, parent, depth, score, ancestors, size = pl.pallas_call(
        partial(_kernel, lanes=lanes, best_first=best_first), grid=(batch,), in_specs=[whole] * 3,
        out_specs=[whole] * 6, out_shape=shapes,
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=1), interpret=interpret,
        name="tree_build")(anchor, tokens, logp)
    return token, parent, depth, score, lax.bitcast_convert_type(ancestors, jnp.uint32), size


def _kernel(
    anchor_ref,  # int32 [B]
    tokens_ref,  # int32 [B, G-1, W]
    logp_ref,  # float32 [B, G-1, W]
    token_ref, parent_ref, depth_ref,  # int32 [B, N]
    score_ref,  # float32 [B, N]
    ancestors_ref,  # int32 [B, N, words]
    size_ref,  # int32 [B]
    *, lanes: int, best_first: bool,
) -> None:
    b = pl.program_id(0)
    depths, width = logp_ref.shape[1:]
    nodes, words = ancestors_ref.shape[1:]
    columns = pl.next_power_of_2(words)
    lane = lax.broadcasted_iota(jnp.int32, (lanes,), 0)
    line, column = (lax.broadcasted_iota(jnp.int32, (lanes, columns), axis) for axis in (0, 1))
    own = jnp.where(column == line >> 5, jnp.left_shift(jnp.int32(1), line & (WORD - 1)), 0)
    nothing = jnp.float32(-jnp.inf)

    def chance(level, which):
        """Log-probability of one child at a level; there is none below the last."""
        return bounded(logp_ref[b, jnp.minimum(level, depths - 1), which])

    def inserts(carry, found, best, level, children):
        """Puts `children`, pairs of token and score, below `best` into the next lanes."""
        token, parent, depth, score, bits, filled = carry
        for w, (child_token, child_score) in enumerate(children):
            at = found & (lane == filled + w)
            token, score = jnp.where(at, child_token, token), jnp.where(at, child_score, score)
        here = found & (lane >= filled) & (lane < filled + len(children))
        path = jnp.sum(jnp.where(line == best, bits, 0), axis=0, dtype=jnp.int32).reshape(1, columns)  # of the parent
        below = found & (line >= filled) & (line < filled + len(children))
        return here, (token, jnp.where(here, best, parent), jnp.where(here, level + 1, depth), score,
                      bits | jnp.where(below, path, 0), filled + jnp.where(found, jnp.int32(len(children)), 0))

    def accum_logp(_, carry):
        """Rank: a node's score until it has been popped."""
        rank, *tree = carry
        top = jnp.max(rank)
        packed = jnp.min(jnp.where(rank == top, (lane << DEPTH_BITS) | tree[2], jnp.int32(2**30)))
        best, level = packed >> DEPTH_BITS, packed & (2**DEPTH_BITS - 1)
        found = top > nothing
        at = jnp.minimum(level, depths - 1)
        children = [(tokens_ref[b, at, w], top + chance(at, w)) for w in range(width)]
        here, tree = inserts(tree, found, best, level, children)
        rank = jnp.where(lane == best, nothing, rank)
        return jnp.where(here & (level + 1 < depths), tree[3], rank), *tree

    def best_prefix(_, carry):
        """Rank: the score of a node's best child that is not in the tree yet; they come most likely first."""
        rank, taken, *tree = carry
        top = jnp.max(rank)
        packed = (((lane << DEPTH_BITS) | tree[2]) << TAKEN_BITS) | taken
        packed = jnp.min(jnp.where(rank == top, packed, jnp.int32(2**30)))
        which, level = packed & (2**TAKEN_BITS - 1), (packed >> TAKEN_BITS) & (2**DEPTH_BITS - 1)
        best = packed >> (DEPTH_BITS + TAKEN_BITS)
        found = top > nothing
        at, child = jnp.minimum(level, depths - 1), jnp.minimum(which, width - 1)
        score = jnp.sum(jnp.where(lane == best, tree[3], 0.0))
        here, tree = inserts(tree, found, best, level, [(tokens_ref[b, at, child], top)])
        sibling = jnp.where(which + 1 < width, score + chance(level, jnp.minimum(which + 1, width - 1)), nothing)
        rank = jnp.where(lane == best, sibling, rank)
        first = jnp.where(level + 1 < depths, top + chance(level + 1, 0), nothing)
        return jnp.where(here, first, rank), jnp.where(lane == best, which + 1, taken), *tree

    zero = jnp.zeros((lanes,), jnp.int32)
    root = lane == 0
    tree = (jnp.where(root, anchor_ref[b], 0), zero - 1, zero, jnp.zeros((lanes,), jnp.float32), own, jnp.int32(1))
    if best_first:
        start = jnp.where(root, chance(0, 0), nothing)
        _, _, *tree = lax.fori_loop(jnp.int32(0), jnp.int32(nodes - 1), best_prefix, (start, zero, *tree))
    else:
        pops = -(-(nodes - 1) // width)
        start = jnp.where(root, jnp.float32(0), nothing)
        _, *tree = lax.fori_loop(jnp.int32(0), jnp.int32(pops), accum_logp, (start, *tree))
    token, parent, depth, score, bits, filled = tree
    first = jnp.int32(0)
    row = (pl.ds(b, 1), pl.ds(first, lanes))
    for ref, values in ((token_ref, token), (parent_ref, parent), (depth_ref, depth), (score_ref, score)):
        pltriton.store(ref.at[row], values.reshape(1, lanes), mask=(lane < nodes).reshape(1, lanes))
    pltriton.store(ancestors_ref.at[(*row, pl.ds(first, columns))], bits.reshape(1, lanes, columns),
                   mask=((line < nodes) & (column < words)).reshape(1, lanes, columns))
    size_ref[b] = jnp.minimum(filled, nodes)
