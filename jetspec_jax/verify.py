"""Which path of a draft tree the target agrees with. Knows nothing of models."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array

from jetspec_jax.tree import DraftTree
from pallas_kernels.tree_attention.bits import pack_bits, unpack_bits


@struct.dataclass
class AcceptedPath:
    """The longest branch that the target would have written itself."""

    nodes: Array  # int32 [B, R], the path's node at each depth, the root first; meaningless from `count` on
    tokens: Array  # int32 [B, R], what follows each of those nodes; the last valid one is the free token
    count: Array  # int32 [B], accepted length: nodes on the path, and also new tokens, at least 1


def accept(tree: DraftTree, verdict: Array, max_path: int) -> AcceptedPath:
    """Picks the deepest node all of whose edges agree with the target.

    Args:
        tree: the draft.
        verdict: int32 [B, N], the token that the target puts after each node.
        max_path: R, nodes of the longest possible path (G).

    Returns:
        The path from the root to that node, and how many nodes of it count.
    """
    nodes = tree.token.shape[1]
    index = jnp.arange(nodes, dtype=jnp.int32)[None, :]
    expected = jnp.take_along_axis(verdict, jnp.maximum(tree.parent, 0), axis=1)
    agrees = (tree.parent < 0) | (tree.token == expected)
    disagreements = tree.ancestors & ~pack_bits(agrees)[:, None, :]
    accepted = jnp.all(disagreements == 0, axis=-1) & (index < tree.size[:, None])
    # Siblings carry different tokens, so the deepest accepted node is unique; the root is always accepted.
    best = jnp.argmax(jnp.where(accepted, tree.depth, -1), axis=1).astype(jnp.int32)[:, None]  # [B, 1]
    count = jnp.take_along_axis(tree.depth, best, axis=1)[:, 0] + 1
    on_path = unpack_bits(jnp.take_along_axis(tree.ancestors, best[:, :, None], axis=1)[:, 0], nodes)  # [B, N]
    step = jnp.arange(max_path, dtype=jnp.int32)[None, :, None]
    path = jnp.argmax(on_path[:, None, :] & (tree.depth[:, None, :] == step), axis=-1).astype(jnp.int32)  # [B, R]
    return AcceptedPath(path, jnp.take_along_axis(verdict, path, axis=1), count)
