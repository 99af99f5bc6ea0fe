#!/usr/bin/env python3
"""The tree attention of Qwen3-8B compiled for an H100 in its two lowerings, Pallas and plain Triton, side by side.

Needs no GPU, but jax 0.10.2 with its CUDA plugin, jax-triton and triton (extra `gpu`). Registers and spills are what
`ptxas -v` says of the kernel's PTX.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["JAX_TRITON_DUMP_DIR"] = tempfile.mkdtemp(prefix="jax_triton_")  # read when jax-triton is imported
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver whose version could be checked

import jax
import jax.numpy as jnp
import triton as triton_package
from jax import Array
from jax.experimental import topologies

from jetspec_jax.config import PRESETS
from pallas_kernels.tree_attention import pallas, triton

DUMPS = Path(os.environ["JAX_TRITON_DUMP_DIR"])
H100 = Path(__file__).with_name("h100") / "h100_sxm.txtpb"
# The newest of the wheel's assemblers; it knows the H100 as well.
PTXAS = Path(triton_package.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
LOWERINGS: dict[str, Callable[..., Array]] = {"pallas": pallas.tree_attention, "triton": triton.tree_attention}
SLOTS = 4352


def main(queries: list[int], as_json: bool) -> None:
    found = [{"queries": n, "lowering": name, **examine(kernel, n)} for n in queries
             for name, kernel in LOWERINGS.items()]
    shutil.rmtree(DUMPS)
    if as_json:
        print(json.dumps(found))
        return
    print("| queries | lowering | launches | kernel | registers | bytes spilled | shared KB | wgmma | serialized |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in found:
        for kernel in row["kernels"]:
            print(f"| {row['queries']} | {row['lowering']} | {row['launches']} | {kernel['name']} "
                  f"| {kernel['registers']} | {kernel['spill_bytes']} | {kernel['shared_bytes'] / 1024:.0f} "
                  f"| {kernel['wgmma']} | {'yes' if kernel['serialized'] else 'no'} |")


def arguments(queries: int) -> list[jax.ShapeDtypeStruct]:
    """Abstract inputs of one layer at batch 1, on an H100."""
    model = PRESETS["qwen3-8b"].target
    device = topologies.get_topology_desc("", platform="cuda", target_config=H100.read_text(),
                                          topology="1x1x1").devices[0]
    new = (1, queries, model.num_kv_heads, model.head_dim)
    cache = (model.num_layers, 1, model.num_kv_heads, SLOTS, model.head_dim)
    shapes: list[tuple[tuple[int, ...], Any]] = [
        ((1, queries, model.num_heads, model.head_dim), jnp.bfloat16), (new, jnp.bfloat16), (new, jnp.bfloat16),
        ((1, queries, -(-queries // 32)), jnp.uint32), (cache, jnp.bfloat16), (cache, jnp.bfloat16), ((), jnp.int32),
        ((1,), jnp.int32)]
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.SingleDeviceSharding(device))
            for shape, dtype in shapes]


def examine(kernel: Callable[..., Array], queries: int) -> dict[str, Any]:
    """Compiles one lowering: launches, and what each of its kernels takes."""
    before = set(DUMPS.rglob("*.ptx"))
    with tempfile.TemporaryDirectory() as folder:
        jax.jit(kernel).trace(*arguments(queries)).lower(lowering_platforms=("cuda",)).compile(
            compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        launches = next(Path(folder).glob("*.thunk_sequence.txt")).read_text()
        kernels = list(by_pallas(Path(folder), launches))
    kernels += by_triton(set(DUMPS.rglob("*.ptx")) - before)
    return {"launches": len(re.findall(r"^\d+: ", launches, re.MULTILINE)), "kernels": sorted(
        kernels, key=lambda k: k["name"])}


def by_pallas(folder: Path, launches: str) -> Iterable[dict[str, Any]]:
    """XLA writes the PTX of all that it compiles, and the shared memory with the launch."""
    for ptx in (path.read_text() for path in folder.glob("*.ptx")):
        for name in re.findall(r"\.entry (tree_attention\w*)", ptx):
            shared = re.search(rf" {name} grid.*shared_memory: (\d+)", launches)
            yield assemble(name, ptx, int(shared.group(1)) if shared else 0)


def by_triton(dumped: set[Path]) -> Iterable[dict[str, Any]]:
    """jax-triton compiles while it lowers, and XLA sees a finished kernel."""
    for path in dumped:
        shared = re.search(r"shared_mem_bytes: (\d+)", path.with_suffix(".compile_info").read_text())
        yield assemble(path.stem, path.read_text(), int(shared.group(1)) if shared else 0)


def assemble(name: str, ptx: str, shared_bytes: int) -> dict[str, Any]:
    done = subprocess.run([PTXAS, "-arch=sm_90a", "-v", "-", "-o", os.devnull], input=ptx, text=True,
                          capture_output=True, check=True)
    report = done.stdout + done.stderr
    return {"name": name, "registers": max(map(int, re.findall(r"Used (\d+) registers", report))),
            "spill_bytes": sum(map(int, re.findall(r"(\d+) bytes spill", report))), "shared_bytes": shared_bytes,
            "wgmma": ptx.count("wgmma.mma_async"),
            "serialized": "wgmma.mma_async instructions are serialized" in report}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--json", dest="as_json", action="store_true", help="one JSON list instead of a table")
    main(**vars(parser.parse_args()))
