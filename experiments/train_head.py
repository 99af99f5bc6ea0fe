"""Trains a draft head on recorded answers of its target; killed at any point, the same command resumes.

    python experiments/train_head.py --dataset data/greedy --dataset data/sampled --out runs/causal --steps 4000
    python experiments/train_head.py --dataset data/greedy --out runs/dflash --steps 4000 --bidirectional

In --out: checkpoints/, metrics.jsonl, tensorboard/, curve.png, and head/, which `decode.py --head` loads and
`jetspec-convert export-head` exports.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import shutil
import time
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from experiments.common import add_compile_cache, claim_output, require_at_least, require_present, run_main
from experiments.plots import Line, Panel, save_plot
from jetspec_jax import JetSpecError, TreeConfig, load_pretrained
from jetspec_jax.arguments import Parser, integer, number, user_path
from jetspec_jax.autoregressive import init_autoregressive
from jetspec_jax.checkpoint import save, written_beside
from jetspec_jax.collectives import DATA
from jetspec_jax.config import AutoregressiveHeadConfig, DrafterConfig, HeadConfig, TargetConfig
from jetspec_jax.head import init_head
from jetspec_jax.presets import PRESETS, default_target_layer_ids
from jetspec_jax.pretrained import load_head
from jetspec_jax.training.batches import Batches
from jetspec_jax.training.checkpoints import TrainCheckpoints
from jetspec_jax.training.config import Loss, TrainConfig
from jetspec_jax.training.dataset import Dataset
from jetspec_jax.training.evaluate import HeldOut
from jetspec_jax.training.initial import head_from_target
from jetspec_jax.training.log import MetricsLog, read_metrics
from jetspec_jax.training.trainer import Trainer, TrainState

CHAIN = TreeConfig("chain")
TREES = (CHAIN, TreeConfig(budget=16), TreeConfig(budget=64))
HELD_OUT_ROWS = 16


def main() -> None:
    args = build_parser().parse_args()
    config = TrainConfig(**{f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig)})
    require_at_least(args, eval_every=1, save_every=1, log_every=1, held_out=0)
    require_present(args.model, None if args.init in ("random", "target") else args.init)
    if args.save_every % args.log_every:
        raise JetSpecError(f"--save-every {args.save_every} must be a multiple of --log-every {args.log_every}: the "
                           "log of a resumed run would differ")
    claim_output(args.out)
    dataset = Dataset(args.dataset)
    add_compile_cache()
    pair = load_pretrained(args.model, False, dtype=args.target_dtype, tiles=False)
    target, target_params = pair.target_config, pair.params.target
    head, start = starting_point(args, target, target_params, config.seed)
    layers = dataset.info.layers or tuple(dict.fromkeys((*head.target_layer_ids, target.num_layers - 1)))
    mesh = Mesh(np.asarray(jax.devices()), (DATA,)) if args.data_parallel or args.fully_sharded else None
    trainer = Trainer(target, head, target_params, config, layers, mesh, args.fully_sharded)
    batches = Batches(dataset, config, args.held_out)
    checkpoints = TrainCheckpoints(args.out, head, config, {"sequences": len(dataset), "held_out": args.held_out,
                                                            "init": str(args.init)})
    fresh = trainer.create_state(start)
    state = checkpoints.restore(fresh) or fresh
    print(f"{len(batches.train)} sequences, {dataset.answer_tokens} answer tokens, {batches.rows_per_epoch} rows an "
          f"epoch; head of {sum(leaf.size for leaf in jax.tree.leaves(state.params)) / 1e6:.1f} M parameters; "
          f"step {int(state.step)} of {config.steps}")
    # An autoregressive head's tree depends on the branches that it has read: only benchmark.py tells what that accepts.
    trees = (CHAIN,) if isinstance(head, AutoregressiveHeadConfig) else TREES
    held_out = HeldOut(target, head, trees, layers, batches.held_out_batches()[:HELD_OUT_ROWS])
    state = run(args, trainer, batches, checkpoints, held_out, state)
    write_head(args.out / "head", head, state)
    entries = read_metrics(args.out / "metrics.jsonl")
    plot_curve(entries, args.out / "curve.png", f"{args.model}: {args.out.name}")
    print(json.dumps({"steps": int(state.step), **{k: v for k, v in entries[-1].items() if k != "step"}}))


def run(args: argparse.Namespace, trainer: Trainer, batches: Batches, checkpoints: TrainCheckpoints,
        held_out: HeldOut, state: TrainState) -> TrainState:
    """The loop, with everything that is watched."""
    log = MetricsLog(args.out, int(state.step))
    if int(state.step) == 0 and held_out.batches:
        log.add(0, held_out(state.params, trainer.target_params))
    waiting: list[dict[str, jax.Array]] = []
    since = time.perf_counter()
    with tqdm(total=trainer.config.steps, initial=int(state.step), unit="step", smoothing=0.05) as bar:
        for step, state, metrics in trainer.train(state, batches):  # noqa: B020 (the state moves on)
            waiting.append(metrics)
            bar.update()
            last = step == trainer.config.steps
            if step % args.log_every == 0 or last:
                values = mean_metrics(waiting)
                values["slots_per_second"] = values.pop("slots") * len(waiting) * trainer.config.accumulate / (
                    time.perf_counter() - since)
                values.pop("anchors")
                log.add(step, values)
                bar.set_postfix_str(f"loss {values['loss']:.3f}, accepted {values['accepted_length']:.2f}, "
                                    f"{values['slots_per_second']:.0f} slots/s")
                waiting, since = [], time.perf_counter()
            if (step % args.eval_every == 0 or last) and held_out.batches:
                values = held_out(state.params, trainer.target_params)
                log.add(step, values)
                bar.write(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()))
                since = time.perf_counter()
            if step % args.save_every == 0 or last:
                checkpoints.save(state)
                since = time.perf_counter()
    log.close()
    return state


def mean_metrics(entries: list[dict[str, jax.Array]]) -> dict[str, float]:
    fetched: Any = jax.device_get(entries)
    return {name: float(np.mean([entry[name] for entry in fetched])) for name in fetched[0]}


def starting_point(args: argparse.Namespace, target: TargetConfig, params: dict,
                   seed: int) -> tuple[DrafterConfig, dict]:
    """The head to train, from --init and the options that shape it."""
    if args.autoregressive and args.bidirectional:
        raise JetSpecError("--autoregressive and --bidirectional are two kinds of head: choose one")
    if args.init not in ("random", "target"):
        shaping = {"--layers": args.layers, "--block-size": args.block_size, "--mask-token-id": args.mask_token_id,
                   "--bidirectional": args.bidirectional or None, "--autoregressive": args.autoregressive or None}
        given = [option for option, value in shaping.items() if value is not None]
        if given:
            raise JetSpecError(f"{', '.join(given)}: the head of --init {args.init} has its shape already; leave it "
                               "out")
        head, start = load_head(args.init, dtype="float32")
        head.check_fits(target)
        return head, start
    preset = PRESETS[args.model].head if args.model in PRESETS else None
    mask = args.mask_token_id if args.mask_token_id is not None else (preset.mask_token_id if preset else None)
    if mask is None:
        raise JetSpecError("--mask-token-id is needed for this target: an entry of the vocabulary that no text has")
    shape = preset or HeadConfig(
        vocab_size=target.vocab_size, hidden_size=target.hidden_size, intermediate_size=target.intermediate_size,
        num_layers=5 if args.layers is None else args.layers, num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim, rope_theta=target.rope_theta, rope_scaling=target.rope_scaling,
        rms_norm_eps=target.rms_norm_eps, block_size=16,
        target_layer_ids=default_target_layer_ids(target.num_layers, 5), num_target_layers=target.num_layers,
        mask_token_id=mask)
    if args.autoregressive:
        return autoregressive_start(args, shape, seed)
    head = dataclasses.replace(shape, num_layers=shape.num_layers if args.layers is None else args.layers,
                               mask_token_id=mask, dtype="float32", causal=not args.bidirectional,
                               block_size=shape.block_size if args.block_size is None else args.block_size)
    key = jax.random.key(seed)
    return head, (head_from_target(target, head, params, key) if args.init == "target" else init_head(head, key))


def autoregressive_start(args: argparse.Namespace, shape: HeadConfig,
                         seed: int) -> tuple[AutoregressiveHeadConfig, dict]:
    """One layer unless told otherwise, at random (its rows read something else than the target's layers do)."""
    head = dataclasses.replace(AutoregressiveHeadConfig.like(shape), dtype="float32",
                               num_layers=1 if args.layers is None else args.layers,
                               block_size=shape.block_size if args.block_size is None else args.block_size)
    return head, init_autoregressive(head, jax.random.key(seed))


def plot_curve(entries: list[dict[str, float]], file: Path, title: str) -> None:
    """Loss (the mean of each interval) and accepted lengths against steps."""

    def line(name: str) -> Line:
        points = [(entry["step"], entry[name]) for entry in entries if name in entry]
        return Line(name, [x for x, _ in points], [y for _, y in points], marker="")

    accepted = sorted({name for entry in entries for name in entry if name.startswith("accept")})
    save_plot(file, [[Panel("step", "loss", [line("loss")]),
                      Panel("step", "accepted tokens a round", [line(name) for name in accepted])]], title)


def write_head(folder: Path, head: DrafterConfig, state: TrainState) -> None:
    """The trained head as a checkpoint of its own, in bfloat16 as heads are released."""
    stored = dataclasses.replace(head, dtype="bfloat16", product_dtype=None)
    params = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, "bfloat16"), jax.device_get(state.params))
    shutil.rmtree(folder, ignore_errors=True)
    with written_beside(folder) as beside:
        save(beside, stored, params, source="experiments/train_head.py")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--dataset", type=user_path, action="append", required=True, metavar="FOLDER",
                        help="from generate_data.py; repeatable")
    parser.add_argument("--out", type=user_path, required=True, metavar="FOLDER",
                        help="of the run; resumed if it exists")
    parser.add_argument("--model", default="smollm2-135m", metavar="NAME|PATH", help="target (default %(default)s)")
    parser.add_argument("--target-dtype", help="default: the stored one, float32 on a CPU")
    parser.add_argument("--init", default="target", metavar="target|random|PATH",
                        help="start from the target's last layers, at random, or from a head (default %(default)s)")
    parser.add_argument("--layers", type=integer, help="of the head (default: the preset's, else 5)")
    parser.add_argument("--block-size", type=integer, help="G, the anchor included (default: the preset's, else 16)")
    parser.add_argument("--mask-token-id", type=integer, help="default: the preset's")
    parser.add_argument("--bidirectional", action="store_true", help="slots see their whole block (DFlash)")
    parser.add_argument("--autoregressive", action="store_true", help="an EAGLE-3-style head, a pass per depth")
    parser.add_argument("--data-parallel", action="store_true", help="rows spread over all devices")
    parser.add_argument("--fully-sharded", action="store_true", help="and parameters and optimiser too")
    parser.add_argument("--held-out", type=integer, default=48, help="last sequences, never trained on (default 48)")
    parser.add_argument("--log-every", type=integer, default=20, help="steps (default %(default)s)")
    parser.add_argument("--eval-every", type=integer, default=500, help="steps (default %(default)s)")
    parser.add_argument("--save-every", type=integer, default=200, help="steps (default %(default)s)")
    settings = parser.add_argument_group("settings (see jetspec_jax.training.config.TrainConfig)")
    choices = {"loss": get_args(Loss), "product_dtype": ("bfloat16", "float32")}
    meaning = documented(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        option = "--" + field.name.replace("_", "-")
        if field.type == "bool":
            settings.add_argument(option, action="store_true", help=meaning[field.name])
            continue
        kind = number if "float" in str(field.type) else integer if "int" in str(field.type) else str
        required = field.default is dataclasses.MISSING
        settings.add_argument(option, type=kind, choices=choices.get(field.name), required=required,
                              default=None if required else field.default,
                              help=meaning[field.name] + ("" if required else f" (default {field.default})"))
    return parser


def documented(config: type) -> dict[str, str]:
    """What the docstring of a dataclass says of each field."""
    entries = re.findall(r"^ {4}([\w, ]+): (.*(?:\n {8}.*)*)", inspect.getdoc(config) or "", flags=re.MULTILINE)
    return {name: " ".join(text.split()).rstrip(".") for names, text in entries for name in names.split(", ")}


if __name__ == "__main__":
    run_main(main)
