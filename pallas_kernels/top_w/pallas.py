"""The same for NVIDIA GPUs in Pallas, lowered through Triton: the logits are read once.

The first launch finds the W best and the sum of exponentials of every piece of a row, the second merges the pieces.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

PIECE = 4096  # logits per block
LARGEST = float(jnp.finfo(jnp.float32).max)


def top_w(logits: Array, width: int, skip: int = 0, *, interpret: bool = False) -> tuple[Array, Array]:
    """The same as `reference.top_w`; what is NaN or infinite counts as the nearest finite number, NaN as the lowest.

    Raises:
        NotImplementedError: a shape or dtype that the kernel does not take.
    """
    batch, rows, size = logits.shape
    if logits.dtype != jnp.float32:
        raise NotImplementedError(f"dtype {logits.dtype}")
    if width > 16:
        raise NotImplementedError(f"width {width}")
    rows -= skip
    piece = min(PIECE, max(16, pl.next_power_of_2(size)))
    pieces = -(-size // piece)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    found = (batch, rows, pieces, width)
    parts = pl.pallas_call(
        partial(_piece, piece=piece, skip=skip), grid=(pieces, rows, batch), in_specs=[whole], out_specs=[whole] * 4,
        out_shape=[jax.ShapeDtypeStruct(found, jnp.float32), jax.ShapeDtypeStruct(found, jnp.int32),
                   *[jax.ShapeDtypeStruct(found[:3], jnp.float32)] * 2],
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1), interpret=interpret, name="top_w_piece",
    )(logits)
    tokens, logp = pl.pallas_call(
        _merge, grid=(rows, batch), in_specs=[whole] * 4, out_specs=[whole] * 2,
        out_shape=[jax.ShapeDtypeStruct((batch, rows, width), dtype) for dtype in (jnp.int32, jnp.float32)],
        compiler_params=pltriton.CompilerParams(num_warps=2, num_stages=1), interpret=interpret, name="top_w_merge",
    )(*(part.reshape(batch, rows, -1) for part in parts))
    return tokens, logp


def _best(values: Array, tokens: Array, width: int):
    """The W largest values with their tokens, one by one; the lower token first among equals."""
    for _ in range(width):
        top = jnp.max(values)
        token = jnp.min(jnp.where(values == top, tokens, jnp.int32(2**31 - 1)))
        yield top, token
        values = jnp.where((values == top) & (tokens == token), -jnp.inf, values)


def _piece(
    logits_ref,  # float32 [B, N, V]
    value_ref, token_ref,  # float32, int32 [B, N - skip, pieces, W]
    peak_ref, sum_ref,  # float32 [B, N - skip, pieces]
    *, piece: int, skip: int,
) -> None:
    i, row, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    tokens = i * piece + lax.broadcasted_iota(jnp.int32, (piece,), 0)
    at = (pl.ds(b, 1), pl.ds(row + skip, 1), pl.ds(i * piece, piece))
    values = pltriton.load(logits_ref.at[at], mask=(tokens < logits_ref.shape[2]).reshape(1, 1, piece),
                           other=-jnp.inf).reshape(piece)
    # Different tokens come out whatever went in: -inf is kept for what was taken, and a NaN equals nothing.
    values = jnp.where(tokens < logits_ref.shape[2], jnp.where(values > -LARGEST, values, -LARGEST), -jnp.inf)
    values = jnp.where(values < LARGEST, values, LARGEST)
    for w, (top, token) in enumerate(_best(values, tokens, value_ref.shape[3])):
        value_ref[b, row, i, w], token_ref[b, row, i, w] = top, token
        if w == 0:
            peak_ref[b, row, i], sum_ref[b, row, i] = top, jnp.sum(jnp.exp(values - top))


def _merge(
    value_ref, token_ref,  # float32, int32 [B, N, pieces * W]
    peak_ref, sum_ref,  # float32 [B, N, pieces]
    best_ref, logp_ref,  # int32, float32 [B, N, W]
) -> None:
    row, b = pl.program_id(0), pl.program_id(1)

    def read(ref, other):
        size = ref.shape[2]
        lanes = pl.next_power_of_2(size)
        real = (lax.broadcasted_iota(jnp.int32, (lanes,), 0) < size).reshape(1, 1, lanes)
        at = (pl.ds(b, 1), pl.ds(row, 1), pl.ds(jnp.int32(0), lanes))
        return pltriton.load(ref.at[at], mask=real, other=other).reshape(lanes)

    peaks = read(peak_ref, -jnp.inf)
    peak = jnp.max(peaks)
    total = peak + jnp.log(jnp.sum(read(sum_ref, 0.0) * jnp.exp(peaks - peak)))
    for w, (top, token) in enumerate(_best(read(value_ref, -jnp.inf), read(token_ref, 0), best_ref.shape[2])):
        best_ref[b, row, w], logp_ref[b, row, w] = token, top - total
