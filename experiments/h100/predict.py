"""What the plan predicts of a first run on a card: predicted.json, and the tables that docs/h100.md makes of it.

    python experiments/h100_plan.py --predict experiments/h100/predicted.json

Whoever only reads the file (the benchmark) needs no compiler: what compiles is imported where it is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jetspec_jax.files import write_text

if TYPE_CHECKING:
    from experiments.h100.plan import Setup

Row = dict[str, Any]

PREDICTED = Path(__file__).with_name("predicted.json")
PAGE = Path(__file__).parents[2] / "docs" / "h100.md"
MODEL, WIDTH = "qwen3-8b", 7
BUDGETS, CONTEXTS, SLOTS = (1, 16, 32, 64, 128, 256), (1024, 4096), 6144  # budget 1 is plain decoding
BATCHES, BATCH_BUDGETS, BATCH_CONTEXT, BATCH_SLOTS = (8, 32), (1, 16, 64), 1024, 2048
KERNELS_OF, KERNELS_AT = (256, 64, 1), 4096  # budgets and context whose launches are listed one by one
NEGLIGIBLE = 1.0  # microseconds a launch: smaller launches of XLA's are left out of the page's table

# Assumed, not measured and not in the estimate, which knows neither L2 cache nor steps that wait for each other.
L2_RATE = 5.5e12  # bytes a second, from the L2 cache to all multiprocessors
STEP_US = 1.0  # a dependent step inside one block
ASSUMPTIONS = [
    {"name": "L2 cache", "value": L2_RATE / 1e12, "unit": "TB/s",
     "where": "tree_attention: every block of rows reads all keys; gated_product: every block reads all rows"},
    {"name": "serial step", "value": STEP_US, "unit": "us", "where": "tree_build: every step needs the one before"}]
TREES = (("accum_logp", 7, 64), ("accum_logp", 7, 256), ("best_first", 16, 64), ("best_first", 16, 256))


@cache
def load_predictions() -> dict[str, Any]:
    """The committed file."""
    found: dict[str, Any] = json.loads(PREDICTED.read_text())
    return found


def predicted_round(budget: int, context: int, batch: int) -> Row | None:
    """What is predicted of a round; budget 1 is plain decoding. None: nothing is."""
    return next((row for row in load_predictions()["rounds"]
                 if (row["budget"], row["context"], row["batch"]) == (budget, context, batch)), None)


def predicted_kernel(name: str, budget: int) -> list[Row]:
    """The launches of one kernel in a round of batch 1 at 4096 tokens: a row for each place and size."""
    return [row for row in load_predictions()["kernels"] if (row["kernel"], row["budget"]) == (name, budget)]


def predict(file: Path) -> None:
    """Writes `file`; the committed one goes into the page, too."""
    from experiments.h100.sweep import fill

    committed = file.resolve() == PREDICTED
    if committed:
        fill(PAGE.read_text(), "predictions", "")  # refuses a page without the place for it before anything is compiled
    report = compile_predictions()
    write_text(file, as_json(report))
    if committed:
        write_text(PAGE, fill(PAGE.read_text(), "predictions", tables(report)))


def compile_predictions() -> dict[str, Any]:
    """Compiles every program once: the length is an operand, so that one serves all contexts."""
    from tqdm import tqdm

    from experiments.h100.plan import BASIS

    cases: list[tuple[int, int, int, tuple[int, ...]]] = [(budget, 1, SLOTS, CONTEXTS) for budget in BUDGETS]
    cases += [(budget, batch, BATCH_SLOTS, (BATCH_CONTEXT,)) for batch in BATCHES for budget in BATCH_BUDGETS]
    rounds, kernels = [], []
    for case in tqdm(cases):
        for row, launches in compile_case(*case):
            rounds.append(row)
            if row["batch"] == 1 and row["context"] == KERNELS_AT and row["budget"] in KERNELS_OF:
                kernels += launches
    return {
        "command": "python experiments/h100_plan.py --predict experiments/h100/predicted.json",
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "jax-cuda13-plugin", "flax")},
        "model": MODEL, "basis": f"{BASIS}; a lower bound: neither the L2 cache, nor latency, nor vector operations, "
                                 "nor serial steps count, but as assumed_ms and assumed_us, by the assumptions",
        "gap_us": gap_us(), "assumptions": ASSUMPTIONS,
        "trees": [{"builder": builder, "width": width, "nodes": nodes, "steps": serial_steps(builder, width, nodes),
                   "assumed_us": serial_steps(builder, width, nodes) * STEP_US} for builder, width, nodes in TREES],
        "rounds": sorted(rounds, key=lambda row: (row["batch"], row["context"], row["budget"])),
        "kernels": sorted(kernels, key=lambda row: (row["budget"], row["kernel"], row["place"], row["bytes"]))}


def compile_case(budget: int, batch: int, slots: int, contexts: Iterable[int]) -> list[tuple[Row, list[Row]]]:
    """(round, its launches) at each context of one program with so many cache slots."""
    from experiments.h100.plan import (
        SamplingParams,
        TreeConfig,
        account_of,
        compile_rounds,
        read_sequence,
        rows_of,
        setup_for,
    )

    setup = setup_for(MODEL, TreeConfig(width=WIDTH, budget=budget), batch, max(contexts))
    setup = replace(setup, context=slots - setup.decoder.drafter.max_path)  # the longest for which S is this
    assert setup.slots == slots, setup.slots
    decoder = setup.plain_decoder if budget == 1 else setup.decoder
    program, found = compile_rounds(setup, decoder, SamplingParams()), []
    for context in contexts:
        here = replace(setup, context=context)
        launches = kernel_rows(rows_of(read_sequence(program, context).launches), here)
        found.append((round_row(account_of(here, decoder, program), launches, here, slots), launches))
    return found


def kernel_rows(rows: list[Row], setup: Setup) -> list[Row]:
    """Launches of one round: equal ones in one row, the time of one without the gap before it."""
    merged: dict[tuple, Row] = {}
    for row in rows:
        label, place, size, flops = (row[key] for key in ("kind", "place", "bytes", "flops"))
        if (label, place, size, flops) in merged:  # compiled twice under two names
            merged[label, place, size, flops]["launches"] += row["launches"]
            continue
        us = row["seconds"] / row["launches"] * 1e6 - gap_us()
        merged[label, place, size, flops] = found = {
            "kernel": label, "place": place, "budget": setup.tree.budget, "launches": row["launches"],
            "us": round(us, 3), "bytes": size, "flops": flops}
        if (assumed := assumed_us(row, setup)) > us:
            found["assumed_us"] = round(assumed, 3)
    return list(merged.values())


def round_row(account: dict[str, Any], launches: list[Row], setup: Setup, slots: int) -> Row:
    """Times, and sums over its launches; `host` counts what the host launches, waits for and fetches in a round."""
    estimate = account["estimate_seconds"] * 1e3
    more = sum(row["launches"] * (row.get("assumed_us", row["us"]) - row["us"]) for row in launches) / 1e3
    return {
        "budget": setup.tree.budget, "context": setup.context, "batch": setup.batch, "slots": slots,
        "floor_ms": round(account["floor_seconds"] * 1e3, 3), "estimate_ms": round(estimate, 3),
        "assumed_ms": round(estimate + more, 3), "launches": account["launches"]["total"],
        "gigabytes": round(sum(row["launches"] * row["bytes"] for row in launches) / 1e9, 3),
        "tflop": round(sum(row["launches"] * row["flops"] for row in launches) / 1e12, 3),
        "host": account["launches"]["outside_graphs"] + account["host_syncs_per_round"] + account["host_transfers"]}


def assumed_us(row: Row, setup: Setup) -> float:
    """Microseconds of one launch by the assumptions; 0 where none is about it."""
    target, again = setup.target, 0
    if row["kind"] == "tree_build":
        return serial_steps(setup.tree.builder, setup.tree.width, setup.tree.budget) * STEP_US
    if row["kind"] == "gated_product":  # 2 operations for every row, input and one of 2 F columns
        again = row["flops"] // (4 * target.intermediate_size)
    elif row["kind"] == "tree_attention":  # of a group's keys, committed ones and values
        again = 2 * setup.batch * setup.context * target.num_kv_heads * target.head_dim
    blocks = row["grid"][0] if again else 1
    return float(row["bytes"] + (blocks - 1) * again * target.jnp_dtype.itemsize) / L2_RATE * 1e6


def serial_steps(builder: str, width: int, nodes: int) -> int:
    """Steps of a tree that wait for each other: one a node, or one for all children of a node."""
    return -(-(nodes - 1) // (1 if builder == "best_first" else width))


def gap_us() -> float:
    from experiments.h100.roofline import LAUNCH_SECONDS

    return LAUNCH_SECONDS * 1e6


def as_json(report: dict[str, Any]) -> str:
    """One line a row, so that a change shows as the rows it changed."""
    parts = []
    for key, value in report.items():
        rows = isinstance(value, list)
        text = "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in value) + "\n ]" if rows else json.dumps(value)
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def tables(report: dict[str, Any]) -> str:
    """Rounds and kernels as the page shows them."""
    plain = {(r["batch"], r["context"]): r["estimate_ms"] for r in report["rounds"] if r["budget"] == 1}
    lines = [", ".join(f"{name} {version}" for name, version in report["versions"].items()) + ".", "",
             "| budget | batch | context | launches | gaps, ms | floor, ms | estimate, ms | with assumptions, ms | "
             "pays above |", "|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for r in report["rounds"]:
        lines.append(f"| {'plain' if r['budget'] == 1 else r['budget']} | {r['batch']} | {r['context']} | "
                     f"{r['launches']} | {r['launches'] * report['gap_us'] / 1e3:.2f} | {r['floor_ms']:.2f} | "
                     f"{r['estimate_ms']:.2f} | {r['assumed_ms']:.2f} | "
                     f"{r['estimate_ms'] / plain[r['batch'], r['context']]:.2f} |")
    named = [f"{budget} nodes" if budget > 1 else "plain" for budget in KERNELS_OF]
    lines += ["", f"| one launch, us (x launches a round) | {' | '.join(named)} |", f"|---|{'---:|' * len(named)}"]
    rows = report["kernels"]
    for kernel, place in sorted({(row["kernel"], row["place"]) for row in rows if is_shown(row)}):
        cells = [", ".join(cell(row) for row in rows if (row["kernel"], row["place"], row["budget"])
                           == (kernel, place, budget)) for budget in KERNELS_OF]
        lines.append(f"| {kernel}: {place} | {' | '.join(cells)} |")
    return "\n".join(lines)


def is_shown(row: Row) -> bool:
    """Kernels of ours, products, and what takes long enough to be found."""
    return row["kernel"] not in ("fusion", "copy") or row["us"] >= NEGLIGIBLE


def cell(row: Row) -> str:
    assumed = f"; {row['assumed_us']:.1f}" if "assumed_us" in row else ""
    return f"{row['us']:.1f}{assumed} (x {row['launches']})"
