"""What the devices of a mesh tell each other inside one program (see `jetspec_jax.sharding`).

`shards` is the number of devices that share each layer; with 1, nothing is told and no mesh is needed.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

DATA = "data"  # mesh axis over which sequences are spread
TENSOR = "tensor"  # mesh axis over which every layer and the vocabulary are spread


def all_sum(x: Array, shards: int) -> Array:
    """The sum over all devices that share a layer."""
    return lax.psum(x, TENSOR) if shards > 1 else x


def all_max(x: Array, shards: int) -> Array:
    """The maximum over all devices that share a layer."""
    return lax.pmax(x, TENSOR) if shards > 1 else x


def own_start(size: int, shards: int) -> Array:
    """int32: where the part of `size` begins that this device holds of an axis."""
    return lax.axis_index(TENSOR).astype(jnp.int32) * size if shards > 1 else jnp.int32(0)


def own_part(x: Array, shards: int) -> Array:
    """This device's part of the last axis of an array that is whole on every device."""
    size = x.shape[-1] // shards
    return lax.dynamic_slice_in_dim(x, own_start(size, shards), size, axis=-1) if shards > 1 else x


def side_by_side(x: Array, shards: int) -> Array:
    """The last axes of all devices joined in their order: for a few values, never for weights or whole logits."""
    return lax.all_gather(x, TENSOR, axis=x.ndim - 1, tiled=True) if shards > 1 else x


def count_everywhere(flags: Array, data_shards: int) -> Any:
    """int32: how many of the flags [B] are set, over all devices that hold other sequences."""
    count = jnp.sum(flags, dtype=jnp.int32)
    return lax.psum(count, DATA) if data_shards > 1 else count
