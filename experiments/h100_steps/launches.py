"""Times single launches: a loop on the device over many sets of operands, timed by the difference of two lengths."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from experiments.h100_steps.bench import Bench
from experiments.h100_steps.loops import COMPILERS
from jetspec_jax.errors import first_line

# Every launch of a turn has operands of its own, so that it cannot find them in the L2 cache (50 MB). What is larger
# than this is the same for all of them: caches, of which every launch reads another layer.
SHARED_BYTES = 256e6
TURN_BYTES = 200e6  # what the launches of a turn touch together, at least: several times the L2 cache
MAX_LAUNCHES = 24


@dataclass(frozen=True)
class Timing:
    """One thing to time.

    Attributes:
        row: what the table says of it.
        call: of arrays.
        shapes: of its operands.
        operands: makes those of the i-th launch of a turn, the large ones shared.
        bytes: that a launch reads.
    """

    row: dict[str, Any]
    call: Callable[..., Any]
    shapes: Sequence[Any]
    operands: Callable[[int], list[Array]]
    bytes: float

    @property
    def launches(self) -> int:
        """In a turn: enough that their operands leave the L2 cache before they come again."""
        return max(2, min(MAX_LAUNCHES, int(TURN_BYTES // self.bytes) + 1))


def time_all(name: str, timings: list[Timing], bench: Bench) -> list[dict[str, Any]]:
    """Compiles side by side, then times one after another; a row each (`us`, or `error`), saved at once."""
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(COMPILERS) as pool:
        compiled = [pool.submit(_compile, timing, bench) for timing in timings]
    for timing, program in zip(timings, compiled, strict=True):
        row = dict(timing.row)
        try:
            row["us"] = _time(program.result(), timing, bench)
        except Exception as error:  # the others are worth knowing
            row["error"] = f"{type(error).__name__}: {error}"[:2000]
        rows.append(row)
        bench.save(name, rows)
        what = f"{row['us']:9.1f} us" if "us" in row else first_line(RuntimeError(row["error"]))
        print("  ", what, *(f"{key}={value}" for key, value in timing.row.items()), flush=True)
    return rows


def _compile(timing: Timing, bench: Bench) -> Any:
    def turn(_: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        # The barrier keeps the launches inside the loop and apart from each other.
        barred: tuple[Any, Any] = lax.optimization_barrier(
            (carry[0], [timing.call(*operands) for operands in carry[0]]))
        return barred

    def many(operands: list[list[Array]], turns: Array) -> Any:
        empty = [jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(timing.call, *each))
                 for each in operands]
        return lax.fori_loop(jnp.int32(0), turns, turn, (operands, empty))[1]

    operands = [list(timing.shapes)] * timing.launches
    return jax.jit(many).lower(operands, jax.ShapeDtypeStruct((), jnp.int32)).compile(bench.options)


def _time(program: Any, timing: Timing, bench: Bench) -> float:
    """Microseconds of one launch."""
    operands = [timing.operands(i) for i in range(timing.launches)]
    few, many = bench.sizes.turns
    times: dict[int, list[float]] = {few: [], many: []}
    for i in range(bench.sizes.warm + bench.sizes.repeats):
        for turns in (few, many):
            begin = time.perf_counter()
            jax.block_until_ready(program(operands, jnp.int32(turns)))
            if i >= bench.sizes.warm:
                times[turns].append(time.perf_counter() - begin)
    low, high = (statistics.median(times[turns]) for turns in (few, many))
    return (high - low) / (many - few) / len(operands) * 1e6
