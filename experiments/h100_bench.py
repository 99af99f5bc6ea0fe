"""Measures on a real H100: the GPU tests, every kernel of a round against its floor, rounds against plain decoding.

    python experiments/h100_bench.py --out runs/h100
    python experiments/h100_bench.py --out runs/check --tiny      # checks the script anywhere, kernels interpreted

Needs an NVIDIA GPU and the extras `gpu` and `test`; weights are random, for time does not depend on them. Floors are
those of experiments/h100_plan.py (3.0 TB/s, 798 TFLOP/s). Writes results.md and results.json into --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.common import check_output, run_main, write_text
from experiments.h100.measure import measure_kernels, measure_rounds
from experiments.h100.plan import Setup, abstract_params, setup_for
from jetspec_jax import HeadConfig, JetSpecError, Pair, TargetConfig, TreeConfig
from jetspec_jax.draft import Params

BUDGETS = (16, 32, 64, 128, 256)
TURNS, LAUNCHES = 20, 10  # of every kernel: turns of a loop on the device, launches in each


def tiny_setup(budget: int, context: int) -> Setup:
    """Small enough for interpreted kernels."""
    target = TargetConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_layers=2, num_heads=2,
                          num_kv_heads=1, head_dim=16, dtype="float32", kernels="pallas_interpret")
    head = HeadConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_layers=1, num_heads=2, num_kv_heads=1,
                      head_dim=16, dtype="float32", kernels="pallas_interpret", block_size=4, target_layer_ids=(0, 1),
                      num_target_layers=2, mask_token_id=63)
    return Setup(target, head, TreeConfig(width=2, budget=budget), 1, context)


def random_weights(setup: Setup) -> Params:
    """Normal with deviation 0.02; scales of norms are 1."""
    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) == 1:
            return jnp.ones(leaf.shape, leaf.dtype)
        return jax.random.normal(jax.random.key(len(leaf.shape)), leaf.shape, leaf.dtype) * 0.02

    params: Params = jax.tree.map(draw, abstract_params(setup))
    return params


def run_gpu_tests() -> dict[str, Any]:
    """The tests with the marker `gpu`, in their own process, which has to do with the memory that this one leaves."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"],
                          cwd=Path(__file__).parent.parent, capture_output=True, text=True,
                          env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()])[-1]
    return {"passed": done.returncode == 0, "summary": last}


def as_markdown(report: dict[str, Any]) -> str:
    lines = [f"# {report['model']} on {report['device']}", "",
             f"Measured by `experiments/h100_bench.py`, context {report['context']}, batch 1, random weights. "
             f"GPU tests: {report['gpu_tests']['summary']}", "",
             "| budget | round, ms | floor, ms | ratio | plain, ms | pays above |", "|---:|---:|---:|---:|---:|---:|"]
    plain = report["plain"]["seconds"]
    for row in report["rounds"]:
        lines.append(f"| {row['budget']} | {row['seconds'] * 1e3:.2f} | {row['floor_seconds'] * 1e3:.2f} | "
                     f"{row['seconds'] / row['floor_seconds']:.2f} | {plain * 1e3:.2f} | "
                     f"{row['seconds'] / plain:.2f} |")
    lines += ["", "A round pays where it adds more tokens than the last column. Small operands of a kernel may lie in "
              "the L2 cache when it is launched again.", "",
              "| kernel | operands | us | floor, us | ratio |", "|---|---|---:|---:|---:|"]
    for row in report["kernels"]:
        if "error" in row:
            lines.append(f"| {row['name']} | {row['operands']} | failed: {row['error']} | | |")
            continue
        lines.append(f"| {row['name']} | {row['operands']} | {row['seconds'] * 1e6:.1f} | "
                     f"{row['floor_seconds'] * 1e6:.1f} | {row['seconds'] / row['floor_seconds']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="results.json and results.md")
    parser.add_argument("--model", default="qwen3-8b", metavar="NAME", help="preset (default %(default)s)")
    parser.add_argument("--context", type=int, help="committed tokens (default 4096; 64 with --tiny)")
    parser.add_argument("--repeats", type=int, default=5, help="of every measurement (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with interpreted kernels, on any machine")
    args = parser.parse_args()
    if args.repeats < 1 or (args.context is not None and args.context < 1):
        raise JetSpecError(f"--repeats and --context must be at least 1, not {args.repeats} and {args.context}")
    if not args.tiny and jax.default_backend() != "gpu":
        raise JetSpecError("no NVIDIA GPU is visible to JAX (pip install -e '.[gpu,test]'); --tiny checks the script "
                           "without one")
    budgets, turns, launches = ((8,), 1, 1) if args.tiny else (BUDGETS, TURNS, LAUNCHES)
    context = args.context or (64 if args.tiny else 4096)
    setup = tiny_setup(budgets[-1], context) if args.tiny else setup_for(
        args.model, TreeConfig(budget=budgets[-1]), 1, context)
    check_output(args.out)
    tests = run_gpu_tests()
    pair = Pair(setup.target, setup.head, random_weights(setup))
    setups = [dataclasses.replace(setup, tree=dataclasses.replace(setup.tree, budget=b)) for b in budgets]
    plain, rounds = measure_rounds(pair, setups, args.repeats)
    report = {"model": "tiny" if args.tiny else args.model, "device": jax.devices()[0].device_kind,
              "context": context, "gpu_tests": tests, "plain": plain, "rounds": rounds, "kernels": []}
    write_report(args.out, report)  # whatever the kernels do, the rounds were measured
    report["kernels"] = measure_kernels(setup, turns, launches, args.repeats)
    write_report(args.out, report)
    print(as_markdown(report))


def write_report(folder: Path, report: dict[str, Any]) -> None:
    write_text(folder / "results.json", json.dumps(report, indent=1) + "\n")
    write_text(folder / "results.md", as_markdown(report))


if __name__ == "__main__":
    run_main(main)
