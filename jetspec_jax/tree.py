"""Draft trees: a few static arrays, grown on the device from one distribution per depth. Knows nothing of models."""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct
from jax import Array

from jetspec_jax.config import KernelBackend, TreeConfig
from jetspec_jax.kernels import tree_build
from pallas_kernels.tree_build.reference import finish


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


def build_tree(config: TreeConfig, anchor: Array, tokens: Array, logp: Array,
               backend: KernelBackend = "auto") -> DraftTree:
    """Grows a tree from one distribution per depth, shared by all nodes of that depth.

    "accum_logp" pops the best node and adds its W children at once, again and again; "best_first" takes the N best
    prefixes; "chain" puts the argmax of each depth below the one before, which is "accum_logp" of width 1.

    Args:
        config: builder, width W and budget.
        anchor: int32 [B], the root's token.
        tokens: int32 [B, G-1, W], the W most likely tokens of each depth, most likely first.
        logp: float [B, G-1, W], their log-probabilities.
        backend: which implementation of the builder.

    Returns:
        B trees of N node slots each; `size` tells how many are nodes.
    """
    if config.builder == "chain":
        tokens, logp = tokens[:, :, :1], logp[:, :, :1]
    build = tree_build(backend, nodes=tree_capacity(config, logp.shape[1]), best_first=config.builder == "best_first")
    return DraftTree(*build(anchor, tokens, logp))


def root_only(anchor: Array, nodes: int = 1) -> DraftTree:
    """The tree of plain decoding: the anchor int32 [B] alone, in `nodes` node slots."""
    shape = (anchor.shape[0], nodes)
    token = jnp.broadcast_to(anchor[:, None], shape)
    return assemble_tree(token, jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.int32),
                         jnp.zeros(shape, jnp.float32), jnp.ones(shape[:1], jnp.int32), depths=0)


def chain_tree(tokens: Array, size: Array) -> DraftTree:
    """One path per sequence: its first `size` int32 [B] tokens of int32 [B, N], the root first."""
    nodes = tokens.shape[1]
    depth = jnp.broadcast_to(jnp.arange(nodes, dtype=jnp.int32)[None], tokens.shape)
    return assemble_tree(tokens, depth - 1, depth, jnp.zeros(tokens.shape, jnp.float32), size, depths=nodes - 1)


def assemble_tree(token: Array, parent: Array, depth: Array, score: Array, size: Array, depths: int) -> DraftTree:
    """A tree of at most `depths` levels below the root: clears the padding and packs the ancestors."""
    return DraftTree(*finish(token, parent, depth, score, size, depths))
