"""How many tokens a round a head would gain on held-out answers, told without decoding them."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jetspec_jax.config import DrafterConfig, TargetConfig, TreeConfig
from jetspec_jax.target import target_logits
from jetspec_jax.training.batches import Batch
from jetspec_jax.training.loss import block_slots
from jetspec_jax.tree import build_tree
from jetspec_jax.verify import accept

ANCHORS_AT_ONCE = 16


def accepted_on(target: TargetConfig, head: DrafterConfig, trees: tuple[TreeConfig, ...], layers: tuple[int, ...],
                head_params: Any, target_params: Any, batch: Batch) -> Array:
    """Accepted tokens (the free one included) of every anchor of a batch, per tree.

    A recorded answer is what the target says, so the branch that follows the text is the accepted one: exactly what a
    greedy round from that anchor would accept, if the text is greedy. Anchors whose block runs past the end of their
    answer count what is left of it. (The trees of an autoregressive head are others, for its distributions depend on
    the branch: of that one only a chain is told right, since the text is the branch that is accepted.)

    Returns:
        int32 [trees, B, A]; 0 where the anchor is padding.
    """
    slots = block_slots(target, head, target_params, head_params, batch, layers, head.block_size)
    rows, anchors, depths = slots.label.shape
    anchor = jnp.take_along_axis(batch.tokens, batch.anchor, axis=1)
    # A token that no node can match stands for the end of the text.
    text = jnp.where(slots.real, slots.label, -1)
    hidden = slots.hidden.reshape(rows * anchors, depths, -1)

    def chunk(some: tuple[Array, Array, Array]) -> Array:
        hidden, anchor, text = some
        logp = jax.nn.log_softmax(target_logits(target, target_params, hidden), axis=-1)
        verdicts = jnp.pad(text, ((0, 0), (0, 1)), constant_values=-1)  # after depth d the target says text[d]
        counts = []
        for tree in trees:
            best, tokens = lax.top_k(logp, min(tree.width, logp.shape[-1]))
            drafted = build_tree(tree, anchor, tokens.astype(jnp.int32), best)
            path = accept(drafted, jnp.take_along_axis(verdicts, drafted.depth, axis=1), depths + 1)
            counts.append(path.count)
        return jnp.stack(counts)

    size = ANCHORS_AT_ONCE
    padding = -(rows * anchors) % size
    split = [jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])
             for x in (hidden, anchor.reshape(-1), text.reshape(rows * anchors, depths))]
    counts = lax.map(chunk, tuple(split)).transpose(1, 0, 2).reshape(len(trees), -1)[:, :rows * anchors]
    return jnp.where(batch.anchor_real[None], counts.reshape(len(trees), rows, anchors), 0)


class HeldOut:
    """Mean accepted length on held-out batches, compiled once."""

    def __init__(self, target: TargetConfig, head: DrafterConfig, trees: tuple[TreeConfig, ...],
                 layers: tuple[int, ...], batches: list[Batch]) -> None:
        self.trees, self.batches = trees, batches
        self._run = jax.jit(partial(accepted_on, target, head, trees, layers))

    def __call__(self, head_params: Any, target_params: Any) -> dict[str, float]:
        """{"accept_chain": ..., "accept_accum_logp_64": ...}."""
        counts = np.concatenate([self._run(head_params, target_params, batch) for batch in self.batches], axis=1)
        return {name_of(tree): float(mine[mine > 0].mean()) for tree, mine in zip(self.trees, counts, strict=True)}


def name_of(tree: TreeConfig) -> str:
    """What the metrics call a tree: accept_chain, accept_accum_logp_64."""
    return "accept_chain" if tree.builder == "chain" else f"accept_{tree.builder}_{tree.budget}"
