"""The tree attention of Qwen3-8B compiled for an H100 in its two lowerings, Pallas and plain Triton, side by side.

    python experiments/attention_lowerings.py --queries 1 16 64 256

Needs no GPU, but the extra `plan`. Registers and spills are what `ptxas -v` says of the kernel's PTX.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["JAX_TRITON_DUMP_DIR"] = tempfile.mkdtemp(prefix="jax_triton_")  # read when jax-triton is imported

import jax
import jax.numpy as jnp
from jax import Array

from experiments.common import run_main
from experiments.h100.compile import described_gpu, on_h100, require_plugin
from experiments.h100.kernels import assemble
from jetspec_jax import JetSpecError
from jetspec_jax.arguments import Parser, integer
from jetspec_jax.config import KernelBackend
from jetspec_jax.kernels import tree_attention
from jetspec_jax.presets import PRESETS

DUMPS = Path(os.environ["JAX_TRITON_DUMP_DIR"])
LOWERINGS: tuple[KernelBackend, ...] = ("pallas", "triton")
SLOTS = 4352


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--queries", type=integer, nargs="+", default=[1, 64, 256], help="default %(default)s")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    args = parser.parse_args()
    if min(args.queries) < 1:
        raise JetSpecError(f"--queries must be at least 1, not {min(args.queries)}")
    require_plugin()
    kernels = {name: tree_attention(name) for name in LOWERINGS}
    found = [{"queries": n, "lowering": name, **examine(kernel, n)} for n in args.queries
             for name, kernel in kernels.items()]
    shutil.rmtree(DUMPS)
    if args.json:
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
    new = (1, queries, model.num_kv_heads, model.head_dim)
    cache = (model.num_layers, 1, model.num_kv_heads, SLOTS, model.head_dim)
    shapes: list[tuple[tuple[int, ...], Any]] = [
        ((1, queries, model.num_heads, model.head_dim), jnp.bfloat16), (new, jnp.bfloat16), (new, jnp.bfloat16),
        ((1, queries, -(-queries // 32)), jnp.uint32), (cache, jnp.bfloat16), (cache, jnp.bfloat16), ((), jnp.int32),
        ((1,), jnp.int32)]
    return list(on_h100([jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]))


def examine(kernel: Callable[..., Array], queries: int) -> dict[str, Any]:
    """Compiles one lowering: launches, and what each of its kernels takes."""
    before = set(DUMPS.rglob("*.ptx"))
    with tempfile.TemporaryDirectory() as folder:
        with described_gpu():
            lowered = jax.jit(kernel).trace(*arguments(queries)).lower(lowering_platforms=("cuda",))
        lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True,
                                          "xla_dump_emitter_re": "ptx"})
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
            yield describe(name, ptx, int(shared.group(1)) if shared else 0)


def by_triton(dumped: set[Path]) -> Iterable[dict[str, Any]]:
    """jax-triton compiles while it lowers, and XLA sees a finished kernel."""
    for path in dumped:
        shared = re.search(r"shared_mem_bytes: (\d+)", path.with_suffix(".compile_info").read_text())
        yield describe(path.stem, path.read_text(), int(shared.group(1)) if shared else 0)


def describe(name: str, ptx: str, shared_bytes: int) -> dict[str, Any]:
    found = assemble(name, ptx)
    return {"name": name, "registers": found.registers, "spill_bytes": found.spill_bytes, "shared_bytes": shared_bytes,
            "wgmma": found.wgmma, "serialized": found.wgmma_serialized}


if __name__ == "__main__":
    run_main(main)
