"""Step `trees`: what growing a tree takes, for both builders: the plan counts bytes alone, not its dependent steps."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from experiments.h100_steps.bench import Bench
from experiments.h100_steps.launches import Timing, time_all
from jetspec_jax import kernels


def run(bench: Bench) -> None:
    """Writes trees.json: a row per builder, width and number of nodes."""
    depths, timings = bench.setup.head.block_size - 1, []
    for nodes in (8,) if bench.tiny else (256, 64):
        for best_first, width in ((False, 7), (True, 16), (True, 7)):
            row = {"builder": "best_first" if best_first else "accum_logp", "width": width, "nodes": nodes}
            build = kernels.tree_build(bench.kernels, nodes=nodes, best_first=best_first)
            timings.append(Timing(row, build, shapes_of(depths, width), partial(drafts, bench, depths, width),
                                  8 * depths * width))
    time_all("trees", timings, bench)


def shapes_of(depths: int, width: int) -> list[jax.ShapeDtypeStruct]:
    """Anchor, tokens and log-probabilities."""
    return [jax.ShapeDtypeStruct((1,), jnp.int32), jax.ShapeDtypeStruct((1, depths, width), jnp.int32),
            jax.ShapeDtypeStruct((1, depths, width), jnp.float32)]


def drafts(bench: Bench, depths: int, width: int, seed: int) -> list[jax.Array]:
    """A draft of random distributions, most likely first."""
    logp = jnp.sort(jax.nn.log_softmax(2 * bench.random(seed, (1, depths, width + 8), jnp.float32)), axis=-1)
    tokens = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (1, depths, width))
    return [jnp.zeros((1,), jnp.int32), jnp.copy(tokens), logp[..., :-width - 1:-1]]
