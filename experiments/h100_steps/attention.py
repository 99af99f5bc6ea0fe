"""Step `attention`: cuts of the attention kernel beside the one that is chosen, at the sizes of the 8B model."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from experiments.h100.roofline import roofline
from experiments.h100_steps.bench import Bench
from experiments.h100_steps.correct import Draw, random_tree
from experiments.h100_steps.launches import Timing, time_all
from pallas_kernels.tree_attention.config import TreeAttentionConfig, choose_config
from pallas_kernels.tree_attention.pallas import tree_attention

# Nodes, keys, splits, warps, stages, by number of nodes of the tree. What spills compiles for a minute: not here.
CUTS = {256: ((32, 64, 2, 8, 2), (32, 64, 2, 8, 3), (16, 64, 2, 4, 2), (16, 64, 4, 4, 3), (16, 32, 2, 4, 4),
              (16, 64, 2, 8, 3)),
        128: ((16, 64, 2, 4, 3), (16, 64, 4, 4, 3)),
        64: ((16, 64, 4, 4, 3), (16, 64, 8, 4, 3), (16, 32, 8, 4, 4)),
        16: ((16, 64, 8, 4, 3), (16, 64, 8, 8, 3)),
        8: ((8, 64, 8, 4, 3), (8, 64, 16, 4, 2))}


def run(bench: Bench) -> None:
    """Writes attention.json: a row per number of nodes and cut, the chosen one first; the combine is part of it."""
    timings = []
    t, (context, slots) = bench.setup.target, (bench.sizes.contexts[0], bench.sizes.slots)
    shared = [bench.random(i, (t.num_layers, 1, t.num_kv_heads, slots, t.head_dim)) for i in range(2)]
    for nodes, cuts in ({4: ((2, 16, 2, 1, 1),)} if bench.tiny else CUTS).items():
        chosen = choose_config(1, nodes, t.num_heads, t.num_kv_heads, t.head_dim, slots, t.jnp_dtype.itemsize)
        for cut in (chosen, *(TreeAttentionConfig(*numbers) for numbers in cuts)):
            what = f"{cut.nodes} nodes, {cut.keys} keys, {cut.splits} splits, {cut.warps} warps, {cut.stages} stages"
            row = {"nodes": nodes, "cut": f"{what} (chosen)" if cut is chosen else what}
            timings.append(timing_of(nodes, context, cut, row, shared, bench))
    time_all("attention", timings, bench)


def timing_of(nodes: int, context: int, cut: TreeAttentionConfig, row: dict[str, Any], shared: list[Array],
              bench: Bench) -> Timing:
    t = bench.setup.target

    def operands(launch: int) -> list[Array]:
        draw = Draw(launch)
        new = [draw.normal((1, nodes, t.num_kv_heads, t.head_dim), t.jnp_dtype) for _ in range(2)]
        return [draw.normal((1, nodes, t.num_heads, t.head_dim), t.jnp_dtype), *new, random_tree(draw, 1, nodes),
                *shared, jnp.int32(launch % t.num_layers), jnp.full((1,), context, jnp.int32)]

    read = 2 * context * t.num_kv_heads * t.head_dim * t.jnp_dtype.itemsize
    flops = 4 * nodes * t.num_heads * t.head_dim * (context + nodes)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands(0)]
    return Timing(row | {"floor_us": roofline(read, flops) * 1e6},
                  partial(tree_attention, config=cut, interpret=bench.tiny), shapes, operands, read)
