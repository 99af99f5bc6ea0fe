"""How models and decoding are spread over several devices: one table, and what places arrays and programs by it.

A mesh has two axes. Groups along "data" decode other sequences each; the devices along "tensor" share every layer:
each holds some heads, some columns of the MLP or some experts, and some tokens of the vocabulary, and runs the same
program on its share. They sum what attention and MLP add to the residual stream (two all-reduces a layer) and the
embeddings, and compare their best tokens; no weights, caches or whole logits ever travel. Everything else is computed
alike on all of them, so all decide the same.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jetspec_jax.collectives import DATA, TENSOR, own_part
from jetspec_jax.config import TransformerConfig, is_integer
from jetspec_jax.errors import JetSpecError

# The table: logical axis -> mesh axis, and the logical axes of every array by the end of its name. The first pattern
# that fits counts. Axes that are not named, and those beyond the named ones, are whole on every device.
MESH_AXES = {"sequence": DATA, "vocabulary": TENSOR, "heads": TENSOR, "mlp": TENSOR, "experts": TENSOR,
             "taps": TENSOR}
ARRAYS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Parameters of target and head, [in, out].
    (r"params/embedding", ("vocabulary",)),
    (r"params/lm_head", (None, "vocabulary")),
    (r"qkv_proj/kernel", (None, "heads")),
    (r"qkv_proj/bias", ("heads",)),
    (r"o_proj/kernel", ("heads",)),
    (r"gate_up_proj/kernel", (None, "mlp")),
    (r"down_proj/kernel", ("mlp",)),
    (r"gate_up_proj|down_proj", ("experts",)),
    (r"fc/kernel", ("taps",)),
    (r"params/.*", ()),
    # Decoding: fields of its states, and arguments of its functions.
    (r"cache/[kv]", (None, "sequence", "heads")),
    (r"sampler/.*", ()),
    (r"eos|seed|max_rounds|min_active", ()),
    (r".*", ("sequence",)),
)


def make_mesh(tensor_parallel: int = 1, data_parallel: int = 1) -> Mesh:
    """A mesh of the first devices; those that share a layer are neighbours.

    Args:
        tensor_parallel: devices that share every layer.
        data_parallel: groups of such devices.

    Raises:
        JetSpecError: numbers that make no sense, too few devices, or a process without a device in the mesh.
    """
    for name, value in (("tensor_parallel", tensor_parallel), ("data_parallel", data_parallel)):
        if not is_integer(value) or value < 1:
            raise JetSpecError(f"{name} must be an integer of at least 1, not {value!r}")
    needed, devices = tensor_parallel * data_parallel, jax.devices()
    if needed > len(devices):
        raise JetSpecError(f"a mesh of {data_parallel} x {tensor_parallel} needs {needed} devices, and there are "
                           f"{len(devices)}: choose a smaller one")
    idle = set(range(jax.process_count())) - {device.process_index for device in devices[:needed]}
    if idle:
        raise JetSpecError(f"a mesh of {needed} of the {len(devices)} devices leaves process {min(idle)} without one: "
                           "use them all, or start fewer processes")
    return Mesh(np.asarray(devices[:needed]).reshape(data_parallel, tensor_parallel), (DATA, TENSOR))


def connect(coordinator: str | None = None, processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the processes of one run (`jax.distributed`): afterwards `jax.devices()` are those of all of them.

    To be called before anything else of JAX; every process then makes the same mesh and the same calls.

    Args:
        coordinator: HOST:PORT of the first process. None: all three from the cluster's environment (Slurm, Open MPI,
            Kubernetes).
        processes: how many there are.
        process_id: which one this is, from 0.

    Raises:
        JetSpecError: numbers that do not fit, or processes that cannot be found.
    """
    if coordinator is not None:
        if processes is None or process_id is None or not 0 <= process_id < processes:
            raise JetSpecError("a coordinator needs the number of processes and which of them this is, from 0, not "
                               f"{processes!r} and {process_id!r}")
        if not re.fullmatch(r".+:\d+", coordinator):
            raise JetSpecError(f"the coordinator must be HOST:PORT, not {coordinator!r}")
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
    except (RuntimeError, ValueError) as error:
        raise JetSpecError(f"the processes of this run cannot be joined: {str(error).splitlines()[0]}; name them with "
                           "a coordinator, the number of processes and which of them this is") from error


def shards_of(mesh: Mesh | None) -> tuple[int, int]:
    """(groups along "data", devices along "tensor"); no mesh is one device.

    Raises:
        JetSpecError: other axes than these two.
    """
    if mesh is None:
        return 1, 1
    if mesh.axis_names != (DATA, TENSOR):
        raise JetSpecError(f"the mesh has the axes {mesh.axis_names}, expected {(DATA, TENSOR)}: make it with "
                           "jetspec_jax.sharding.make_mesh")
    return mesh.shape[DATA], mesh.shape[TENSOR]


def spec_of(name: str, rank: int) -> PartitionSpec:
    """What the table says of an array.

    Args:
        name: path/in/the/tree.
        rank: number of its axes; a scalar is whole everywhere.
    """
    axes = next(axes for pattern, axes in ARRAYS if re.fullmatch(f"(.*/)?({pattern})", name))
    return PartitionSpec(*(None if axis is None else MESH_AXES[axis] for axis in axes[:rank]))


def specs(tree: Any) -> Any:
    """`spec_of` every leaf of a tree (or of named arguments in a dict)."""
    return named_map(lambda name, leaf: spec_of(name, leaf.ndim), tree)


def named_map(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """`function(path/of/the/leaf, leaf)` for every leaf of a tree."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), tree)


def put(mesh: Mesh | None, **named: Any) -> tuple:
    """Host values (arrays, or trees of them) on the devices, each where the table wants it.

    With several processes, all of them call this with the same values.
    """
    if mesh is None:
        return tuple(jax.tree.map(jnp.asarray, tree) for tree in named.values())
    placed = jax.tree.map(partial(_put, mesh), named, specs(named))
    return tuple(placed[name] for name in named)  # a mapped dict is sorted


def _put(mesh: Mesh, value: Any, spec: PartitionSpec) -> Array:
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda index: value[index])


def fetch(tree: Any) -> Any:
    """Whole arrays on the host, of every process, wherever their shares are."""
    if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return process_allgather(tree, tiled=True)


def over_mesh(mesh: Mesh, function: Callable[..., Any], static: tuple, *args: Any) -> Any:
    """`function(*static, *args)` as one program per device, each on its shares of the arrays.

    Args:
        static: what a share's program is made of: configs after `share`, sizes of one device.
    """
    names = list(inspect.signature(function).parameters)[len(static):]
    in_specs = tuple(specs(dict(zip(names, args, strict=True)))[name] for name in names)
    run = partial(jax.shard_map, partial(function, *static), mesh=mesh, in_specs=in_specs, check_vma=False)
    made = jax.eval_shape(run(out_specs=PartitionSpec()), *args)  # for the names of what comes out
    return run(out_specs=specs(made))(*args)


def stored_spec(name: str, rank: int) -> PartitionSpec:
    """How a parameter is read from its file: in pieces that `arrange` turns into shares without a whole copy."""
    if _is_fused(name):
        return PartitionSpec(TENSOR) if rank > 1 else PartitionSpec()
    return spec_of(name, rank)


def arrange(name: str, value: Array, config: TransformerConfig, mesh: Mesh) -> Array:
    """A parameter that lies as `stored_spec` says -> as the table says.

    Several matrices that lie side by side ([D, q|k|v], [D, gate|up]) must be split one by one: a share is
    [D, q_i|k_i|v_i]. Each device reads some whole rows; one all-to-all makes columns of them.
    """
    if not _is_fused(name) or mesh.shape[TENSOR] == 1:
        return value
    parts = ((config.num_heads, config.num_kv_heads, config.num_kv_heads) if "qkv_proj" in name else (1, 1))
    # One at a time: memory then holds one array twice, and not many exchanges wait for each other's devices.
    return jax.block_until_ready(_deal(value, parts, mesh))


def place(name: str, value: Any, config: TransformerConfig, mesh: Mesh | None) -> Array:
    """A parameter on the host -> on the default device, or spread over a mesh."""
    if mesh is None:
        return jax.device_put(value)
    return arrange(name, _put(mesh, value, stored_spec(name, value.ndim)), config, mesh)


def _is_fused(name: str) -> bool:
    return re.search(r"(qkv_proj|gate_up_proj)/(kernel|bias)$", name) is not None


@partial(jax.jit, static_argnums=(1, 2))
def _deal(value: Array, parts: tuple[int, ...], mesh: Mesh) -> Array:
    """Splits each part of the last axis over the devices.

    Args:
        value: [D, Z], rows spread over the devices, or [Z], whole on each.
        parts: relative widths of the matrices that make up Z.
    """
    shards, unit = mesh.shape[TENSOR], value.shape[-1] // sum(parts)
    borders = np.cumsum(parts)[:-1] * unit

    def deal(rows: Array) -> Array:
        pieces = [jnp.split(part, shards, axis=-1) for part in jnp.split(rows, borders, axis=-1)]
        by_device = jnp.concatenate([piece for device in zip(*pieces, strict=True) for piece in device], axis=-1)
        if rows.ndim == 1:
            return own_part(by_device, shards)
        return lax.all_to_all(by_device, TENSOR, split_axis=1, concat_axis=0, tiled=True)

    source, target = (PartitionSpec(TENSOR), PartitionSpec(None, TENSOR)) if value.ndim > 1 else (
        PartitionSpec(), PartitionSpec(TENSOR))
    return jax.shard_map(deal, mesh=mesh, in_specs=source, out_specs=target, check_vma=False)(value)
