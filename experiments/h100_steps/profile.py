"""Step `profile`: device time by kernel of one round.

One, because the profiler counts the kernels of a graph that loops as if they ran once. Durations are those of kernels;
what a round takes beyond their sum are its gaps.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax

from experiments.h100_steps import loops
from experiments.h100_steps.bench import Bench, say

BUDGETS = 3  # of `Sizes.budgets`
SHOWN = 60


def run(bench: Bench) -> None:
    """Writes profile.json: for the first budgets, plain decoding among them, microseconds a round of every kernel."""
    sizes, reports = bench.sizes, []
    budgets, context = sizes.budgets[:BUDGETS], sizes.contexts[0]
    setups = [bench.setup_at(budget, context) for budget in budgets]
    for loop in loops.compile_loops(setups, sizes.slots, bench, bench.options):
        budget, program = loop.setup.tree.budget, loop.compiled.result()[0]
        state = loops.rewound(loops.filled_state(loop, bench), context)
        for _ in range(sizes.warm):
            state = loops.rewound(loops.run(program, bench, state, rounds=1), context)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                loops.run(program, bench, state, rounds=1)
            rows = device_rows(Path(folder))
        total = sum(row["us_a_round"] for row in rows)
        reports.append({"budget": budget, "context": context, "us_a_round": total, "kernels": rows[:SHOWN]})
        bench.save("profile", reports)
        say(f"budget {budget}: {total:.0f} us of kernels a round")
        for row in rows[:20]:
            print(f"  {row['us_a_round']:9.1f} us {row['launches']:4d} x {row['kernel'][:90]}", flush=True)


def device_rows(folder: Path) -> list[dict[str, Any]]:
    """Kernels of the streams of all GPUs, the costliest first; none off the GPU."""
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for file in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                for event in line.events if line.name.startswith("Stream") else ():
                    times[event.name] += event.duration_ns / 1e3
                    counts[event.name] += 1
    return [{"kernel": name[:160], "launches": counts[name], "us_a_round": us}
            for name, us in times.most_common()]
