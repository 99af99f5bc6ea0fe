"""Step `machine`: the card, its driver and clocks, the versions, and the two rates that floors are made of."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata

import jax
import jax.numpy as jnp

from experiments.h100_steps.bench import Bench

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "triton", "torch", "transformers", "numpy")
CALLS = 10
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,clocks.sm,clocks.mem"


def run(bench: Bench) -> None:
    """Writes machine.json."""
    bench.save("machine", {
        "device": jax.devices()[0].device_kind, "backend": jax.default_backend(), "python": sys.version.split()[0],
        "processors": os.cpu_count(), "card": _card(),
        "packages": {name: _version(name) for name in PACKAGES}, "rates": _rates(bench)})


def _rates(bench: Bench) -> dict[str, float]:
    """Of this card: a copy (bytes read plus bytes written) and a bfloat16 product of random numbers."""
    size, side = (2**20, 64) if bench.tiny else (2**30, 8192)
    x, square = bench.random(0, (size,), jnp.bfloat16), bench.random(1, (side, side), jnp.bfloat16)
    copied = _seconds(jax.jit(lambda x: x + 1), x, bench)
    multiplied = _seconds(jax.jit(lambda x: x @ x, compiler_options=bench.options), square, bench)
    return {"copy_tb_per_second": 2 * x.nbytes / copied / 1e12, "product_tflops": 2 * side**3 / multiplied / 1e12}


def _seconds(function: Callable[[jax.Array], jax.Array], x: jax.Array, bench: Bench) -> float:
    """Of one call, many in a row, so that the host is hidden; the median of some rows."""
    times = []
    for _ in range(bench.sizes.warm + bench.sizes.repeats):
        begin = time.perf_counter()
        for _ in range(CALLS):
            out = function(x)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begin) / CALLS)
    return statistics.median(times[bench.sizes.warm:])


def _card() -> dict[str, str]:
    """What nvidia-smi says of the card; empty where there is none."""
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(QUERY.split(","), map(str.strip, done.stdout.splitlines()[0].split(",")), strict=True))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
