"""Step `rounds`: a round of every budget and context beside plain decoding of the same code."""

from __future__ import annotations

from typing import Any

from experiments.h100_steps.bench import Bench
from experiments.h100_steps.loops import compile_loops, measure_loops


def run(bench: Bench) -> None:
    """Writes rounds.json: a row per program and context."""
    sizes = bench.sizes
    rows: list[dict[str, Any]] = []
    setups = [bench.setup_at(budget, sizes.contexts[0]) for budget in sizes.budgets]
    # The two that matter most are measured before the others are compiled.
    for some in (setups[:2], setups[2:]):
        loops = compile_loops(some, sizes.slots, bench, bench.options)
        measure_loops("rounds", loops, sizes.contexts, bench, rows, host_loop=bench.host_loop)
