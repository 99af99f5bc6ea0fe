"""What a head would accept on the benchmark suites, with every builder and budget, from one plain greedy answer each.

    python experiments/replay.py --suite gsm8k --suite mt_bench --limit 32 --budgets 16,64
    python experiments/replay.py --head runs/head/head --out out/replay

Tree decoding changes no token, so the answer that plain decoding writes is the path that the target would accept: the
head drafts a tree at every position of it, and the rounds are walked from one accepted path to the next. No tree is
verified, which makes this fit for many prompts; only benchmark.py measures
time. A round at the end of an answer counts the tokens that are left; the recorded states are bfloat16, so that
near-ties of the head may fall otherwise than in float32 decoding. With --out, results.json, results.md and replay.png
are written there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from experiments.benchmark import add_sample_arguments, parse_budgets, pick
from experiments.common import (
    add_pair_arguments,
    claim_output,
    load,
    require_at_least,
    require_present,
    run_main,
)
from experiments.plots import Line, Panel, save_plot
from jetspec_jax import HeadConfig, JetSpecError, Pair, SamplingParams, TreeConfig
from jetspec_jax.arguments import Parser, integer
from jetspec_jax.config import ACCEPT_NODES, TREE_WIDTHS, Builder
from jetspec_jax.files import write_text
from jetspec_jax.pretrained import cache_folder
from jetspec_jax.suites import SUITES, suite_messages
from jetspec_jax.training.batches import Batches
from jetspec_jax.training.config import TrainConfig
from jetspec_jax.training.dataset import Dataset, DatasetInfo, DatasetWriter
from jetspec_jax.training.evaluate import accepted_on
from jetspec_jax.training.record import record_answers


def main() -> None:
    args = build_parser().parse_args()
    require_at_least(args, limit=1, max_new_tokens=2, batch_size=1)
    budgets = parse_budgets(args.budgets)
    require_present(args.model, args.head)
    claim_output(args.out)
    suites = {name: pick(suite_messages(name, cache_folder() / "sources"), args.limit) for name in args.suite or SUITES}
    pair = load(args, tiles=False)  # texts are read whole: plain matrices are faster
    head = pair.head_config
    if not isinstance(head, HeadConfig):
        raise JetSpecError("this needs a target with a parallel draft head: name one with --head")
    trees = trees_of(head, budgets)
    rows: list[dict[str, Any]] = []
    for suite, messages in suites.items():
        with tempfile.TemporaryDirectory() as folder:
            dataset = record(pair, [pair.chat(m) for m in messages], Path(folder), suite, args)
            rows += walk(pair, dataset, trees, suite, args.max_new_tokens)
        if args.out is not None:
            write_results(args.out, rows)
    print(markdown(rows))
    if known := accept_lengths(rows):
        print(f"\nfor the head's config.json: \"accept_lengths\": {json.dumps(known)}")
    if args.json:
        print(json.dumps({"rows": rows}))


def trees_of(head: HeadConfig, budgets: list[int]) -> dict[tuple[str, int], TreeConfig]:
    """By method and budget; the methods have benchmark.py's names where it knows them. A chain has one budget, 0."""
    names: dict[Builder, str] = {"chain": "jetspec-chain", "accum_logp": "jetspec", "best_first": "jetspec-best-first"}
    if not head.causal:
        names = {"chain": "dflash", "accum_logp": "bidirectional accum_logp", "best_first": "ddtree"}
    trees = {(names.pop("chain"), 0): TreeConfig("chain", 1, head.block_size)}
    for builder, name in names.items():
        for budget in budgets:
            trees[name, budget] = TreeConfig(builder, TREE_WIDTHS[builder], budget)
    return trees


def record(pair: Pair, prompts: list[str], folder: Path, suite: str, args: argparse.Namespace) -> Dataset:
    """The target's greedy answers with the states that the head reads."""
    target, head = pair.target_config, pair.head_config
    assert isinstance(head, HeadConfig)
    layers = tuple(dict.fromkeys((*head.target_layer_ids, target.num_layers - 1)))
    answers = record_answers(pair, prompts, layers, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size,
                             sampling=SamplingParams(), seed=0)
    found = list(tqdm(answers, total=len(prompts), desc=f"{suite}: plain answers", unit="answer", leave=False))
    DatasetWriter(folder, DatasetInfo(args.model, layers, target.hidden_size, target.vocab_size, {})).add(found)
    return Dataset([folder])


def walk(pair: Pair, dataset: Dataset, trees: dict[tuple[str, int], TreeConfig], suite: str,
         max_new_tokens: int) -> list[dict[str, Any]]:
    """Rounds of every tree over all answers. The first token of an answer comes from its prompt, not from a round."""
    head = pair.head_config
    assert isinstance(head, HeadConfig)
    if all(len(dataset.tokens(i)) - length < 2 for i, length in enumerate(dataset.prompt_lengths)):
        raise JetSpecError(f"every answer of {suite} ended at once: there is no round to replay")
    width = -(-max(len(dataset.tokens(i)) for i in range(len(dataset))) // 64) * 64
    batches = Batches(dataset, TrainConfig(steps=1, row_tokens=width, anchors=max_new_tokens))
    accepted = jax.jit(partial(accepted_on, pair.target_config, head, tuple(trees.values()), dataset.info.layers))
    rounds, tokens = (np.zeros(len(trees), np.int64) for _ in range(2))
    for i in tqdm(batches.train.tolist(), desc=f"{suite}: trees", unit="answer", leave=False):
        batch = batches.assemble([[i]], np.random.default_rng(0))
        counts = np.asarray(accepted(pair.params.head, pair.params.target, batch))[:, 0]  # at every token but the last
        steps = len(dataset.tokens(i)) - dataset.prompt_lengths[i] - 1
        for t, count in enumerate(counts):
            at = 0
            while at < steps:
                rounds[t] += 1
                at += count[at]
            tokens[t] += steps  # the free token of the last round may lie beyond the end
    return [{"suite": suite, "method": name, "budget": budget, "prompts": len(dataset), "tokens": int(tokens[t]),
             "rounds": int(rounds[t]), "accepted_length": float(tokens[t] / rounds[t])}
            for t, (name, budget) in enumerate(trees)]


def markdown(rows: list[dict[str, Any]]) -> str:
    """A line per suite and method, a column per budget."""
    budgets = sorted({row["budget"] for row in rows if row["budget"]})
    lines = ["| suite | prompts | method | " + " | ".join(map(str, budgets)) + " |", "|---" * (len(budgets) + 3) + "|"]
    for suite, prompts in dict.fromkeys((row["suite"], row["prompts"]) for row in rows):
        mine = {(row["method"], row["budget"]): f"{row['accepted_length']:.2f}"
                for row in rows if row["suite"] == suite}
        for method in dict.fromkeys(method for method, _ in mine):
            chain = (method, 0) in mine
            cells = [mine[method, 0]] + [""] * (len(budgets) - 1) if chain else [mine[method, b] for b in budgets]
            lines.append(f"| {suite} | {prompts} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def accept_lengths(rows: list[dict[str, Any]]) -> list[float]:
    """What a head may say of itself (`HeadConfig.accept_lengths`), over all suites, as far as the budgets go."""
    known = []
    for nodes in ACCEPT_NODES:
        mine = [row for row in rows if row["budget"] == nodes and row["method"] in ("jetspec-best-first", "ddtree")]
        if not mine:
            break
        known.append(round(sum(row["tokens"] for row in mine) / sum(row["rounds"] for row in mine), 2))
    return known


def write_results(folder: Path, rows: list[dict[str, Any]]) -> None:
    write_text(folder / "results.json", json.dumps({"rows": rows}, indent=1) + "\n")
    write_text(folder / "results.md", markdown(rows) + "\n")
    panels = []
    for suite in dict.fromkeys(row["suite"] for row in rows):
        mine = [row for row in rows if row["suite"] == suite and row["budget"]]
        panels.append(Panel("tree budget (nodes)", "accepted tokens a round", [
            Line(method, [row["budget"] for row in mine if row["method"] == method],
                 [row["accepted_length"] for row in mine if row["method"] == method])
            for method in dict.fromkeys(row["method"] for row in mine)], title=suite, log_x=True))
    save_plot(folder / "replay.png", [panels])


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    add_pair_arguments(parser)
    parser.add_argument("--suite", action="append", metavar="NAME|FILE.jsonl",
                        help=f'{", ".join(SUITES)}, or a file of lines {{"prompt": ...}}; repeatable (default: all)')
    add_sample_arguments(parser, limit=32, plot="replay.png")
    parser.add_argument("--batch-size", type=integer, default=32, help="default %(default)s")
    return parser


if __name__ == "__main__":
    run_main(main)
