"""The same for NVIDIA GPUs in Pallas, lowered through Triton: one launch where XLA makes five.

A block takes 16 rows.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

ROWS = 16
MAX_DEPTH = 256  # bytes of the inner dimension, a step
MAX_EXPERTS = 256  # whose logits a block holds in registers
LOWEST = float(jnp.finfo(jnp.float32).min)


def router(x: Array, matrix: Array, choices: int, normalised: bool, *, interpret: bool = False) -> tuple[Array, Array]:
    """The same as `reference.router`.

    Raises:
        NotImplementedError: a shape or dtype that the kernel does not take.
    """
    (rows, inner), count = x.shape, matrix.shape[1]
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"dtype {x.dtype}")
    if inner % 16:
        raise NotImplementedError(f"width {inner} is not a multiple of 16")
    if count > MAX_EXPERTS:
        raise NotImplementedError(f"{count} experts")
    whole = pl.BlockSpec(memory_space=pl.ANY)
    experts, weights = pl.pallas_call(
        partial(_kernel, choices=choices, normalised=normalised), grid=(pl.cdiv(rows, ROWS),), in_specs=[whole] * 2,
        out_specs=[whole] * 2, out_shape=[jax.ShapeDtypeStruct((rows, choices), jnp.int32),
                                          jax.ShapeDtypeStruct((rows, choices), jnp.float32)],
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=4), interpret=interpret,
        name="router")(x, matrix)
    return experts, weights


def _kernel(
    x_ref,  # [N, D]
    matrix_ref,  # [D, E]
    experts_ref, weights_ref,  # int32 and float32 [N, A]
    *, choices: int, normalised: bool,
) -> None:
    (rows, inner), count = x_ref.shape, matrix_ref.shape[1]
    depth, columns = min(inner & -inner, MAX_DEPTH // x_ref.dtype.itemsize), max(16, pl.next_power_of_2(count))
    first_row = pl.program_id(0) * ROWS
    exact = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None  # no TF32

    def load(ref, first, size, limit, second, width, end):
        """ref[first:first+size, second:second+width], zero beyond `limit` and `end`."""
        at = [start + lax.broadcasted_iota(jnp.int32, (size, width), axis) for axis, start in ((0, first), (1, second))]
        return pltriton.load(ref.at[at[0], at[1]], mask=(at[0] < limit) & (at[1] < end), other=0.0)

    def step(j, logits):
        left = load(x_ref, first_row, ROWS, rows, j * depth, depth, inner)
        right = load(matrix_ref, j * depth, depth, inner, 0, columns, count)
        return logits + pltriton.dot(left, right, precision=exact)

    logits = lax.fori_loop(jnp.int32(0), jnp.int32(inner // depth), step, jnp.zeros((ROWS, columns), jnp.float32))
    expert = lax.broadcasted_iota(jnp.int32, (ROWS, columns), 1)
    nan = jnp.max(jnp.where(logits == logits, 0.0, 1.0), axis=1)[:, None] > 0
    # Different experts come out whatever went in: -inf is kept for what is not there or was taken.
    logits = jnp.where(expert < count, jnp.where(logits > LOWEST, logits, LOWEST), -jnp.inf)
    peak = jnp.max(logits, axis=1)[:, None]
    mass = jnp.sum(jnp.exp(logits - peak), axis=1)

    shape = (ROWS, pl.next_power_of_2(choices))
    place = lax.broadcasted_iota(jnp.int32, shape, 1)
    chosen, likely = jnp.zeros(shape, jnp.int32), jnp.full(shape, -jnp.inf, jnp.float32)
    for choice in range(choices):
        best = jnp.max(logits, axis=1)[:, None]
        first = jnp.min(jnp.where(logits == best, expert, columns), axis=1)[:, None]
        chosen, likely = jnp.where(place == choice, first, chosen), jnp.where(place == choice, best, likely)
        logits = jnp.where(expert == first, -jnp.inf, logits)
    share = jnp.exp(likely - peak)
    weights = jnp.where(nan, jnp.nan, share / (jnp.sum(share, axis=1) if normalised else mass)[:, None])
    row = first_row + lax.broadcasted_iota(jnp.int32, shape, 0)
    real = (row < rows) & (place < choices)
    pltriton.store(experts_ref.at[row, place], chosen, mask=real)
    pltriton.store(weights_ref.at[row, place], weights, mask=real)
