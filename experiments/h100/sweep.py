"""The figures of docs/h100.md: models, budgets and contexts in one table and one plot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.h100.plan import (
    DEVICE_BYTES,
    compile_prefill,
    compile_rounds,
    memory_of,
    plain_account,
    plan,
    round_account,
    setup_for,
)
from experiments.h100.report import describe
from experiments.plots import Line, Panel, save_plot
from jetspec_jax import JetSpecError, SamplingParams, TreeConfig
from jetspec_jax.files import write_text

MODELS = ("qwen3-0.6b", "qwen3-8b", "qwen3-32b")
BUDGETS = (16, 32, 64, 128, 256)
CONTEXTS = (1024, 4096, 32768)
EXAMPLE = ("qwen3-8b", 256, 4096)


def sweep(folder: Path) -> None:
    """Writes h100.png and h100.json into `folder`, and the account and the table into its h100.md."""
    page = folder / "h100.md"
    if not page.is_file():
        raise JetSpecError(f"--sweep writes its table into {page}, which does not exist")
    name, budget, context = EXAMPLE
    setup = setup_for(name, TreeConfig(budget=budget), 1, context)
    account = "```\n" + describe(name, setup, plan(setup, temperature=0.8)) + "\n```"
    write_text(page, fill(page.read_text(), "account", account))
    rows = []
    for name in MODELS:
        for context in CONTEXTS:
            rows += sweep_context(name, context)
        # Each model takes minutes: what is there is written.
        write_text(folder / "h100.json", json.dumps(rows, indent=1) + "\n")
        write_text(page, fill(page.read_text(), "table", table(rows)))
        plot(rows, folder / "h100.png")


def sweep_context(name: str, context: int) -> list[dict[str, Any]]:
    """All budgets; plain decoding and the prompt do not depend on them."""
    rows: list[dict[str, Any]] = []
    plain, reading = None, None
    for budget in tqdm(BUDGETS, desc=f"{name}, context {context}"):
        setup = setup_for(name, TreeConfig(budget=budget), 1, context)
        plain = plain or plain_account(setup)
        reading = reading or compile_prefill(setup)
        program = compile_rounds(setup, setup.decoder, SamplingParams())
        account = round_account(setup, program)
        rows.append({"model": name, "context": context, "budget": budget,
                     "total_bytes": memory_of(setup, program, reading)["total_bytes"],
                     "launches": account["launches"]["total"], "floor_seconds": account["floor_seconds"],
                     "estimate_seconds": account["estimate_seconds"],
                     "plain_floor_seconds": plain["floor_seconds"], "plain_seconds": plain["estimate_seconds"]})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One line per setting."""
    lines = ["| model | context | budget | memory, GB | launches | floor, ms | estimate, ms | ratio | plain, ms | "
             "pays above |", "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for r in rows:
        fits = "" if r["total_bytes"] <= DEVICE_BYTES else " (no)"
        lines.append(
            f"| {r['model']} | {r['context']} | {r['budget']} | {r['total_bytes'] / 1e9:.1f}{fits} | {r['launches']} | "
            f"{r['floor_seconds'] * 1e3:.2f} | {r['estimate_seconds'] * 1e3:.2f} | "
            f"{r['estimate_seconds'] / r['floor_seconds']:.2f} | {r['plain_seconds'] * 1e3:.2f} | "
            f"{r['estimate_seconds'] / r['plain_seconds']:.2f} |")
    return "\n".join(lines)


def fill(text: str, mark: str, content: str) -> str:
    """Replaces what stands between `<!-- mark -->` and `<!-- end mark -->`."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- end {mark} -->)", re.DOTALL)
    if not pattern.search(text):
        raise JetSpecError(f"the page has no <!-- {mark} --> ... <!-- end {mark} -->")
    return pattern.sub(lambda found: found.group(1) + content + "\n" + found.group(2), text)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time of a round against its budget; a panel per model."""
    panels = []
    for name in dict.fromkeys(r["model"] for r in rows):
        lines = []
        for color, context in zip(("C0", "C1", "C2"), CONTEXTS, strict=True):
            found = [r for r in rows if r["model"] == name and r["context"] == context]
            lines += [Line(f"{what}, {context} tokens", [r["budget"] for r in found],
                           [r[field] * 1e3 for r in found], marker, style, color)
                      for what, field, marker, style in (
                          ("estimate", "estimate_seconds", "o", "-"), ("floor", "floor_seconds", "", "--"),
                          ("plain", "plain_seconds", "", ":"))]
        panels.append(Panel("budget, nodes", "ms a round", lines, title=name, log_x=True))
    save_plot(path, [panels])
