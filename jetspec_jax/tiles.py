"""Weights in column tiles: how a CPU of few cores multiplies a few rows by a large matrix at the speed of its memory.

XLA's product on the CPU copies a [A, Z] matrix piece by piece into an order of its own before it multiplies, whatever
the number of rows, which for the few rows of a draft tree costs more than the arithmetic. A matrix that is stored as
[Z/tile, A, tile] is already read in order and tile by tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jetspec_jax.config import TargetConfig, TransformerConfig
from jetspec_jax.errors import JetSpecError
from jetspec_jax.host import empty

TILE = 64  # columns
MOST_ROWS = 32  # beyond them the copies of x that `tiled_product` makes cost more than they save
LEAST_BYTES = 2**24  # smaller models stay in the processor's cache

Config = TypeVar("Config", bound=TransformerConfig)


def can_lie_in_tiles(config: TransformerConfig, params: dict) -> bool:
    """Whether tiles fit these weights: float32, and of sizes that a tile divides (or in tiles already)."""
    return (config.dtype == "float32" and config.product_dtype is None
            and (config.weight_tile is not None or all(size % TILE == 0 for size in _column_counts(config, params))))


def is_large(params: dict) -> bool:
    """Whether a CPU reads these weights from memory again for every token."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params)) >= LEAST_BYTES


def to_tiles(config: Config, params: Any, tile: int = TILE, consume: bool = False) -> tuple[Config, Any]:
    """The same model with its matrices in tiles.

    Args:
        config: with plain matrices.
        params: `{"params": ...}`, or parts of it.
        tile: columns of a tile.
        consume: delete each matrix when its successor is made, so that there is no second model (and the caller's is
            gone).

    Returns:
        (config, params); of a model that lies in tiles already, as they are.

    Raises:
        JetSpecError: a matrix whose columns are no whole number of tiles.
    """
    if config.weight_tile is not None:
        return config, params
    for size in _column_counts(config, params):
        tile_count(size, tile)
    return replace(config, weight_tile=tile), _convert(config, params, partial(_into_tiles, tile=tile), consume)


def from_tiles(config: Config, params: Any, consume: bool = False) -> tuple[Config, Any]:
    """The same model with plain matrices: what `to_tiles` was given. A model without tiles is returned as it is."""
    if config.weight_tile is None:
        return config, params
    return replace(config, weight_tile=None), _convert(config, params, _out_of_tiles, consume)


def in_layout(config: Config, params: Any, tile: int | None, consume: bool = False) -> tuple[Config, Any]:
    """The same model with its matrices in tiles of so many columns, or plain (None); see `to_tiles`."""
    if tile is None:
        return from_tiles(config, params, consume)
    return to_tiles(config, params, tile, consume)


def _convert(config: TransformerConfig, params: Any, convert: Callable[[Array, int], Array], consume: bool) -> Any:
    """All matrices that can lie in tiles, converted one after the other: (matrix, its axis of columns) -> matrix."""

    def one(path: tuple[Any, ...], w: Array) -> Array:
        axis = _column_axis(config, path)
        if axis is None:
            return w
        converted = convert(w, axis)
        if consume and isinstance(w, Array):
            converted.block_until_ready()
            w.delete()
        return converted

    return jax.tree_util.tree_map_with_path(one, params)


def tile_count(width: int, tile: int) -> int:
    """How many tiles hold the columns of a matrix.

    Raises:
        JetSpecError: no whole number.
    """
    if width % tile:
        raise JetSpecError(f"a matrix of {width} columns cannot lie in tiles of {tile}: load it with tiles=False")
    return width // tile


def tiled_product(x: Array, w: Array, dtype: Any = None) -> Array:
    """x [..., A] times a matrix [A, Z] in tiles.

    Args:
        w: [Z/tile, A, tile].
        dtype: of the result; None is x's.

    Returns:
        [..., Z].
    """
    tiles, width, _ = w.shape
    rows = x.reshape(-1, width)
    if rows.shape[0] <= MOST_ROWS:
        # One small product per tile. Their common x has to be there once for each of them.
        copies = jnp.broadcast_to(rows, (tiles, *rows.shape))
        out = lax.dot_general(copies, w, (((2,), (1,)), ((0,), (0,))), precision=lax.Precision.HIGHEST,
                              preferred_element_type=dtype)
    else:
        out = lax.map(lambda tile: jnp.matmul(rows, tile, precision=lax.Precision.HIGHEST,
                                              preferred_element_type=dtype), w)
    return out.transpose(1, 0, 2).reshape(*x.shape[:-1], -1)


def columns(w: Array, at: Array) -> Array:
    """The columns `at` int32 [...] of a matrix [A, Z] in tiles, [..., A]."""
    tile = w.shape[2]
    return w[at // tile, :, at % tile]


def _column_counts(config: TransformerConfig, params: dict) -> list[int]:
    """The columns of every matrix that can lie in tiles."""
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    return [leaf.shape[axis] for path, leaf in found if (axis := _column_axis(config, path)) is not None]


def _column_axis(config: TransformerConfig, path: tuple[Any, ...]) -> int | None:
    """Which axis of a parameter is cut into tiles: of projections and of the LM head, be it the embedding table.

    The experts of a mixture stay as they are.
    """
    tied = isinstance(config, TargetConfig) and config.tie_embeddings
    return {"kernel": 1, "lm_head": 1, "embedding": 0 if tied else None}.get(path[-1].key)


def _into_tiles(w: Array, axis: int, tile: int) -> Array:
    """[A, Z], or [Z, A] where the columns lie on axis 0, -> [Z/tile, A, tile].

    On the host: a program for each shape would take longer to compile than to run.
    """
    plain = np.asarray(w).T if axis == 0 else np.asarray(w)
    tiles = empty((plain.shape[1] // tile, plain.shape[0], tile), plain.dtype)
    tiles[...] = plain.reshape(plain.shape[0], -1, tile).transpose(1, 0, 2)
    return jax.device_put(tiles, w.sharding)


def _out_of_tiles(tiles: Array, axis: int) -> Array:
    """The inverse of `_into_tiles`."""
    count, width, tile = tiles.shape
    whole = empty((count * tile, width) if axis == 0 else (width, count * tile), tiles.dtype)
    plain = whole.T if axis == 0 else whole
    plain.reshape(width, count, tile)[...] = np.asarray(tiles).transpose(1, 0, 2)
    return jax.device_put(whole, tiles.sharding)
