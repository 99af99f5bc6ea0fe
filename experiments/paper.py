"""The paper's analyses on recorded data of a small target: each writes a table and a plot.

    python experiments/paper.py gamma --dataset data/greedy --out out/gamma --steps 400
    python experiments/paper.py foreign --dataset data/talk --foreign-dataset data/foreign --out out/foreign
    python experiments/paper.py subset --dataset data/greedy --out out/subset
    python experiments/paper.py faithfulness --dataset data/greedy --causal-head A --bidirectional-head B --out out/f
    python experiments/paper.py heads --run runs/causal --run runs/dflash --run runs/eagle3 --out out/heads

gamma         depth weights exp(-(i-1)/gamma), gamma 0, 3, 7, 15, causal against bidirectional (paper, table 7), and
              the gap of `faithfulness` under each (table 9)
foreign       the target's own answers against another model's (table 6), to the same prompts: record both datasets
              with generate_data.py and the same --source conversations=N, the second with --foreign
subset        the loss over a part of the vocabulary against the full one, at equal steps
faithfulness  the gap between the head's and the target's log-probability of the head's best branch (tables 8 and 9)
heads         the curves of runs of train_head.py in one picture, and where they ended

The first three train what they compare. Budget scaling (figure of tables 1 and 2) is what benchmark.py --out plots.
These are small trainings: they show directions, not the paper's figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from experiments.common import add_compile_cache, claim_output, run_main
from experiments.plots import Line, Panel, save_plot
from jetspec_jax import HeadConfig, JetSpecError, Pair, TreeConfig, load_pretrained, with_head
from jetspec_jax.arguments import Parser, integer, number, seed, user_path
from jetspec_jax.attention import causal_bits, pack_bits
from jetspec_jax.cache import KVCache
from jetspec_jax.config import TargetConfig
from jetspec_jax.files import write_text
from jetspec_jax.presets import PRESETS
from jetspec_jax.target import target_forward, target_logits
from jetspec_jax.training.batches import Batch, Batches
from jetspec_jax.training.config import TrainConfig
from jetspec_jax.training.dataset import Dataset
from jetspec_jax.training.evaluate import ANCHORS_AT_ONCE, HeldOut
from jetspec_jax.training.initial import head_from_target
from jetspec_jax.training.log import read_metrics
from jetspec_jax.training.loss import block_slots
from jetspec_jax.training.trainer import Trainer

ACCEPTED = "accepted tokens a round"
GAMMAS = (0.0, 3.0, 7.0, 15.0)
TREES = (TreeConfig("chain"), TreeConfig(budget=16), TreeConfig(budget=64))
BINS = (5.0, 20.0, 40.0, 80.0)  # of the gap, as in table 9


def main() -> None:
    args = build_parser().parse_args()
    if args.steps < 1 or args.held_out < 1:
        raise JetSpecError("--steps and --held-out must be at least 1")
    claim_output(args.out)
    if args.analysis == "heads":
        rows = heads(args)
    else:
        if not args.dataset:
            raise JetSpecError(f"{args.analysis} needs --dataset: record one with generate_data.py")
        add_compile_cache()
        dataset, pair = Dataset(args.dataset), load_pretrained(args.model, tiles=False)
        rows = ON_DATA[args.analysis](args, pair, dataset)
    write_table(args.out, rows)
    print(markdown(rows))


def write_table(folder: Path, rows: list[dict[str, Any]]) -> None:
    """After every training: a run that is cut short leaves what it has."""
    write_text(folder / "results.json", json.dumps(rows, indent=1) + "\n")
    write_text(folder / "results.md", markdown(rows) + "\n")


def train(args: argparse.Namespace, pair: Pair, dataset: Dataset, held_out: list[Batch], gamma: float, causal: bool,
          name: str, vocab_subset: int | None) -> tuple[dict[str, Any], HeadConfig, Any]:
    """Trains one head from the target's last layers.

    Returns:
        What it accepts on the held-out answers, with its loss and a step's time; the head's configuration; its weights.
    """
    head = dataclasses.replace(preset_head(args), dtype="float32", causal=causal)
    config = settings(args, gamma, vocab_subset)
    target = pair.target_config
    trainer = Trainer(target, head, pair.params.target, config, dataset.info.layers)
    state = trainer.create_state(head_from_target(target, head, pair.params.target, jax.random.key(args.seed)))
    seconds = []
    for _, state, metrics in tqdm(trainer.train(state, Batches(dataset, config, args.held_out)),  # noqa: B007, B020
                                  total=args.steps, desc=name):
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter())
    found = HeldOut(target, head, TREES, dataset.info.layers, held_out)(state.params, pair.params.target)
    row = {"run": name, "gamma": gamma, "causal": causal, "loss": loss,
           "seconds a step": float(np.median(np.diff(seconds))) if len(seconds) > 1 else 0.0, **found}
    return row, head, state.params


def preset_head(args: argparse.Namespace) -> HeadConfig:
    preset = PRESETS[args.model].head if args.model in PRESETS else None
    if preset is None:
        raise JetSpecError(f"--model {args.model} has no preset head to train: choose one of "
                           f"{', '.join(name for name, p in PRESETS.items() if p.head)}")
    return preset


def settings(args: argparse.Namespace, gamma: float, vocab_subset: int | None) -> TrainConfig:
    return TrainConfig(steps=args.steps, gamma=gamma, vocab_subset=vocab_subset, learning_rate=args.learning_rate,
                       product_dtype=args.product_dtype, seed=args.seed, row_tokens=args.row_tokens)


def held_out_of(args: argparse.Namespace, dataset: Dataset) -> list[Batch]:
    return Batches(dataset, settings(args, 0.0, args.vocab_subset), args.held_out).held_out_batches()


def gamma(args: argparse.Namespace, pair: Pair, dataset: Dataset) -> list[dict[str, Any]]:
    held_out = held_out_of(args, dataset)
    require_whole_blocks(held_out, preset_head(args).block_size)
    rows = []
    for g in args.gammas:
        for causal in (True, False):
            name = f"{'causal' if causal else 'bidirectional'}, gamma {g:g}"
            row, head, params = train(args, pair, dataset, held_out, g, causal, name, args.vocab_subset)
            gaps = finite_gaps(pair, dataset.info.layers, head, params, held_out)
            rows.append({**row, "median gap": float(np.median(gaps)), "mean gap": float(np.mean(gaps))})
            write_table(args.out, rows)
    lines = [Line(f"{'causal' if causal else 'bidirectional'}, {name}",
                  [r["gamma"] for r in rows if r["causal"] == causal],
                  [r[name] for r in rows if r["causal"] == causal])
             for causal in (True, False) for name in ("accept_chain", "accept_accum_logp_64")]
    save_plot(args.out / "gamma.png", [[Panel("gamma (0: uniform)", ACCEPTED, lines)]])
    return rows


def foreign(args: argparse.Namespace, pair: Pair, dataset: Dataset) -> list[dict[str, Any]]:
    if not args.foreign_dataset:
        raise JetSpecError("the comparison needs --foreign-dataset (record one with generate_data.py --foreign)")
    own, foreign = same_prompts(dataset, Dataset(args.foreign_dataset))
    held_out = held_out_of(args, own)  # always the target's own answers: what decoding will meet
    rows = []
    for name, data in (("own answers", own), ("foreign answers", foreign)):
        rows.append(train(args, pair, data, held_out, args.gammas[0], True, name, args.vocab_subset)[0])
        write_table(args.out, rows)
    plot_trees(args.out / "foreign.png", rows)
    return rows


def same_prompts(own: Dataset, foreign: Dataset) -> tuple[Dataset, Dataset]:
    """Both datasets with the prompts that both have, in one order.

    Raises:
        JetSpecError: they were recorded for other prompts.
    """
    for name in ("mixture", "seed", "max_prompt_tokens"):
        values = [[info.recipe.get(name) for info in data.infos] for data in (own, foreign)]
        if values[0] != values[1] or len(values[0]) > 1:
            raise JetSpecError(f"own and foreign answers must be to the same prompts, and their {name} is {values[0]} "
                               f"and {values[1]}: record one dataset of each with the same --source conversations=N "
                               "and --seed")
    shared = sorted(set(own.indices) & set(foreign.indices))
    return own.select(shared), foreign.select(shared)


def subset(args: argparse.Namespace, pair: Pair, dataset: Dataset) -> list[dict[str, Any]]:
    held_out = held_out_of(args, dataset)
    rows = []
    for name, count in ((f"{args.vocab_subset} tokens", args.vocab_subset), ("full vocabulary", None)):
        rows.append(train(args, pair, dataset, held_out, args.gammas[0], True, name, count)[0])
        write_table(args.out, rows)
    plot_trees(args.out / "subset.png", rows)
    return rows


def heads(args: argparse.Namespace) -> list[dict[str, Any]]:
    if not args.run:
        raise JetSpecError("heads needs --run FOLDER, the --out of a train_head.py run; repeatable")
    rows, lines = [], []
    for folder in args.run:
        if not (folder / "metrics.jsonl").is_file():
            raise JetSpecError(f"{folder} holds no metrics.jsonl: give the --out folder of a train_head.py run")
        held_out = [entry for entry in read_metrics(folder / "metrics.jsonl") if "accept_chain" in entry]
        if not held_out:
            raise JetSpecError(f"{folder} was never evaluated on held-out answers: train with --held-out and "
                               "--eval-every")
        rows.append({"run": folder.name, **held_out[-1]})
        lines += [Line(f"{folder.name}, {name}", [entry["step"] for entry in held_out],
                       [entry[name] for entry in held_out]) for name in ("accept_chain", "accept_accum_logp_64")
                  if name in held_out[-1]]  # an autoregressive head has the chain alone
    save_plot(args.out / "heads.png", [[Panel("step", ACCEPTED, lines)]])
    return rows


def faithfulness(args: argparse.Namespace, pair: Pair, dataset: Dataset) -> list[dict[str, Any]]:
    """Per head: over held-out anchors, the head's log-probability of its arg-max chain less the target's."""
    held_out, rows, curves = held_out_of(args, dataset), [], []
    for name, path in (("causal", args.causal_head), ("bidirectional", args.bidirectional_head)):
        if path is None:
            raise JetSpecError(f"faithfulness needs --{name}-head: train one with experiments/train_head.py")
        loaded = with_head(pair, path)
        head = loaded.head_config
        if not isinstance(head, HeadConfig) or head.causal is not (name == "causal"):
            raise JetSpecError(f"--{name}-head {path} holds no {name} parallel head")
        require_whole_blocks(held_out, head.block_size)
        gaps = finite_gaps(pair, dataset.info.layers, head, loaded.params.head, held_out)
        edges = (-np.inf, *BINS, np.inf)
        share = {f"{low:g} to {high:g}": float(np.mean((gaps >= low) & (gaps < high))) for low, high in pairwise(edges)}
        rows.append({"head": name, "branches": len(gaps), "median gap": float(np.median(gaps)),
                     "mean gap": float(np.mean(gaps)), **share})
        curves.append(Line(name, np.sort(gaps).tolist(), np.linspace(0, 1, len(gaps)).tolist(), marker=""))
    save_plot(args.out / "faithfulness.png", [[Panel("log q(branch) - log p(branch)", "share of branches", curves)]])
    return rows


def finite_gaps(pair: Pair, layers: tuple[int, ...], head: HeadConfig, head_params: Any,
                held_out: list[Batch]) -> np.ndarray:
    """The gaps of all anchors whose block lies within their answer."""
    gap = jax.jit(partial(branch_gaps, pair.target_config, head, layers))
    gaps = np.concatenate([np.asarray(gap(head_params, pair.params.target, batch)) for batch in held_out])
    return gaps[np.isfinite(gaps)]


def require_whole_blocks(held_out: list[Batch], block_size: int) -> None:
    """Before long work: that some anchor's block lies within its answer.

    Raises:
        JetSpecError: none does.
    """
    for batch in held_out:
        segment, anchor, real = (np.asarray(x)[0] for x in (batch.segment, batch.anchor, batch.anchor_real))
        last = anchor + block_size - 1
        if np.any(real & (last < len(segment)) & (segment[np.minimum(last, len(segment) - 1)] == segment[anchor])):
            return
    raise JetSpecError(f"no held-out answer is longer than a block of {block_size} tokens: raise --held-out, or record "
                       "longer answers")


def branch_gaps(target: TargetConfig, head: HeadConfig, layers: tuple[int, ...], head_params: Any, target_params: Any,
                batch: Batch) -> Array:
    """log q - log p of the arg-max chain of every anchor of one packed row, [A]; NaN for padding.

    The target reads the row once and then every branch after its own context, as a round would.
    """
    slots = block_slots(target, head, target_params, head_params, batch, layers, head.block_size)
    tokens, segment, position, anchor = (jnp.asarray(x)[0] for x in
                                         (batch.tokens, batch.segment, batch.position, batch.anchor))
    size, depths = tokens.shape[0], head.block_size - 1
    same = (segment[:, None] == segment[None, :]) & jnp.tril(jnp.ones((size, size), bool))
    read = target_forward(target, target_params, tokens[None], position[None], pack_bits(same[None]),
                          KVCache.create(target, 1, 16), jnp.zeros((1,), jnp.int32))
    place = jnp.arange(size, dtype=jnp.int32)
    step = jnp.arange(depths, dtype=jnp.int32)
    at_once = math.gcd(anchor.shape[0], ANCHORS_AT_ONCE)

    def of_anchors(some: tuple[Array, Array]) -> Array:
        anchor, hidden = some
        log_q = jax.nn.log_softmax(target_logits(target, target_params, hidden), axis=-1)
        chain = jnp.argmax(log_q, axis=-1).astype(jnp.int32)
        before = position[anchor]  # tokens before the anchor, the slots that its branch sees
        own = (anchor[:, None] - before[:, None] + place[None, :]) % size  # [G, P], places of its sequence first
        cache = KVCache(*(side[:, 0, own].transpose(0, 1, 3, 2, 4) for side in (read.k, read.v)))
        branch = jnp.concatenate([tokens[anchor][:, None], chain[:, :-1]], axis=1)
        scored = target_forward(target, target_params, branch, before[:, None] + step[None, :],
                                causal_bits(at_once, depths), cache, before)
        log_p = jax.nn.log_softmax(target_logits(target, target_params, scored.hidden), axis=-1)
        return jnp.sum(jnp.max(log_q, axis=-1) - jnp.take_along_axis(log_p, chain[..., None], axis=-1)[..., 0], axis=-1)

    gaps = jax.lax.map(of_anchors, tuple(x.reshape(-1, at_once, *x.shape[1:]) for x in (anchor, slots.hidden[0])))
    return jnp.where(slots.real[0, :, -1] & (segment[anchor] > 0), gaps.reshape(-1), jnp.nan)


def plot_trees(file: Path, rows: list[dict[str, Any]]) -> None:
    names = [name for name in rows[0] if name.startswith("accept")]
    ticks = [name.removeprefix("accept_") for name in names]
    lines = [Line(r["run"], ticks, [r[name] for name in names]) for r in rows]
    save_plot(file, [[Panel("tree", ACCEPTED, lines)]])


def markdown(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = (f"{row[n]:.3f}" if isinstance(row.get(n), float) else str(row.get(n, "-")) for n in names)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


ON_DATA = {"gamma": gamma, "foreign": foreign, "subset": subset, "faithfulness": faithfulness}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("analysis", choices=(*ON_DATA, "heads"))
    parser.add_argument("--dataset", type=user_path, action="append", metavar="FOLDER", help="from generate_data.py; "
                        "repeatable")
    parser.add_argument("--foreign-dataset", type=user_path, action="append", metavar="FOLDER",
                        help="of generate_data.py --foreign, for `foreign`")
    parser.add_argument("--run", type=user_path, action="append", metavar="FOLDER",
                        help="of train_head.py, for `heads`")
    parser.add_argument("--out", type=user_path, required=True, metavar="FOLDER", help="table, results.json and plot")
    parser.add_argument("--model", default="smollm2-135m", metavar="NAME", help="a preset (default %(default)s)")
    parser.add_argument("--causal-head", metavar="PATH", help="for `faithfulness`")
    parser.add_argument("--bidirectional-head", metavar="PATH", help="for `faithfulness`")
    parser.add_argument("--gammas", type=number, nargs="+", default=GAMMAS, help="depth weights (default %(default)s)")
    parser.add_argument("--steps", type=integer, default=400, help="of each training (default %(default)s)")
    parser.add_argument("--held-out", type=integer, default=48, help="sequences (default %(default)s)")
    parser.add_argument("--row-tokens", type=integer, default=512, help="of a packed row (default %(default)s)")
    parser.add_argument("--learning-rate", type=number, default=1e-3, help="peak (default %(default)s)")
    parser.add_argument("--vocab-subset", type=integer, default=8192,
                        help="tokens of a step's loss (default %(default)s)")
    parser.add_argument("--product-dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--seed", type=seed, default=0)
    return parser


if __name__ == "__main__":
    run_main(main)
