"""Step `batch`: several sequences together, plain and with trees."""

from __future__ import annotations

from typing import Any

from experiments.h100_steps.bench import Bench
from experiments.h100_steps.loops import compile_loops, measure_loops


def run(bench: Bench) -> None:
    """Writes batch.json: a row per batch and budget."""
    sizes = bench.sizes
    rows: list[dict[str, Any]] = []
    setups = [bench.setup_at(budget, sizes.batch_context, batch) for batch in sizes.batches
              for budget in sizes.batch_budgets]
    loops = compile_loops(setups, sizes.batch_slots, bench, bench.options)
    measure_loops("batch", loops, (sizes.batch_context,), bench, rows, host_loop=bench.host_loop)
