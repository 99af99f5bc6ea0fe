"""Rows of booleans packed 32 to a word, lowest bit first: how tree and block masks travel."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

WORD = 32


def words(columns: int) -> int:
    """Words that hold `columns` bits."""
    return -(-columns // WORD)


def pack_bits(rows: Array) -> Array:
    """bool [..., M] -> uint32 [..., ceil(M/32)]; column m is bit m % 32 of word m // 32."""
    columns = rows.shape[-1]
    padding = [(0, 0)] * (rows.ndim - 1) + [(0, words(columns) * WORD - columns)]
    grouped = jnp.pad(rows, padding).reshape(*rows.shape[:-1], words(columns), WORD).astype(jnp.uint32)
    weight = (jnp.uint32(1) << jnp.arange(WORD, dtype=jnp.uint32)).reshape((1,) * rows.ndim + (WORD,))
    return jnp.sum(grouped * weight, axis=-1, dtype=jnp.uint32)


def unpack_bits(packed: Array, columns: int) -> Array:
    """uint32 [..., ceil(M/32)] -> bool [..., M]."""
    shift = jnp.arange(WORD, dtype=jnp.uint32).reshape((1,) * packed.ndim + (WORD,))
    bits = (packed[..., None] >> shift) & jnp.uint32(1)
    return bits.reshape(*packed.shape[:-1], -1)[..., :columns].astype(bool)
