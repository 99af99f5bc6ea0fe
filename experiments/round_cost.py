"""Where the time of a round goes, and plain decoding beside transformers: all in one run, side by side.

    python experiments/round_cost.py --budget 64
    python experiments/round_cost.py --budget 8 --plain-weights  # beside the same without: what tiles save on a CPU
    python experiments/round_cost.py --against-transformers      # needs the extra `parity`

Phases are compiled apart on the same shapes and timed in turn, so that a noisy machine disturbs all of them alike; the
whole round is the program that decoding really runs. The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import jax

from experiments.common import add_model_arguments, load, require_at_least, run_main, sampling_from, tree_from
from experiments.phases import measure, phases_of_a_round, ready_state
from jetspec_jax import HeadConfig, JetSpecError
from jetspec_jax.arguments import Parser, integer, within
from jetspec_jax.config import MAX_INT
from jetspec_jax.decode import Decoder
from jetspec_jax.draft import HeadDrafter
from jetspec_jax.generate import generate
from jetspec_jax.pair import Pair

PROMPT = "Explain in a few sentences why the sky is blue and why sunsets are red."


def against_transformers(pair: Pair, tokens: int, repeats: int) -> dict[str, float]:
    """Tokens per second of plain greedy decoding, ours and transformers' generate, alternating."""
    from experiments.torch_peer import torch_model

    model, generate_peer = torch_model(pair)
    ids = pair.encode(pair.chat(PROMPT))
    ours, peers = [], []
    for i in range(repeats + 1):
        start = time.perf_counter()
        answer = generate(pair, ids, max_new_tokens=tokens, tree=None, eos_token_ids=())
        ours.append(tokens / (time.perf_counter() - start))
        start = time.perf_counter()
        peer = generate_peer(model, ids, tokens)
        peers.append(tokens / (time.perf_counter() - start))
        if i == 0 and answer.token_ids != peer:
            print("note: the two token sequences differ (a near-tie that rounding decided)")
    return {"ours": statistics.median(ours[1:]), "transformers": statistics.median(peers[1:]),
            "ratio": statistics.median(a / b for a, b in zip(ours[1:], peers[1:], strict=True))}


def main() -> None:
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--context", type=within(1, MAX_INT), default=256,
                        help="committed tokens (default %(default)s)")
    parser.add_argument("--repeats", type=integer, default=9, help="timings, of which the median counts (default "
                        "%(default)s)")
    parser.add_argument("--plain-weights", action="store_true", help="not in tiles (jetspec_jax.tiles), to compare")
    parser.add_argument("--against-transformers", action="store_true", help="time plain decoding beside it (extra "
                        "`parity`)")
    parser.add_argument("--max-new-tokens", type=integer, default=96, help="per timed answer beside transformers")
    args = parser.parse_args()
    require_at_least(args, repeats=1, max_new_tokens=1)
    sampling = sampling_from(args)
    tree_from(args)
    pair = load(args, tiles=False if args.plain_weights else None)
    if not isinstance(pair.head_config, HeadConfig):
        raise JetSpecError("this needs a target with a parallel draft head: name one with --head")
    if args.context >= pair.target_config.max_positions:
        raise JetSpecError(f"--context {args.context} is not below the target's context limit of "
                           f"{pair.target_config.max_positions}")
    drafter = HeadDrafter(pair.target_config, pair.head_config, tree_from(args, pair))
    decoder = Decoder(pair.target_config, drafter)
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
