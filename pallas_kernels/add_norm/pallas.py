"""The same for NVIDIA GPUs in Pallas, lowered through Triton. A block takes one row."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

MAX_CHUNK = 8192  # columns held in registers at a time


def add_norm(x: Array, delta: Array, scale: Array, before: Array | None = None, *, eps: float,
             interpret: bool = False) -> tuple[Array, Array]:
    """The same as `reference.add_norm`.

    Raises:
        NotImplementedError: a shape or dtype that the kernel does not take.
    """
    batch, rows, size = x.shape
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"dtype {x.dtype}")
    chunk = min(size & -size, MAX_CHUNK)  # the largest power of two that divides D
    if chunk < 16:
        raise NotImplementedError(f"width {size} is not a multiple of 16")
    whole = pl.BlockSpec(memory_space=pl.ANY)
    copied = [] if before is None else [before]
    extra = 0 if before is None else before.shape[1]
    total, normed = pl.pallas_call(
        partial(_kernel, chunk=chunk, eps=eps, extra=extra), grid=(extra + rows, batch),
        in_specs=[whole] * (3 + len(copied)), out_specs=[whole] * 2,
        out_shape=[jax.ShapeDtypeStruct((batch, n, size), x.dtype) for n in (rows, extra + rows)],
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1), interpret=interpret, name="add_norm",
    )(x, delta, scale, *copied)
    return total, normed


def _kernel(
    x_ref, delta_ref,  # [B, N, D]
    scale_ref,  # [D]
    *refs,  # rows put before [B, E, D] where there are any; total [B, N, D], normed [B, E + N, D]
    chunk: int, eps: float, extra: int,
) -> None:
    total_ref, normed_ref = refs[-2:]
    row, b = pl.program_id(0), pl.program_id(1)
    size = scale_ref.shape[0]

    def place(row, i):
        return pl.ds(b, 1), pl.ds(row, 1), pl.ds(i * chunk, chunk)

    if extra:
        @pl.when(row < extra)
        def copy():
            for i in range(size // chunk):
                normed_ref[place(row, i)] = refs[0][place(row, i)]

    @pl.when(row >= extra)
    def add():
        at = partial(place, row - extra)

        # A chunk is summed once where it is the whole row; else the second pass sums again (from the cache).
        def summed(i):
            return (x_ref[at(i)] + delta_ref[at(i)]).reshape(1, chunk)

        square = jnp.zeros((1,), jnp.float32)
        sums = [summed(0)] if size == chunk else []
        for i in range(size // chunk):
            values = sums[0] if sums else summed(i)
            total_ref[at(i)] = values.reshape(1, 1, chunk)
            wide = values.astype(jnp.float32)
            square = square + jnp.sum(wide * wide, axis=1)
        factor = lax.rsqrt(square / size + eps)[:, None]
        for i in range(size // chunk):
            values = sums[0] if sums else summed(i)
            normed = (values.astype(jnp.float32) * factor).astype(values.dtype)
            normed_ref[place(row, i)] = (normed * scale_ref[pl.ds(i * chunk, chunk)].reshape(1, chunk)).reshape(
                1, 1, chunk)
