"""Where the time of a round goes, and plain decoding beside transformers: all in one run, side by side.

    python experiments/round_cost.py --budget 64
    python experiments/round_cost.py --against-transformers      # needs the extra `parity`

Phases are compiled apart on the same shapes and timed in turn, so that a noisy machine disturbs all of them alike; the
whole round is the program that decoding really runs. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import add_model_arguments, load, run_main, sampling_from, tree_from
from jetspec_jax import JetSpecError, SamplingParams
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
from jetspec_jax.draft import HeadDrafter
from jetspec_jax.generate import bucket, generate
from jetspec_jax.pair import Pair
from jetspec_jax.sampling import Sampler

PROMPT = "Explain in a few sentences why the sky is blue and why sunsets are red."
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


def phases_of_a_round(pair: Pair, drafter: HeadDrafter, state: DecodeState) -> dict[str, Callable[[], Any]]:
    """The parts of `decode_round`, each compiled alone, with real inputs; and the whole of it."""
    decoder, params = Decoder(pair.target_config, drafter), pair.params
    position = state.length - 1
    anchor = jnp.take_along_axis(state.tokens, position[:, None], axis=1)[:, 0]

    def finish(cache: Any, draft: Any, state: Any, out: Any, path: Any, sizes: Any, position: Any) -> Any:
        return (commit(cache, out, path, position, path.count),
                drafter.observe(draft, out.tapped, path.nodes, path.count), record(state, path, path.count, sizes))

    # Everything that varies from round to round is an operand: a constant would be folded.
    forward = jax.jit(lambda p, s, *at: drafter.draft_logits(p, s.drafter, *at))
    keep = jax.jit(lambda cache, k, v, count, anchor, position: cache.commit(k, v, position - count, count, anchor),
                   donate_argnums=0)
    grow = jax.jit(drafter.grow)
    verify = jax.jit(lambda p, s, tree, position: run_target(decoder, p, s.cache, tree, position))
    decide = jax.jit(lambda s, tree, logits, position: judge(decoder, s, tree, logits, position))
    end = jax.jit(finish, donate_argnums=(0, 1))
    whole = jax.jit(run_rounds, static_argnums=0, donate_argnums=2)

    logits, k, v = forward(params, state, anchor, position)
    tree = grow(anchor, logits)
    out, verdicts = verify(params, state, tree, position)
    path = decide(state, tree, verdicts, position)
    # Donated arguments are handed over, as in the loop, so that a phase pays for what it writes and not for a copy.
    held: dict[str, Any] = {"head": state.drafter.cache, "caches": (state.cache, state.drafter), "state": state}
    held = jax.tree.map(jnp.copy, held)

    def timed_keep() -> Any:
        held["head"] = keep(held["head"], k, v, state.drafter.pending_count, anchor, position)
        return held["head"]

    def timed_end() -> Any:
        cache, draft, rest = end(*held["caches"], state, out, path, tree.size, position)
        held["caches"] = (cache, draft)
        return rest

    def timed_whole() -> Any:
        held["state"] = whole(decoder, params, held["state"], jnp.int32(ROUNDS), jnp.int32(1))
        # Start over before the cache is full; only the counters matter.
        held["state"] = replace(held["state"], length=jnp.copy(state.length), rounds=jnp.copy(state.rounds))
        return held["state"].length

    return {"draft": lambda: forward(params, state, anchor, position), "head commit": timed_keep,
            "tree": lambda: grow(anchor, logits), "verify": lambda: verify(params, state, tree, position),
            "accept": lambda: decide(state, tree, verdicts, position), "commit": timed_end, "round": timed_whole}


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


def against_transformers(pair: Pair, tokens: int, repeats: int) -> dict[str, float]:
    """Tokens per second of plain greedy decoding, ours and transformers' generate, alternating."""
    from experiments.torch_peer import torch_model

    model, generate_peer = torch_model(pair)
    ids = pair.tokenizer(pair.chat(PROMPT))["input_ids"]
    ours, peers = [], []
    for i in range(repeats + 1):
        start = time.perf_counter()
        answer = generate(pair, ids, max_new_tokens=tokens, tree=None, eos_token_ids=())
        ours.append(tokens / (time.perf_counter() - start))
        start = time.perf_counter()
        peer = generate_peer(model, ids, tokens)
        peers.append(tokens / (time.perf_counter() - start))
        if i == 0 and answer.token_ids != peer:
            print("note: the two token sequences differ (float32 near-tie)")
    return {"ours": statistics.median(ours[1:]), "transformers": statistics.median(peers[1:]),
            "ratio": statistics.median(a / b for a, b in zip(ours[1:], peers[1:], strict=True))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--context", type=int, default=256, help="committed tokens (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--against-transformers", action="store_true")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="per timed answer beside transformers")
    args = parser.parse_args()
    pair = load(args)
    if pair.head_config is None:
        raise JetSpecError("this target has no draft head: name one with --head")
    drafter = HeadDrafter(pair.target_config, pair.head_config, tree_from(args))
    decoder, sampling = Decoder(pair.target_config, drafter), sampling_from(args)
    state = ready_state(pair, decoder, sampling, args.context)
    times = measure(phases_of_a_round(pair, drafter, state), args.repeats)
    models = times["draft"] + times["verify"]
    shares = {"of_phases": 1 - models / (sum(times.values()) - times["round"]), "of_round": 1 - models / times["round"]}
    print(f"one round, {drafter.nodes} nodes, {args.context} committed tokens, {jax.default_backend()}")
    for name, value in times.items():
        print(f"  {name:12s} {value:8.2f} ms")
    print(f"  everything but the two forwards: {100 * shares['of_phases']:.1f} % of the phases' sum, "
          f"{100 * shares['of_round']:.1f} % of the whole round")
    report: dict[str, Any] = {"milliseconds": times, "rest_share": shares}
    if args.against_transformers:
        report["plain"] = against_transformers(pair, args.max_new_tokens, max(args.repeats // 3, 3))
        print("plain decoding: ours {ours:.1f} tokens/s, transformers {transformers:.1f}, ratio {ratio:.2f}".format(
            **report["plain"]))
    print(json.dumps(report))


if __name__ == "__main__":
    run_main(main)
