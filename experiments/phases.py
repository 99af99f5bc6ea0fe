"""The phases of a round, compiled apart on the same shapes and timed in turn: what round_cost and benchmark share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jetspec_jax import SamplingParams
from jetspec_jax.decode import (
    Decoder,
    DecodeState,
    commit,
    create_state,
    insert,
    judge,
    prefill,
    record,
    run_rounds,
    run_target,
)
from jetspec_jax.draft import Drafter, HeadDrafter, anchor_of
from jetspec_jax.generate import bucket
from jetspec_jax.pair import Pair
from jetspec_jax.programs import compiler_options
from jetspec_jax.sampling import Sampler

ROUNDS = 8  # of the whole program, per measurement


def ready_state(pair: Pair, decoder: Decoder, sampling: SamplingParams, context: int) -> DecodeState:
    """A batch of one, `context` prompt tokens read, ready for rounds that nothing ends."""
    slots = bucket(context + 64 * ROUNDS, 256)
    tokens = jnp.asarray(np.resize(np.arange(100, 400, dtype=np.int32), (1, context)))
    count, keys = jnp.full((1,), context, jnp.int32), jax.random.key(0)[None]
    sampler = Sampler.create(sampling)
    state = create_state(decoder, 1, slots, sampler, jnp.full((4,), -1, jnp.int32))
    prefix = jax.jit(prefill, static_argnums=(0, 1))(decoder, context, pair.params, sampler, tokens, count, keys)
    return insert(decoder, state, prefix, jnp.zeros((1,), jnp.int32), tokens, count,
                  jnp.full((1,), slots - decoder.drafter.max_path, jnp.int32), keys)


def compiled(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """A jitted function, compiled as `generate` compiles its programs."""
    jitted: Callable[..., Any] = jax.jit(function, compiler_options=compiler_options(), **how)
    return jitted


def phases_of_a_round(pair: Pair, drafter: HeadDrafter, state: DecodeState) -> dict[str, Callable[[], Any]]:
    """The parts of `decode_round`, each compiled alone, with real inputs; and the whole of it."""
    decoder, params = Decoder(pair.target_config, drafter), pair.params
    position = state.length - 1
    anchor = anchor_of(state.tokens, position)

    # Everything that varies from round to round is an operand: a constant would be folded.
    forward = compiled(lambda p, s, *at: drafter.draft_logits(p, s.drafter, *at))
    keep = compiled(lambda cache, k, v, count, anchor, position: cache.commit(k, v, position - count, count, anchor),
                   donate_argnums=0)
    grow = compiled(drafter.grow)
    verify = compiled(lambda p, s, tree, position: run_target(decoder, p, s.cache, tree, position))
    decide = compiled(lambda s, tree, logits, position: judge(decoder, s, tree, logits, position))
    whole = compiled(run_rounds, static_argnums=0, donate_argnums=2)

    logits, k, v = forward(params, state, anchor, position)
    tree = grow(anchor, logits)
    out, verdicts = verify(params, state, tree, position)
    path = decide(state, tree, verdicts, position)
    end = commits(drafter, state, out, path, tree.size)
    # Donated arguments are handed over, as in the loop, so that a phase pays for what it writes and not for a copy.
    held: dict[str, Any] = jax.tree.map(jnp.copy, {"head": state.drafter.cache, "state": state})

    def timed_keep() -> Any:
        held["head"] = keep(held["head"], k, v, state.drafter.pending_count, anchor, position)
        return held["head"]

    def timed_whole() -> Any:
        held["state"] = whole(decoder, params, held["state"], jnp.int32(ROUNDS), jnp.int32(1))
        # Start over before the cache is full; only the counters matter.
        held["state"] = replace(held["state"], length=jnp.copy(state.length), rounds=jnp.copy(state.rounds))
        return held["state"].length

    return {"draft": lambda: forward(params, state, anchor, position), "head commit": timed_keep,
            "tree": lambda: grow(anchor, logits), "verify": lambda: verify(params, state, tree, position),
            "accept": lambda: decide(state, tree, verdicts, position), "commit": end, "round": timed_whole}


def commits(drafter: Drafter, state: DecodeState, out: Any, path: Any, sizes: Any) -> Callable[[], Any]:
    """What ends a round: the accepted path into the target's cache, its states to the drafter, its tokens noted."""
    def finish(cache: Any, draft: Any, state: Any, out: Any, path: Any, sizes: Any, position: Any) -> Any:
        new = record(state, path, path.count, sizes)
        # Not the state's caches: an output that is an undonated input is a copy.
        noted = (new.tokens, new.length, new.done, new.rounds, new.accept_lengths, new.tree_sizes)
        return (commit(cache, out, path, position, path.count),
                drafter.observe(draft, out.tapped, path.nodes, path.count), noted)

    end = compiled(finish, donate_argnums=(0, 1))
    held: list[Any] = jax.tree.map(jnp.copy, [state.cache, state.drafter])
    position = state.length - 1

    def timed() -> Any:
        *held[:], rest = end(*held, state, out, path, sizes, position)
        return rest

    return timed


def measure(phases: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each phase, taken in turn; `round` is divided by the rounds it runs."""
    times: dict[str, list[float]] = {name: [] for name in phases}
    for i in range(repeats + 1):
        for name, phase in phases.items():
            start = time.perf_counter()
            jax.block_until_ready(phase())
            if i:  # the first run compiles
                times[name].append((time.perf_counter() - start) * 1e3 / (ROUNDS if name == "round" else 1))
    return {name: statistics.median(values) for name, values in times.items()}


def shares(pair: Pair, drafter: Drafter, state: DecodeState, repeats: int) -> dict[str, float]:
    """Which share of a round goes into draft, tree, verify and accept (with the commits)."""
    if isinstance(drafter, HeadDrafter):
        times = measure({name: phase for name, phase in phases_of_a_round(pair, drafter, state).items()
                         if name != "round"}, repeats)
    else:
        times = measure(phases_of_any_round(pair, drafter, state), repeats)
    parts = {"draft": times["draft"], "tree": times.get("tree", 0.0), "verify": times["verify"],
             "accept": times["accept"] + times["commit"] + times.get("head commit", 0.0)}
    total = sum(parts.values())
    return {name: value / total for name, value in parts.items()}


def phases_of_any_round(pair: Pair, drafter: Drafter, state: DecodeState) -> dict[str, Callable[[], Any]]:
    """The phases of a drafter that makes its tree while it drafts (or drafts nothing: plain decoding)."""
    decoder, params, position = Decoder(pair.target_config, drafter), pair.params, state.length - 1
    propose = compiled(lambda p, s, position: drafter.propose(p, s.drafter, s.tokens, position)[0])
    verify = compiled(lambda p, s, tree, position: run_target(decoder, p, s.cache, tree, position))
    decide = compiled(lambda s, tree, logits, position: judge(decoder, s, tree, logits, position))
    tree = propose(params, state, position)
    out, verdicts = verify(params, state, tree, position)
    path = decide(state, tree, verdicts, position)
    return {"draft": lambda: propose(params, state, position), "verify": lambda: verify(params, state, tree, position),
            "accept": lambda: decide(state, tree, verdicts, position),
            "commit": commits(drafter, state, out, path, tree.size)}
