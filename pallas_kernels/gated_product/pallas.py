"""The same for NVIDIA GPUs in Pallas, lowered through Triton.

A block holds all rows and some columns of F, both of gate and of up, so that every weight is read once and neither
product is ever written. For F = 12288 blocks of 96 columns make one wave over the 132 multiprocessors of an H100; as
blocks of products are powers of two, they are made of pieces of 64 and 32.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.gated_product import reference

PROCESSORS = 132
MAX_ROWS = 64  # beyond, XLA's product and gate are faster (docs/h100_measured.md)
DEPTH = 128  # bytes of a row of x in one step over D


def choose_pieces(features: int) -> tuple[int, ...]:
    """Columns of F per block, as powers of two: the fewest that are done in one wave, or else in the fewest waves."""
    best: tuple[int, tuple[int, ...]] | None = None
    for pieces in ((16,), (32,), (64,), (64, 32)):
        if features % sum(pieces) == 0:
            waves = -(-features // sum(pieces) // PROCESSORS)
            if best is None or waves * sum(pieces) <= best[0]:
                best = waves * sum(pieces), pieces
    if best is None:
        raise NotImplementedError(f"an MLP width of {features}, which is not a multiple of 16")
    return best[1]


def gated_product(x: Array, weight: Array, *, interpret: bool = False) -> Array:
    """The same as `reference.gated_product`.

    Raises:
        NotImplementedError: a shape or dtype that the kernel does not take.
    """
    batch, queries, size = x.shape
    rows, features = batch * queries, weight.shape[1] // 2
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"dtype {x.dtype}")
    if rows > MAX_ROWS:
        return reference.gated_product(x, weight)
    depth = min(DEPTH // x.dtype.itemsize, size & -size)  # the largest power of two that divides D
    if depth < 16:
        raise NotImplementedError(f"width {size}, which is not a multiple of 16")
    pieces = choose_pieces(features)
    block = max(16, pl.next_power_of_2(rows))
    # Full float32 products have no tensor core: more threads share the numbers, or registers run out.
    warps, stages = (8, 3) if x.dtype == jnp.float32 else (4, 4)
    whole = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        partial(_kernel, block=block, depth=depth, pieces=pieces), grid=(features // sum(pieces),),
        in_specs=[whole] * 2, out_specs=whole, out_shape=jax.ShapeDtypeStruct((rows, features), x.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret, name="gated_product")(x.reshape(rows, size), weight)
    return out.reshape(batch, queries, features)


def _kernel(
    x_ref,  # [B*N, D]
    weight_ref,  # [D, 2F]
    out_ref,  # [B*N, F]
    *, block: int, depth: int, pieces: tuple[int, ...],
) -> None:
    rows, size = x_ref.shape
    features = out_ref.shape[1]
    zero = jnp.int32(0)
    starts = [pl.program_id(0) * sum(pieces) + sum(pieces[:i]) for i in range(len(pieces))]
    real = lax.broadcasted_iota(jnp.int32, (block, 1), 0) < rows
    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None

    def step(i, sums):
        at = pl.ds(i * depth, depth)
        here = x_ref.at[pl.ds(zero, block), at]
        x = here[...] if rows == block else pltriton.load(here, mask=jnp.broadcast_to(real, (block, depth)), other=0.0)
        added = []
        for start, width in zip(starts, pieces, strict=True):
            for offset in (0, features):
                added.append(pltriton.dot(x, weight_ref[at, pl.ds(start + offset, width)], precision=precision))
        return tuple(total + more for total, more in zip(sums, added, strict=True))

    empty = tuple(jnp.zeros((block, width), jnp.float32) for width in pieces for _ in range(2))
    sums = lax.fori_loop(zero, jnp.int32(size // depth), step, empty)
    for i, (start, width) in enumerate(zip(starts, pieces, strict=True)):
        # Rounded where the reference rounds.
        gate, up = (total.astype(x_ref.dtype).astype(jnp.float32) for total in sums[2 * i:2 * i + 2])
        value = (gate / (1.0 + jnp.exp(-gate))).astype(x_ref.dtype).astype(jnp.float32) * up
        pltriton.store(out_ref.at[pl.ds(zero, block), pl.ds(start, width)], value.astype(out_ref.dtype),
                       mask=jnp.broadcast_to(real, (block, width)))
