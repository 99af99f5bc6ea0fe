"""What a decoding round would do on an H100, read off the program that XLA compiles for one; no GPU is needed.

    python experiments/h100_plan.py --model qwen3-8b --budget 256 --context 4096
    python experiments/h100_plan.py --model qwen3-8b --temperature 0.8 --json
    python experiments/h100_plan.py --model qwen3-32b --tensor-parallel 4
    python experiments/h100_plan.py --sweep docs          # the table and the plot of docs/h100.md
    python experiments/h100_plan.py --sweep-large docs    # its table of several GPUs and of experts
    python experiments/h100_plan.py --predict experiments/h100/predicted.json    # what a run on a card should confirm

Needs the extra `plan`: pip install -e '.[plan]'. Times are computed from bytes, operations and launches; docs/h100.md
explains how. With --json the last line is one JSON object.
"""

from __future__ import annotations

import json
from typing import get_args

from experiments.common import run_main
from experiments.h100.compile import require_plugin
from experiments.h100.large import sweep_large
from experiments.h100.plan import ACCEPTED, plan, setup_for
from experiments.h100.predict import predict
from experiments.h100.report import describe
from experiments.h100.sweep import sweep
from jetspec_jax import JetSpecError, SamplingParams, TreeConfig
from jetspec_jax.arguments import Parser, integer, number, user_path
from jetspec_jax.config import Builder


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", default="qwen3-8b", metavar="NAME", help="preset (default %(default)s)")
    parser.add_argument("--budget", type=integer, default=256, help="nodes of a tree (default %(default)s)")
    parser.add_argument("--tree-builder", choices=get_args(Builder), default="accum_logp", help="default %(default)s")
    parser.add_argument("--context", type=integer, default=4096, help="committed tokens (default %(default)s)")
    parser.add_argument("--batch", type=integer, default=1, help="sequences (default %(default)s)")
    parser.add_argument("--tensor-parallel", type=integer, default=1, metavar="N",
                        help="GPUs that share every layer (default %(default)s)")
    parser.add_argument("--temperature", type=number, default=0.0, help="above 0: the sampled round beside the greedy")
    parser.add_argument("--accepted", type=number, default=ACCEPTED, metavar="TOKENS",
                        help="tokens that a round adds (default %(default)s, arXiv 2606.18394)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--sweep", type=user_path, metavar="FOLDER",
                        help="write the table and the plot of docs/h100.md")
    parser.add_argument("--sweep-large", type=user_path, metavar="FOLDER",
                        help="write the table of models over several GPUs, and with experts, of docs/h100.md")
    parser.add_argument("--predict", type=user_path, metavar="FILE",
                        help="write what a run on a card is put beside; experiments/h100/predicted.json goes into "
                             "docs/h100.md, too")
    args = parser.parse_args()
    require_plugin()
    if args.sweep:
        sweep(args.sweep)
        return
    if args.sweep_large:
        sweep_large(args.sweep_large)
        return
    if args.predict:
        predict(args.predict)
        return
    SamplingParams(args.temperature)  # refuses what makes no sense
    if args.accepted < 1:
        raise JetSpecError(f"--accepted must be at least 1, not {args.accepted}")
    setup = setup_for(args.model, TreeConfig(args.tree_builder, budget=args.budget), args.batch, args.context,
                      args.tensor_parallel)
    report = plan(setup, args.temperature, args.accepted)
    print(describe(args.model, setup, report))
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    run_main(main)
