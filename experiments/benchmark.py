"""Methods against budgets on benchmark suites: accepted length, rounds, tokens/s, speed-up over plain decoding.

    python experiments/benchmark.py --suite gsm8k --methods jetspec,lookup --budgets 16,64 --limit 8 --json
    python experiments/benchmark.py --suite my.jsonl --methods dflash,ddtree --bidirectional-head runs/dflash/head

Every method decodes the same prompts as plain decoding of the same run, one at a time and side by side; answers that
are plain decoding's are counted (`identical`). `share`: phases compiled apart on the same shapes, normalised; accept
holds the commits, and where tree and draft are one program, draft is both. Peers are other programs on the same
weights. With --out, results.json, results.md and scaling.png are written there.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.common import (
    add_pair_arguments,
    add_tree_width,
    claim_output,
    load,
    require_at_least,
    require_present,
    run_main,
    tree_of,
)
from experiments.decode import summarize
from experiments.peers import PEERS, Peer, PeerAnswer, peer_speed, ready
from experiments.phases import ready_state, shares
from experiments.plots import Line, Panel, save_plot
from jetspec_jax import JetSpecError, Pair, PromptLookup, SamplingParams, TreeConfig, with_head
from jetspec_jax.arguments import Parser, integer, number, seed, user_path, within
from jetspec_jax.config import MAX_TREE_BUDGET, Builder, HeadConfig
from jetspec_jax.decode import Decoder
from jetspec_jax.files import write_text
from jetspec_jax.generate import Draft, Generation, drafter_of, generate
from jetspec_jax.pretrained import cache_folder
from jetspec_jax.programs import MOST_PROGRAMS
from jetspec_jax.suites import SUITES, suite_messages

METHODS = {
    "jetspec": "causal head, accum_logp tree",
    "jetspec-best-first": "causal head, best_first tree",
    "jetspec-chain": "causal head, chain",
    "dflash": "bidirectional head, chain",
    "ddtree": "bidirectional head, best_first tree",
    "eagle3": "autoregressive drafter, one pass a depth, tree",
    "lookup": "prompt lookup, no head",
}
_HEAD_OF = {"dflash": "bidirectional", "ddtree": "bidirectional", "eagle3": "autoregressive"}
_BUILDER_OF: dict[str, Builder] = {
    "jetspec": "accum_logp", "jetspec-best-first": "best_first", "jetspec-chain": "chain",
    "dflash": "chain", "ddtree": "best_first", "eagle3": "accum_logp"}
CONTEXT = 256  # committed tokens where the phases are timed


@dataclass(frozen=True)
class Method:
    """One line of the table: a drafter at one budget, and the pair that holds its head."""

    name: str
    budget: int
    draft: Draft | None
    pair: Pair


def main() -> None:
    args = build_parser().parse_args()
    budgets, names = parse_budgets(args.budgets), parse_methods(args.methods)
    require_at_least(args, limit=1, max_new_tokens=2, repeats=1)
    require_present(args.model, args.head, args.bidirectional_head, args.autoregressive_head)
    claim_output(args.out)
    sampling = SamplingParams(args.temperature)
    if args.temperature and (foreign := [name for name in names if name in PEERS]):
        raise JetSpecError(f"{foreign[0]} draws other random numbers: compare with it at temperature 0")
    suites = {name: pick(suite_messages(name, cache_folder() / "sources"), args.limit) for name in args.suite}
    pair = load(args)
    pair.programs.most_stored = MOST_PROGRAMS  # of all methods, in turns
    methods = [Method("plain", 1, None, pair)]
    methods += [method for name in names if name not in PEERS for method in methods_of(name, budgets, pair, args)]
    peers = [ready(name, pair) for name in names if name in PEERS]
    rows: list[dict[str, Any]] = []
    peer_rows: list[dict[str, Any]] = []
    for suite, messages in suites.items():
        ours, theirs = measure_suite(suite, [pair.chat(m) for m in messages], methods, peers, sampling, args)
        rows, peer_rows = rows + ours, peer_rows + theirs
        if args.out is not None:
            write_results(args.out, rows, peer_rows)  # a long run leaves what it has
    print(markdown(rows, peer_rows))
    if args.json:
        print(json.dumps({"rows": rows, "peers": peer_rows}))


def measure_suite(suite: str, prompts: list[str], methods: list[Method], peers: list[Peer], sampling: SamplingParams,
                  args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row per method and budget, the first of them plain decoding, and one per peer.

    All answer a prompt before the next one is taken, so that a disturbance of the machine meets all of them.
    """
    answers: list[list[Generation]] = [[] for _ in methods]
    others: list[list[PeerAnswer]] = [[] for _ in peers]
    with tqdm(total=len(prompts) * (len(methods) + len(peers)), desc=suite, unit="answer", leave=False) as bar:
        for prompt in prompts:
            for method, mine in zip(methods, answers, strict=True):
                mine.append(generate(method.pair, prompt, tree=method.draft, max_new_tokens=args.max_new_tokens,
                                     sampling=sampling, seed=args.seed))
                bar.update()
            for peer, theirs in zip(peers, others, strict=True):
                theirs.append(peer.generate(prompt, len(answers[0][-1].token_ids)))
                bar.update()
    plain = answers[0]
    base = summarize(plain)["tokens_per_second"]

    def row(name: str, tokens_per_second: float, found: list[Any], **more: Any) -> dict[str, Any]:
        return {"suite": suite, "method": name, "temperature": sampling.temperature, "prompts": len(prompts),
                "tokens": sum(len(a.token_ids) for a in found), "tokens_per_second": tokens_per_second,
                "speedup": tokens_per_second / base if base else None,
                "identical": sum(a.token_ids == b.token_ids for a, b in zip(found, plain, strict=True)), **more}

    rows = []
    for method, mine in zip(methods, answers, strict=True):
        figures = summarize(mine)
        rows.append(row(method.name, figures["tokens_per_second"], mine, budget=method.budget,
                        rounds=figures["rounds"], accepted_length=figures["mean_accept_length"],
                        share=share_of(method, sampling, args.repeats)))
    return rows, [row(peer.name, peer_speed(theirs), theirs) for peer, theirs in zip(peers, others, strict=True)]


_SHARES: dict[tuple[str, int, float], dict[str, float]] = {}


def share_of(method: Method, sampling: SamplingParams, repeats: int) -> dict[str, float]:
    """Phases are timed once per method and budget: they do not depend on the suite."""
    key = (method.name, method.budget, sampling.temperature)
    if key not in _SHARES:
        drafter = drafter_of(method.pair, method.draft)
        state = ready_state(method.pair, Decoder(method.pair.target_config, drafter), sampling, CONTEXT)
        _SHARES[key] = shares(method.pair, drafter, state, repeats)
    return _SHARES[key]


def methods_of(name: str, budgets: list[int], pair: Pair, args: argparse.Namespace) -> list[Method]:
    """A method at every budget; a chain and prompt lookup have one length whatever the budget."""
    if name == "lookup":
        lookup = PromptLookup(args.lookup_ngram, args.lookup_length)
        return [Method(name, lookup.length + 1, lookup, pair)]
    kind = _HEAD_OF.get(name, "causal")
    own = pair
    if kind != "causal":
        head = getattr(args, f"{kind}_head")
        if head is None:
            raise JetSpecError(f"this method needs a head of its own: --{kind}-head (train one with "
                               "experiments/train_head.py)")
        own = with_head(pair, head, dtype=args.dtype)
    if own.head_config is None:
        raise JetSpecError(f"method {name} needs a draft head: name one with --head")
    found = "autoregressive"
    if isinstance(own.head_config, HeadConfig):
        found = "causal" if own.head_config.causal else "bidirectional"
    if found != kind:
        raise JetSpecError(f"method {name} needs a head that is {kind}, and the given one is {found}")
    builder = _BUILDER_OF[name]
    if builder == "chain":
        size = own.head_config.block_size
        return [Method(name, size, TreeConfig(builder, 1, size), own)]
    return [Method(name, budget, tree_of(builder, budget, args), own) for budget in budgets]


def pick(messages: list[str], limit: int) -> list[str]:
    """At most `limit` messages, spread over the suite (MT-Bench comes sorted by category)."""
    count = min(limit, len(messages))
    return [messages[i * len(messages) // count] for i in range(count)]


def parse_budgets(text: str) -> list[int]:
    """"64,16" -> [16, 64]."""
    try:
        return sorted({within(1, MAX_TREE_BUDGET)(part) for part in text.split(",")})
    except argparse.ArgumentTypeError as error:
        raise JetSpecError(f"--budgets takes numbers like 16,64,256: {error}") from error


def parse_methods(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in METHODS and name not in PEERS]
    if unknown or not names:
        raise JetSpecError(f"--methods {text!r}: choose from {', '.join([*METHODS, *PEERS])}")
    return list(dict.fromkeys(names))


def markdown(rows: list[dict[str, Any]], peers: list[dict[str, Any]]) -> str:
    lines = ["| suite | method | budget | accepted a round | rounds | tokens/s | speed-up | draft / tree / verify / "
             "accept | identical |", "|---|---|---|---|---|---|---|---|---|"]
    for row in [*rows, *peers]:
        rounds = f"{row['budget']} | {row['accepted_length']:.2f} | {row['rounds']}" if "rounds" in row else "- | - | -"
        share = " / ".join(f"{100 * value:.1f}" for value in row["share"].values()) + " %" if "share" in row else "-"
        speedup = "-" if row["speedup"] is None else f"{row['speedup']:.2f}"
        lines.append(f"| {row['suite']} | {row['method']} | {rounds} | {row['tokens_per_second']:.1f} | {speedup} "
                     f"| {share} | {row['identical']}/{row['prompts']} |")
    return "\n".join(lines)


def write_results(folder: Path, rows: list[dict[str, Any]], peers: list[dict[str, Any]]) -> None:
    write_text(folder / "results.json", json.dumps({"rows": rows, "peers": peers}, indent=1) + "\n")
    write_text(folder / "results.md", markdown(rows, peers) + "\n")
    plot_scaling(rows, folder / "scaling.png")


def plot_scaling(rows: list[dict[str, Any]], file: Path) -> None:
    """Accepted length and speed-up against the budget, one line per method, one column per suite."""
    suites = list(dict.fromkeys(row["suite"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows if row["budget"] > 1))

    def panel(suite: str, field: str, label: str) -> Panel:
        lines = []
        for method in methods:
            found = [row for row in rows if row["suite"] == suite and row["method"] == method]
            lines.append(Line(method, [row["budget"] for row in found], [row[field] for row in found]))
        return Panel("tree budget (nodes)", label, lines, title=suite, log_x=True)

    save_plot(file, [[panel(suite, "accepted_length", "accepted tokens a round") for suite in suites],
                     [panel(suite, "speedup", "speed-up over plain decoding") for suite in suites]])


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add_pair_arguments(parser)
    parser.add_argument("--suite", action="append", required=True, metavar="NAME|FILE.jsonl",
                        help=f'{", ".join(SUITES)}, or a file of lines {{"prompt": ...}}; repeatable')
    parser.add_argument("--methods", default="jetspec,lookup", metavar="A,B,...",
                        help="; ".join(f"{name}: {what}" for name, what in METHODS.items())
                             + f"; peers (extras `parity` and `peers`): {', '.join(PEERS)} (default %(default)s)")
    add_sample_arguments(parser, limit=16, plot="scaling.png")
    add_tree_width(parser)
    parser.add_argument("--bidirectional-head", metavar="PATH", help="for dflash and ddtree")
    parser.add_argument("--autoregressive-head", metavar="PATH", help="for eagle3")
    parser.add_argument("--lookup-ngram", type=integer, default=3, help="default %(default)s")
    parser.add_argument("--lookup-length", type=integer, default=7, help="default %(default)s")
    parser.add_argument("--temperature", type=number, default=0.0, help="default greedy")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--repeats", type=integer, default=5, help="timings per phase (default %(default)s)")
    return parser


def add_sample_arguments(parser: argparse.ArgumentParser, limit: int, plot: str) -> None:
    """How much of every suite is decoded with which budgets, and where the results go."""
    parser.add_argument("--budgets", default="16,32,64,128,256", metavar="N,N,...", help="default %(default)s")
    parser.add_argument("--limit", type=integer, default=limit, help="prompts of each suite (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=integer, default=128, help="default %(default)s")
    parser.add_argument("--out", type=user_path, metavar="FOLDER", help=f"results.json, results.md and {plot}")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")


if __name__ == "__main__":
    run_main(main)
