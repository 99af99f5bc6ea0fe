"""Step `products`: XLA's default products, tuned among Triton's and cuBLASLt's, beside cuBLASLt's alone."""

from __future__ import annotations

from typing import Any

from experiments.h100_steps.bench import Bench
from experiments.h100_steps.loops import compile_loops, measure_loops

BUDGETS = 3  # of `Sizes.budgets`


def run(bench: Bench) -> None:
    """Writes products.json: a row per budget and kind of products, side by side in one process."""
    sizes = bench.sizes
    rows: list[dict[str, Any]] = []
    setups = [bench.setup_at(budget, sizes.contexts[0]) for budget in sizes.budgets[:BUDGETS]]
    for name, options in (("default", bench.loop_options), ("cublas", bench.options)):
        loops = compile_loops(setups, sizes.slots, bench, options)
        measure_loops("products", loops, sizes.contexts[:1], bench, rows, products=name, host_loop=bench.host_loop)
