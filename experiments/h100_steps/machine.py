"""Step `machine`: the card, its driver and clocks, and the versions."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata

import jax

from experiments.h100_steps.bench import Bench

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "triton", "torch", "transformers", "numpy")
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,clocks.sm,clocks.mem"


def run(bench: Bench) -> None:
    """Writes machine.json."""
    bench.save("machine", {
        "device": jax.devices()[0].device_kind, "backend": jax.default_backend(), "python": sys.version.split()[0],
        "system": platform.platform(), "processors": os.cpu_count(), "card": _card(),
        "packages": {name: _version(name) for name in PACKAGES}})


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
