"""A head that starts from the target's own last layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jetspec_jax.config import HeadConfig, TargetConfig
from jetspec_jax.errors import JetSpecError
from jetspec_jax.head import head_shapes, init_head


def head_from_target(target: TargetConfig, head: HeadConfig, params: dict, key: Array) -> dict:
    """A head whose layers are the target's last ones, reading the last tapped layer's output.

    `fc` passes the last tap on, with noise (standard deviation 0.02 / sqrt(T)) on all; `hidden_norm` is the input norm
    of the target layer that the first draft layer was copied from; the final norm is the target's. Query and key
    norms that the target has not are left at one.

    Raises:
        JetSpecError: the layers of target and head differ in shape, or the target's weights lie in tiles.
    """
    if target.weight_tile is not None:
        raise JetSpecError("a head cannot start from weights in tiles: load the target with tiles=False")
    for name in ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim"):
        if getattr(target, name) != getattr(head, name):
            raise JetSpecError(f"a head cannot start from the target's layers: its {name} is {getattr(head, name)}, "
                               f"the target's {getattr(target, name)}; start it at random")
    if head.num_layers > target.num_layers or (target.qkv_bias, target.out_bias) != (head.qkv_bias, head.out_bias):
        raise JetSpecError("a head with more layers than the target, or other biases, cannot start from its layers")
    first = target.num_layers - head.num_layers
    if any(target.has_experts(i) for i in range(first, target.num_layers)):
        raise JetSpecError("a head cannot start from the target's last layers: they are mixtures of experts; start it "
                           "at random")
    dtype = head.jnp_dtype
    source, made = params["params"], jax.tree.map(lambda leaf: leaf, init_head(head, key))["params"]
    for i in range(head.num_layers):
        # Where the target has no query and key norms, the head's stay at one.
        made[f"layers_{i}"] = _overlay(made[f"layers_{i}"], source[f"layers_{first + i}"])
    size, taps = head.hidden_size, len(head.target_layer_ids)
    noise = jax.random.normal(key, (taps * size, size), jnp.float32) * (0.02 / taps**0.5)
    made["fc"]["kernel"] = noise.at[(taps - 1) * size:].add(jnp.eye(size, dtype=jnp.float32)).astype(dtype)
    made["hidden_norm"]["scale"] = source[f"layers_{first}"]["input_layernorm"]["scale"]
    made["norm"]["scale"] = source["norm"]["scale"]
    return jax.tree.map(lambda new, like: jnp.array(new, like.dtype), {"params": made}, head_shapes(head))


def _overlay(base: dict, other: dict) -> dict:
    """`base` with every entry that `other` has too."""
    return {name: _overlay(value, other[name]) if isinstance(value, dict) and name in other else other.get(name, value)
            for name, value in base.items()}
