"""The table of docs/h100.md on models over several GPUs, and with experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.h100.plan import plan, setup_for
from experiments.h100.sweep import fill
from jetspec_jax import JetSpecError, TreeConfig
from jetspec_jax.files import write_text

CASES = (("qwen3-32b", 2), ("qwen3-32b", 4), ("qwen3-32b", 8), ("qwen3-30b-a3b", 1), ("qwen3-30b-a3b", 2))
BUDGET, CONTEXT = 256, 4096


def sweep_large(folder: Path) -> None:
    """Writes the table into the page h100.md of `folder`."""
    page = folder / "h100.md"
    if not page.is_file():
        raise JetSpecError(f"--sweep-large writes its table into {page}, which does not exist")
    fill(page.read_text(), "large", "")  # refuses a page without the place for it before anything is compiled
    rows = []
    for name, devices in tqdm(CASES):
        rows.append(large_row(name, devices, plan(setup_for(name, TreeConfig(budget=BUDGET), 1, CONTEXT, devices))))
    write_text(page, fill(page.read_text(), "large", "\n".join([*HEADER, *rows])))


HEADER = ("| model | GPUs | GB a GPU | launches | collectives | sent, MB | links, ms | experts, GB | floor, ms | "
          "estimate, ms | plain, ms | tokens/s | plain tokens/s |",
          "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|")


def large_row(name: str, devices: int, report: dict[str, Any]) -> str:
    """One line."""
    plain, links = report["plain"], report["collectives"]
    gigabytes = f"{report['memory']['total_bytes'] / 1e9:.1f}{'' if report['fits'] else ' (no)'}"
    experts = f"{report['expert_weight_bytes'] / 1e9:.1f}" if report["expert_weight_bytes"] else ""
    cells = (name, devices, gigabytes, report["launches"]["total"], sum(row["count"] for row in links),
             f"{sum(row['bytes'] for row in links) / 1e6:.0f}", f"{sum(row['seconds'] for row in links) * 1e3:.2f}",
             experts, *(f"{seconds * 1e3:.2f}" for seconds in (
                 report["floor_seconds"], report["estimate_seconds"], plain["estimate_seconds"])),
             f"{report['tokens_per_second']:.0f}", f"{plain['tokens_per_second']:.0f}")
    return f"| {' | '.join(map(str, cells))} |"
