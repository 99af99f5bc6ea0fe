"""What the steps found, as one page of Markdown: measured beside floor and prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.h100.predict import predicted_round
from experiments.h100_steps.ledger import Ledger, read_json

Rows = list[dict[str, Any]]


def as_markdown(out: Path) -> str:
    """Every step whose JSON is there."""
    parts = ["# Measured on a card", "", *machine(out), *steps(out)]
    for name, (title, lines) in SECTIONS.items():
        found = read(out, name)
        if found:
            parts += ["", f"## {title}", "", *lines(found)]
    return "\n".join(parts) + "\n"


def read(out: Path, name: str) -> Any:
    return read_json(out / f"{name}.json")


def machine(out: Path) -> list[str]:
    found = read(out, "machine")
    if not found:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    card = ", ".join(f"{key} {value}" for key, value in found["card"].items() if key != "name")
    return [f"**{found['card'].get('name', found['device'])}**, {card or 'no card'}; {found['processors']} processors, "
            f"Python {found['python']}, {versions}. A copy runs at {found['rates']['copy_tb_per_second']:.2f} TB/s, a "
            f"product of 8192 x 8192 bfloat16 matrices at {found['rates']['product_tflops']:.0f} TFLOP/s; floors and "
            "estimates below take 3.0 TB/s and 798 TFLOP/s, those of an H100.", ""]


def steps(out: Path) -> list[str]:
    rows = [[name, row["state"] + (" (host's loop)" if row.get("host_loop") else ""), number(row.get("seconds"), 1),
             (row.get("message") or "").strip().splitlines()[-1][:200] if row.get("message") else ""]
            for name, row in Ledger(out).rows.items()]
    return table(["step", "ended", "seconds", "message"], rows)


def table(head: list[str], rows: Iterable[list[Any]]) -> list[str]:
    """Columns of numbers stay narrow in the source; a pipe in a message would end its cell."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in cells)]


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def correct(rows: Rows) -> list[str]:
    bad = [row for row in rows if not row["passed"]]
    lines = [f"{len(rows) - len(bad)} of {len(rows)} cases passed."]
    return [*lines, *(f"- {row['name']}: {row.get('error') or row.get('outputs')}"[:600] for row in bad)]


def rounds(rows: Rows) -> list[str]:
    """With the plan's estimate, and how many tokens a round must add to be faster than plain decoding."""
    key = ("context", "batch")
    plain = {tuple(row[k] for k in key): row["ms"] for row in rows if row["budget"] == 1 and "ms" in row}
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([row["budget"], row["batch"], "", f"failed: {row['error'].splitlines()[0][:160]}",
                          *[""] * 7])
            continue
        predicted = predicted_round(row["budget"], row["context"], row["batch"]) or {}
        estimate = predicted.get("estimate_ms")
        base = plain.get(tuple(row[k] for k in key))
        lines.append([row["budget"], row["batch"], row["context"], number(row["ms"], 3), number(row["floor_ms"], 3),
                      number(estimate, 3), number(row["ms"] / row["floor_ms"]),
                      number(row["ms"] / estimate if estimate else None), number(row["ms"] / base if base else None),
                      number(row["call_ms"]), number(row["temp_bytes"] / 1e6, 0)])
    return table(["budget", "batch", "context", "round, ms", "floor, ms", "estimate, ms", "/ floor", "/ estimate",
                  "/ plain", "a call beside, ms", "temporaries, MB"], lines)


def graphs(rows: Rows) -> list[str]:
    """The same, with what lies at the top of the launch sequence."""
    tops = {row["budget"]: row["top_level"] for row in rows if "top_level" in row}
    lines = [f"Budget {budget}, top level: `{'; '.join(top)}`" for budget, top in list(tops.items())[:2]]
    return [*rounds(rows), *([""] if lines else []), *lines]


def products(rows: Rows) -> list[str]:
    parts = []
    for kind in dict.fromkeys(row["products"] for row in rows):
        parts += [f"{kind}:", "", *rounds([row for row in rows if row["products"] == kind]), ""]
    return parts[:-1]


def launches(columns: dict[str, str]) -> Callable[[Rows], list[str]]:
    """A table of single launches: `us` beside its floor where there is one."""
    def lines(rows: Rows) -> list[str]:
        return table([*columns.values(), "us", "floor, us", "ratio"],
                     [[*(row[key] for key in columns), number(row.get("us"), 1) or f"failed: {row['error'][:160]}",
                       number(row.get("floor_us"), 1),
                       number(row["us"] / row["floor_us"] if "us" in row and row.get("floor_us") else None)]
                      for row in rows])
    return lines


def peer(found: dict[str, Any]) -> list[str]:
    if "skipped" in found:
        return [found["skipped"]]
    names = {"generate": "`generate`, default cache", "graph": "static cache, one CUDA graph a token"}
    return [f"transformers {found['transformers']} on torch {found['torch']}, {found['device']}, plain decoding.", "",
            *table(["way", "context", "ms a token", "tokens/s"],
                   [[title, found[key]["context"], number(found[key].get("ms"), 3) or found[key]["error"][:160],
                     number(1e3 / found[key]["ms"] if "ms" in found[key] else None, 1)]
                    for key, title in names.items() if key in found])]


def pair(rows: Rows) -> list[str]:
    plain = {(row["dtype"], row["prompt"]): row["tokens_per_second"] for row in rows if row["method"] == "plain"}
    head = ["dtype", "prompt", "method", "tokens as plain", "tokens a round", "tokens/s", "/ plain", "prompt, ms"]
    return table(head,
                 [[row["dtype"], row["prompt"], row["method"],
                   "all" if row["identical"] else f"first {row['same']} of {row['tokens']}", number(row["accepted"]),
                   number(row["tokens_per_second"], 1),
                   number(row["tokens_per_second"] / plain[row["dtype"], row["prompt"]]), number(row["prompt_ms"], 1)]
                  for row in rows])


def profile(reports: Rows) -> list[str]:
    parts = []
    for report in reports:
        parts += [f"Budget {report['budget']}, context {report['context']}: {report['us_a_round']:.0f} us of kernels a "
                  "round.", "", *table(["us a round", "launches", "kernel"], [
                      [number(row["us_a_round"], 1), row["launches"], f"`{row['kernel'][:100]}`"]
                      for row in report["kernels"][:25]]), ""]
    return parts[:-1]


def rows_table(rows: Rows) -> list[str]:
    return table(["operation", "rows", "elements that differ", "of", "dtype"],
                 [[row["operation"], row["rows"], row.get("differ", row.get("error", "")[:160]), row.get("of", ""),
                   row.get("dtype", "")] for row in rows])


SECTIONS: dict[str, tuple[str, Callable[[Any], list[str]]]] = {
    "correct": ("Kernels against their references", correct),
    "rounds": ("Rounds", graphs),
    "peer": ("The peer on the same card", peer),
    "kernels": ("Kernels", launches({"kernel": "kernel", "budget": "budget", "operands": "operands"})),
    "pair": ("The default pair", pair),
    "batch": ("Several sequences", rounds),
    "products": ("XLA's default products beside cuBLASLt's alone", products),
    "profile": ("Profile", profile),
    "rows": ("The same bits in other company", rows_table),
    "matmul": ("Products", launches({"weight": "weight", "rows": "rows", "product": "product"})),
    "attention": ("Cuts of the attention", launches({"nodes": "nodes", "cut": "cut"})),
    "trees": ("Growing a tree", launches({"builder": "builder", "width": "width", "nodes": "nodes"})),
}
