"""Compiles a function for an H100 on a machine that has none: XLA takes a description of the GPU in place of a device.

Needs the extra `plan` (JAX's CUDA plugin of the same version as jaxlib, and ptxas); no driver and no GPU.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver whose version could be checked

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding

from jetspec_jax import JetSpecError
from jetspec_jax.collectives import DATA, TENSOR
from jetspec_jax.programs import GPU_OPTIONS
from jetspec_jax.sharding import specs

DESCRIPTION = Path(__file__).with_name("h100_sxm.txtpb")
PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
# Without a device nothing is autotuned, so XLA's own products are left to cuBLASLt, as a tuned program mostly does.
# The last option is what makes jax 0.11 write down the kernels' code.
OPTIONS = GPU_OPTIONS | {"xla_gpu_enable_triton_gemm": False, "xla_dump_hlo_as_text": True,
                         "xla_dump_emitter_re": "ptx"}


@dataclass(frozen=True)
class Program:
    """A compiled program as XLA writes it down.

    Attributes:
        hlo: the optimised module, scheduled.
        thunks: what is launched, in order, nested by loops and command buffers.
        origins: which instruction of `hlo` each thunk comes from (text form of XLA's ThunkMetadataListProto).
        ptx: by kernel name.
        argument_bytes, alias_bytes, output_bytes, temp_bytes: memory of each device; aliased outputs live in arguments.
    """

    hlo: str
    thunks: str
    origins: str
    ptx: dict[str, str]
    argument_bytes: int
    alias_bytes: int
    output_bytes: int
    temp_bytes: int


def require_plugin() -> None:
    """Raises JetSpecError, with the remedy, where JAX's CUDA plugin is not installed."""
    if find_spec("jax_plugins") is None or not any(find_spec(name) for name in PLUGINS):
        raise JetSpecError("this needs JAX's CUDA compiler (no GPU and no driver): pip install -e '.[plan]'")


def h100s(count: int) -> list[Any]:
    """So many H100s of one host, described."""
    require_plugin()
    return list(topologies.get_topology_desc("", platform="cuda", target_config=DESCRIPTION.read_text(),
                                             topology=f"1x1x{count}").devices)


def on_h100(tree: Any) -> Any:
    """Abstract arrays of one H100 in the place of a pytree's leaves."""
    placed = jax.sharding.SingleDeviceSharding(h100s(1)[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), tree)


@cache
def mesh_of_h100s(count: int) -> Mesh:
    """H100s of one host that share every layer."""
    return Mesh(np.asarray(h100s(count)).reshape(1, count), (DATA, TENSOR))


def over_h100s(mesh: Mesh, **named: Any) -> tuple[Any, ...]:
    """The same for abstract arrays, each spread over a mesh as the library's table wants it."""
    placed = jax.tree.map(lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                                                  sharding=NamedSharding(mesh, spec)),
                          named, specs(named))
    return tuple(placed[name] for name in named)  # a mapped dict is sorted


def compile_for_h100(function: Callable[..., Any], *args: Any, static: tuple[int, ...] = (),
                     donate: tuple[int, ...] = ()) -> Program:
    """Compiles `function` with the library's own options.

    Args:
        args: static values, and pytrees of abstract arrays from `on_h100` or `over_h100s`.
        static, donate: indices of static and of donated arguments.
    """
    with tempfile.TemporaryDirectory() as folder:
        with described_gpu():
            lowered = jax.jit(function, static_argnums=static, donate_argnums=donate).trace(*args).lower(
                lowering_platforms=("cuda",))
        compiled = lowered.compile(compiler_options=OPTIONS | {"xla_dump_to": folder})
        memory = compiled.memory_analysis()
        return Program(
            hlo=compiled.as_text(), thunks=_thunks(Path(folder)), origins=_one(Path(folder), "thunk_metadata"),
            ptx=_kernels(Path(folder)), argument_bytes=memory.argument_size_in_bytes,
            alias_bytes=memory.alias_size_in_bytes, output_bytes=memory.output_size_in_bytes,
            temp_bytes=memory.temp_size_in_bytes)


def described_gpu() -> AbstractContextManager[Any]:
    """For lowering: from jax 0.11 on Pallas asks for the name of the GPU."""
    try:
        from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
        device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=132)
        return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
    except (ImportError, TypeError):
        return contextlib.nullcontext()


def _thunks(folder: Path) -> str:
    """After the passes that make command buffers; there is no such file where they change nothing."""
    after = list(folder.glob("*.thunk_sequence_after_thunk_passes.txt"))
    return after[0].read_text() if after else _one(folder, "thunk_sequence")


def _one(folder: Path, what: str) -> str:
    return next(folder.glob(f"*.{what}.txt")).read_text()


def _kernels(folder: Path) -> dict[str, str]:
    found = {}
    for path in folder.glob("*.ptx"):
        text = path.read_text()
        found.update(dict.fromkeys(re.findall(r"\.entry (\w+)", text), text))
    return found
