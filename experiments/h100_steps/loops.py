"""Programs of rounds: built without reading a prompt, compiled side by side, timed by difference."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.h100.plan import Setup
from experiments.h100.roofline import floor, head_operations, target_operations
from experiments.h100_steps.bench import Bench
from jetspec_jax import SamplingParams
from jetspec_jax.decode import Decoder, DecodeState, create_state, run_rounds
from jetspec_jax.errors import first_line
from jetspec_jax.sampling import Sampler

COMPILERS = 6  # programs compiled at once


@dataclass
class Loop:
    """A program of rounds.

    Attributes:
        setup: what it decodes; budget 1 is plain decoding.
        slots: S.
        compiled: the program and its launch sequence as XLA writes it down (empty if it came from the cache of compiled
            programs), or what XLA said.
        trace_seconds: in Python, until XLA has the program.
    """

    setup: Setup
    slots: int
    compiled: Future[tuple[Any, str]]
    trace_seconds: float

    @property
    def decoder(self) -> Decoder:
        return decoder_of(self.setup)


def decoder_of(setup: Setup) -> Decoder:
    return setup.plain_decoder if setup.tree.budget == 1 else setup.decoder


def compile_loops(setups: list[Setup], slots: int, bench: Bench, options: dict[str, Any]) -> list[Loop]:
    """Traces one after another and lets XLA compile beside; returns when all is compiled, so that nothing disturbs."""
    loops = []
    with ThreadPoolExecutor(COMPILERS) as pool:
        for setup in setups:
            begin = time.perf_counter()
            decoder = decoder_of(setup)
            state = jax.eval_shape(lambda decoder=decoder, setup=setup: empty_state(decoder, setup.batch, slots))
            number = jax.ShapeDtypeStruct((), jnp.int32)
            lowered = jax.jit(run_rounds, static_argnums=0, donate_argnums=2).lower(
                decoder, bench.params, state, number, number)
            loops.append(Loop(setup, slots, pool.submit(compile_one, lowered, options), time.perf_counter() - begin))
    return loops


def compile_one(lowered: Any, options: dict[str, Any]) -> tuple[Any, str]:
    """(program, launch sequence)."""
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True} if options else {}  # no options off the GPU
        program = lowered.compile(options | dump)
        texts = [file.read_text() for file in Path(folder).glob("*.thunk_sequence_after_thunk_passes.txt")]
        return program, max(texts, key=len, default="")


def empty_state(decoder: Decoder, batch: int, slots: int) -> DecodeState:
    return create_state(decoder, batch, slots, Sampler.create(SamplingParams()), jnp.full((4,), -1, jnp.int32))


def filled_state(loop: Loop, bench: Bench) -> DecodeState:
    """Ready for rounds that nothing ends, as after a prompt: random tokens, keys and values in every slot."""
    setup, slots = loop.setup, loop.slots
    state = empty_state(loop.decoder, setup.batch, slots)
    leaves, tree = jax.tree.flatten((state.cache, state.drafter))
    leaves = [bench.random(i, leaf.shape, leaf.dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
              for i, leaf in enumerate(leaves)]
    cache, drafter = jax.tree.unflatten(tree, leaves)
    if hasattr(drafter, "pending_count"):
        drafter = replace(drafter, pending_count=jnp.ones((setup.batch,), jnp.int32))
    tokens = np.random.default_rng(0).integers(0, setup.target.vocab_size, (setup.batch, slots))
    limit = jnp.full((setup.batch,), slots - loop.decoder.drafter.max_path, jnp.int32)
    state = replace(state, tokens=jnp.asarray(tokens, jnp.int32), limit=limit, cache=cache, drafter=drafter)
    return jax.tree.map(jnp.copy, state)  # donated buffers may not be shared


def rewound(state: DecodeState, context: int) -> DecodeState:
    """The same rounds every time: counters go back, so that the context does not grow."""
    rows = state.length.shape[0]
    state = replace(state, length=jnp.full((rows,), context + 1, jnp.int32), rounds=jnp.zeros((rows,), jnp.int32),
                    done=jnp.zeros((rows,), bool))
    return jax.block_until_ready(state)


def run(program: Callable[..., DecodeState], bench: Bench, state: DecodeState, rounds: int) -> DecodeState:
    return jax.block_until_ready(program(bench.params, state, jnp.int32(rounds), jnp.int32(1)))


def time_loop(loop: Loop, bench: Bench, state: DecodeState, context: int) -> tuple[dict[str, Any], DecodeState]:
    """Milliseconds of a round: two runs of different length, so that what a call costs beside drops out.

    The first runs are not counted: XLA launches a graph's kernels one by one the first time and records the graph the
    second.
    """
    program, sizes = loop.compiled.result()[0], bench.sizes
    few, many = sizes.turns
    times: dict[int, list[float]] = {few: [], many: []}
    for i in range(sizes.warm + sizes.repeats):
        for rounds in (few, many) if i >= sizes.warm else (few,):
            state = rewound(state, context)
            begin = time.perf_counter()
            state = run(program, bench, state, rounds)
            if i >= sizes.warm:
                times[rounds].append((time.perf_counter() - begin) * 1e3)
    low, high = (statistics.median(times[n]) for n in (few, many))
    each = (high - low) / (many - few)
    took = np.asarray(state.rounds)
    if (took != many).any():
        raise RuntimeError(f"rounds ended early: {took.tolist()} instead of {many}")
    return {"ms": each, "call_ms": low - few * each, "spread": max(times[many]) / min(times[many]) - 1,
            "accepted": float(np.asarray(state.accept_lengths)[:, :many].mean())}, state


def measure_loops(name: str, loops: list[Loop], contexts: tuple[int, ...], bench: Bench, rows: list[dict[str, Any]],
                  **extra: Any) -> None:
    """Times every program at every context; a row each, saved at once. What XLA cannot compile is a row, too."""
    for loop in loops:
        row = {"budget": loop.setup.tree.budget, "batch": loop.setup.batch, **extra,
               "trace_seconds": loop.trace_seconds}
        if (error := loop.compiled.exception()) is not None:
            rows.append(row | {"error": f"{type(error).__name__}: {error}"[:4000]})
            bench.save(name, rows)
            print(f"  budget {row['budget']}: {first_line(error)}", flush=True)
            continue
        program, thunks = loop.compiled.result()
        row["temp_bytes"] = program.memory_analysis().temp_size_in_bytes
        if thunks:  # one command buffer at the top is wanted: the whole loop is one graph
            row["top_level"] = [line[:120] for line in thunks.splitlines() if line[:1].isdigit()]
        state = filled_state(loop, bench)
        for context in contexts:
            found, state = time_loop(loop, bench, state, context)
            rows.append(row | {"context": context, "floor_ms": floor_ms(loop.setup, context)} | found)
            bench.save(name, rows)
            print(f"  budget {row['budget']:3d} batch {row['batch']:2d} context {context}: {found['ms']:.3f} ms a "
                  f"round, floor {rows[-1]['floor_ms']:.3f}", flush=True)
        del state


def floor_ms(setup: Setup, context: int) -> float:
    """What no program goes below, as the plan counts it."""
    decoder = decoder_of(setup)
    operations = target_operations(setup.target, decoder.drafter.nodes, context, setup.batch)
    if setup.tree.budget > 1:
        operations += head_operations(setup.target, setup.head, context, setup.batch)
    return floor(operations) * 1e3
