"""The whole account of a model on an H100: rounds, plain decoding and prompt reading, compiled from shapes alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.h100.compile import Program, compile_for_h100, mesh_of_h100s, on_h100, over_h100s
from experiments.h100.costs import SENT
from experiments.h100.kernels import kernels_of
from experiments.h100.launches import (
    Launch,
    Sequence,
    cache_copies,
    expert_bytes,
    read_sequence,
    weight_collectives,
    weight_copies,
)
from experiments.h100.roofline import (
    DEVICE_BYTES,
    bound,
    estimate,
    floor,
    head_operations,
    launch_seconds,
    prompt_operations,
    target_operations,
)
from jetspec_jax import PRESETS, HeadConfig, JetSpecError, SamplingParams, TreeConfig
from jetspec_jax.config import TargetConfig
from jetspec_jax.decode import Decoder, create_state, prefill, run_rounds
from jetspec_jax.draft import HeadDrafter, NoDrafter, Params, plain_nodes
from jetspec_jax.generate import PROMPT_CHUNK, bucket
from jetspec_jax.head import head_shapes
from jetspec_jax.presets import Preset, default_target_layer_ids
from jetspec_jax.sampling import Sampler
from jetspec_jax.sharding import over_mesh
from jetspec_jax.target import target_shapes

ACCEPTED = 10.76  # tokens a round, arXiv 2606.18394 (Qwen3-8B, 256 nodes)
BASIS = ("computed from the compiled program, not measured: each launch takes the larger of its bytes at 3.0 TB/s and "
         "its products at 798 TFLOP/s (both rates measured on an H100 SXM), plus 2 us; launches do not overlap")
LINKS = "a collective takes, by assumption, what each GPU sends in a ring at 370 GB/s, plus 10 us"


@dataclass(frozen=True)
class Setup:
    """What is planned.

    Attributes:
        tree: builder, width and budget.
        batch: B.
        context: committed tokens of every sequence.
        devices: that share every layer.
    """

    target: TargetConfig
    head: HeadConfig
    tree: TreeConfig
    batch: int
    context: int
    devices: int = 1

    @property
    def decoder(self) -> Decoder:
        """With what one device holds of target and head."""
        target = self.target.share(self.devices)
        return Decoder(target, HeadDrafter(target, self.head.share(self.devices), self.tree))

    @property
    def plain_decoder(self) -> Decoder:
        return Decoder(self.target.share(self.devices), NoDrafter(nodes=plain_nodes(self.batch, on_gpu=True)))

    @property
    def slots(self) -> int:
        """S, as `generate` chooses it."""
        return bucket(self.context + self.decoder.drafter.max_path, 256)


def setup_for(name: str, tree: TreeConfig, batch: int, context: int, devices: int = 1) -> Setup:
    """By preset name; a target without a released head gets one of the released shape (5 layers, blocks of 16).

    Raises:
        JetSpecError: a name that is not known, or numbers that make no sense for this model.
    """
    preset = PRESETS.get(name)
    if preset is None:
        raise JetSpecError(f"--model {name!r} is not one of {', '.join(PRESETS)}")
    if batch < 1 or not 1 <= context < preset.target.max_positions:
        raise JetSpecError(f"--batch must be at least 1 and --context from 1 to {preset.target.max_positions - 1} for "
                           f"{name}, not {batch} and {context}")
    if devices < 1:
        raise JetSpecError(f"--tensor-parallel must be at least 1, not {devices}")
    head = preset.head or released_shape(preset)
    preset.target.share(devices)  # both refuse what cannot be split
    head.share(devices)
    return Setup(preset.target, head, tree, batch, context, devices)


def released_shape(preset: Preset) -> HeadConfig:
    t = preset.target
    return HeadConfig(
        vocab_size=t.vocab_size, hidden_size=t.hidden_size, intermediate_size=t.intermediate_size, num_layers=5,
        num_heads=t.num_heads, num_kv_heads=t.num_kv_heads, head_dim=t.head_dim, rope_theta=t.rope_theta,
        rope_scaling=t.rope_scaling, rms_norm_eps=t.rms_norm_eps, dtype=t.dtype, block_size=16,
        num_target_layers=t.num_layers,
        target_layer_ids=default_target_layer_ids(t.num_layers, 5), mask_token_id=t.vocab_size - 1)


def abstract_params(setup: Setup) -> Params:
    """They do not depend on the kernels, and kernels need not take the sizes that `init` uses."""
    return Params(target_shapes(replace(setup.target, kernels="reference")),
                  head_shapes(replace(setup.head, kernels="reference")))


def abstract_state(setup: Setup, decoder: Decoder, sampling: SamplingParams) -> Any:
    """Of all devices together."""
    static = (decoder, setup.batch, setup.slots)
    args = jax.eval_shape(lambda: (Sampler.create(sampling, setup.devices), jnp.zeros((4,), jnp.int32)))
    if setup.devices == 1:
        return jax.eval_shape(partial(create_state, *static), *args)
    return jax.eval_shape(partial(over_mesh, mesh_of_h100s(setup.devices), create_state, static), *args)


def place(setup: Setup, **named: Any) -> tuple[Any, ...]:
    """Abstract arguments on the devices of a setup."""
    if setup.devices == 1:
        return tuple(on_h100(list(named.values())))
    return over_h100s(mesh_of_h100s(setup.devices), **named)


def compile_program(setup: Setup, function: Callable[..., Any], static: tuple[Any, ...], donate: tuple[int, ...] = (),
                    **named: Any) -> Program:
    """`function(*static, *named)` as `generate` runs it: on one device, or on all of a mesh.

    Args:
        donate: indices into `named` whose buffers the result may take over.
    """
    leading = static if setup.devices == 1 else (mesh_of_h100s(setup.devices), function, static)
    return compile_for_h100(function if setup.devices == 1 else over_mesh, *leading, *place(setup, **named),
                            static=tuple(range(len(leading))), donate=tuple(len(leading) + i for i in donate))


def compile_rounds(setup: Setup, decoder: Decoder, sampling: SamplingParams) -> Program:
    """The loop that decoding runs."""
    number = jax.ShapeDtypeStruct((), jnp.int32)
    return compile_program(setup, run_rounds, (decoder,), donate=(1,), params=abstract_params(setup),
                           state=abstract_state(setup, decoder, sampling), max_rounds=number, min_active=number)


def prompt_chunk(setup: Setup) -> int:
    """Prompt tokens per forward, as `generate` chooses them."""
    return min(PROMPT_CHUNK, 1 << max(5, (setup.context - 1).bit_length()))


def compile_prefill(setup: Setup) -> Program:
    """The program that reads a prompt of `context` tokens."""
    chunk = prompt_chunk(setup)
    width = -(-bucket(setup.context, chunk) // chunk) * chunk
    sampler, tokens, count, keys = jax.eval_shape(lambda: (
        Sampler.create(SamplingParams(), setup.devices), jnp.zeros((setup.batch, width), jnp.int32),
        jnp.ones((setup.batch,), jnp.int32), jax.vmap(jax.random.key)(jnp.zeros((setup.batch,), jnp.int32))))
    return compile_program(setup, prefill, (setup.decoder, chunk), params=abstract_params(setup), sampler=sampler,
                           tokens=tokens, count=count, keys=keys)


def plan(setup: Setup, temperature: float = 0.0, accepted: float = ACCEPTED) -> dict[str, Any]:
    """Everything that the page docs/h100.md explains; numbers are bytes, seconds and counts of one round."""
    rounds, reading = compile_rounds(setup, setup.decoder, SamplingParams()), compile_prefill(setup)
    memory = memory_of(setup, rounds, reading)
    launches = read_sequence(rounds, setup.context).launches
    account, plain = round_account(setup, rounds), plain_account(setup)
    expected = account["estimate_seconds"]
    return {
        "basis": BASIS if setup.devices == 1 else f"{BASIS}; {LINKS}", "devices": setup.devices,
        "fits": memory["total_bytes"] <= DEVICE_BYTES, "memory": memory, **account,
        "kernels": [kernel.as_dict() for kernel in kernels_of(launches, rounds.ptx)],
        "accepted": accepted, "tokens_per_second": setup.batch * accepted / expected,
        "speedup": accepted * plain["estimate_seconds"] / expected,
        "plain": {**plain, "tokens_per_second": setup.batch / plain["estimate_seconds"]},
        "prefill": prefill_account(setup, reading),
        "sampled": sampled_account(setup, temperature) if temperature > 0 else None,
        "rows": rows_of(launches)}


def round_account(setup: Setup, program: Program) -> dict[str, Any]:
    """Counts and times of a greedy round."""
    return account_of(setup, setup.decoder, program)


def plain_account(setup: Setup) -> dict[str, Any]:
    """The same of plain decoding."""
    decoder = setup.plain_decoder
    return account_of(setup, decoder, compile_rounds(setup, decoder, SamplingParams()))


def account_of(setup: Setup, decoder: Decoder, program: Program) -> dict[str, Any]:
    """Counts and times of a greedy round of either decoder of a setup."""
    sequence, target, drafter = read_sequence(program, setup.context), decoder.target, decoder.drafter
    if isinstance(drafter, HeadDrafter):
        operations = target_operations(target, drafter.nodes, setup.context, setup.batch)
        operations += head_operations(target, drafter.head, setup.context, setup.batch)
    else:  # one token, whatever the node slots
        operations = target_operations(target, 1, setup.context, setup.batch)
    return {**summary(sequence, setup.slots), **times_of(sequence, floor(operations))}


def times_of(sequence: Sequence, lowest: float) -> dict[str, float]:
    expected = estimate(sequence.launches)
    return {"floor_seconds": lowest, "estimate_seconds": expected, "estimate_over_floor": expected / lowest}


def memory_of(setup: Setup, rounds: Program, reading: Program) -> dict[str, int]:
    """Bytes on each device. The most is held in a round, or while the prompt is read beside the state of the rounds."""
    params, state = place(setup, params=abstract_params(setup),
                          state=abstract_state(setup, setup.decoder, SamplingParams()))
    resident = rounds.argument_bytes + rounds.output_bytes - rounds.alias_bytes + rounds.temp_bytes
    while_reading = (reading.argument_bytes + reading.output_bytes - reading.alias_bytes + reading.temp_bytes
                     + size_of(state))
    return {"total_bytes": max(resident, while_reading), "weight_bytes": size_of(params),
            "cache_bytes": size_of((state.cache, state.drafter.cache)), "temp_bytes": rounds.temp_bytes,
            "while_reading_bytes": while_reading}


def size_of(tree: Any) -> int:
    """Bytes on each device of a pytree of abstract arrays that are placed; a random key has two words."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape))
               * (8 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize)
               for leaf in jax.tree.leaves(tree))


def summary(sequence: Sequence, slots: int) -> dict[str, Any]:
    """Counts of one round."""
    launches = sequence.launches
    kinds: Counter[str] = Counter()
    for launch in launches:
        kinds[launch.label] += launch.times
    return {
        "launches": {"total": kinds.total(), "per_target_layer": per_layer(launches, "verify"),
                     "per_head_layer": per_layer(launches, "draft"), "by_kind": dict(kinds.most_common()),
                     "outside_graphs": sequence.host_launches, "graphs": sequence.host_graphs},
        "collectives": collectives_of(launches), "collectives_per_target_layer": per_layer(
            [launch for launch in launches if launch.label in SENT], "verify"),
        "weight_collective_bytes": weight_collectives(launches), "expert_weight_bytes": expert_bytes(launches),
        "weight_copy_bytes": weight_copies(launches), "cache_copy_bytes": cache_copies(launches, slots),
        "host_transfers": sequence.host_transfers, "host_syncs_per_round": sequence.host_syncs}


def collectives_of(launches: list[Launch]) -> list[dict[str, Any]]:
    """By kind: how many, bytes that each device sends in all of them, seconds."""
    rows: dict[str, dict[str, Any]] = {}
    for launch in launches:
        if launch.label in SENT:
            row = rows.setdefault(launch.label, {"kind": launch.label, "count": 0, "bytes": 0, "seconds": 0.0})
            row["count"] += launch.times
            row["bytes"] += launch.times * launch.cost.sent
            row["seconds"] += launch.times * launch_seconds(launch)
    return list(rows.values())


def per_layer(launches: list[Launch], part: str) -> int:
    """Launches of the layer that has the most of them."""
    layers: Counter[int] = Counter()
    for launch in launches:
        layer = launch.layer(part)
        if layer is not None:
            layers[layer] += launch.times
    return max(layers.values(), default=0)


def prefill_account(setup: Setup, program: Program) -> dict[str, Any]:
    """Reading the prompt, chunk by chunk; a chunk meets half of the prompt on average."""
    chunks = -(-setup.context // prompt_chunk(setup))
    sequence = read_sequence(program, (chunks - 1) * prompt_chunk(setup) // 2, repetitions=chunks, whole=True)
    operations = prompt_operations(setup.decoder.target, setup.head.share(setup.devices), setup.context, setup.batch)
    return {"chunks": chunks, "launches": sum(launch.times for launch in sequence.launches),
            "weight_copy_bytes": weight_copies(sequence.launches), **times_of(sequence, floor(operations))}


def sampled_account(setup: Setup, temperature: float) -> dict[str, Any]:
    """The round that draws instead of taking the most likely token."""
    sequence = read_sequence(compile_rounds(setup, setup.decoder, SamplingParams(temperature)), setup.context)
    return {"temperature": temperature, "estimate_seconds": estimate(sequence.launches),
            **summary(sequence, setup.slots)}


def rows_of(launches: list[Launch]) -> list[dict[str, Any]]:
    """Equal launches in one row, the costliest first."""
    rows: dict[tuple, dict[str, Any]] = {}
    for launch in launches:
        size, flops = launch.cost.bytes, launch.cost.flops
        row = rows.setdefault((launch.label, launch.kernel, launch.place, size, flops), {
            "kind": launch.label, "place": launch.place, "kernel": launch.kernel, "launches": 0, "bytes": size,
            "flops": flops, "grid": launch.grid, "bound": "links" if launch.cost.sent else bound(size, flops),
            "seconds": 0.0})
        row["launches"] += launch.times
        row["seconds"] += launch.times * launch_seconds(launch)
    return sorted(rows.values(), key=lambda row: -row["seconds"])
