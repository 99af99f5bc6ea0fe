"""Small random models, and drafters whose proposals are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jetspec_jax.config import HeadConfig, SamplingParams, TargetConfig, TreeConfig
from jetspec_jax.decode import Decoder
from jetspec_jax.draft import HeadDrafter, Params
from jetspec_jax.generate import Generation, Run, read_requests
from jetspec_jax.head import head_shapes
from jetspec_jax.pair import Pair
from jetspec_jax.programs import Programs
from jetspec_jax.sampling import Sampler
from jetspec_jax.sharding import named_map, place
from jetspec_jax.target import target_shapes

BUILDERS = ("accum_logp", "best_first", "chain")
DATA = Path(__file__).parent / "data"
PROGRAMS = Programs()  # parameters are operands, so pairs of one shape share their programs


def tiny_target(**changes: Any) -> TargetConfig:
    fields: dict[str, Any] = {
        "vocab_size": 23, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "num_heads": 4,
        "num_kv_heads": 2, "head_dim": 8, "rope_theta": 1e4, "dtype": "float64", "max_positions": 600}
    return TargetConfig(**{**fields, **changes})


def tiny_moe(**changes: Any) -> TargetConfig:
    """Qwen3-MoE: five experts of which a token takes two."""
    return tiny_target(**{"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, **changes})


def tiny_head(target: TargetConfig, **changes: Any) -> HeadConfig:
    fields: dict[str, Any] = {
        "vocab_size": target.vocab_size, "hidden_size": target.hidden_size, "intermediate_size": 20, "num_layers": 1,
        "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "dtype": target.dtype, "block_size": 6,
        "target_layer_ids": (0, target.num_layers - 1), "num_target_layers": target.num_layers,
        "mask_token_id": target.vocab_size - 1}
    return HeadConfig(**{**fields, **changes})


def random_params(shapes: dict, rng: np.random.Generator, scale: float = 0.4) -> dict:
    """Weights large enough that logits differ and depend on the context; norm scales and biases differ from 1 and 0."""
    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape) * scale
        return jnp.asarray(values if len(leaf.shape) > 1 else 1 + values / 2, leaf.dtype)

    return jax.tree.map(draw, shapes)


def random_pair(seed: int, target: TargetConfig | None = None, head: HeadConfig | None = None) -> Pair:
    target = target or tiny_target()
    head = head or tiny_head(target)
    rng = np.random.default_rng(seed)
    params = Params(random_params(target_shapes(target), rng), random_params(head_shapes(head), rng))
    return Pair(target, head, params, programs=PROGRAMS)


def on_mesh(pair: Pair, mesh: Mesh) -> Pair:
    """The same pair, its parameters spread over a mesh."""
    def spread(config: Any, params: dict) -> dict:
        return named_map(lambda name, leaf: place(name, leaf, config, mesh), params)

    params = Params(spread(pair.target_config, pair.params.target), spread(pair.head_config, pair.params.head))
    return replace(pair, params=params, mesh=mesh)


@dataclass(frozen=True)
class TableDrafter(HeadDrafter):
    """A head that is whatever the test wants: `params.head["table"]` [P, V] scores the token at each position."""

    def draft_logits(self, params, state, anchor, position):
        _, k, v = super().draft_logits(params.replace(head=params.head["real"]), state, anchor, position)
        table = params.head["table"]
        at = position[:, None] + jnp.arange(self.head.block_size, dtype=jnp.int32)[None, :]
        return table[jnp.minimum(at, table.shape[0] - 1)], k, v

    def read_prompt(self, params, state, prompt, tapped, start):
        return super().read_prompt(params.replace(head=params.head["real"]), state, prompt, tapped, start)


def run_with_table(pair: Pair, table: np.ndarray, prompts: list[list[int]], tree: TreeConfig,
                   max_new_tokens: int = 40, batch: int = 1, eos: tuple[int, ...] = (),
                   sampling: SamplingParams | None = None) -> list[Generation]:
    """`generate` with a `TableDrafter` in the place of the head."""
    decoder = Decoder(pair.target_config, TableDrafter(pair.target_config, pair.head_config, tree))
    params = Params(pair.params.target, {"real": pair.params.head, "table": jnp.asarray(table)})
    fake = Pair(pair.target_config, pair.head_config, params, programs=pair.programs)
    run = Run(fake, decoder, Sampler.create(sampling or SamplingParams()), eos, 0, max_new_tokens)
    chunks = run.steps(read_requests(fake, prompts, max_new_tokens), min(batch, len(prompts)), None)
    results = {chunk.index: chunk.result for chunk in chunks if chunk.result}
    return [results[i] for i in range(len(prompts))]
