"""The same for NVIDIA GPUs in Pallas, lowered through Triton: one launch where XLA makes five.

A block takes one head of up to eight rows. Both halves of a head are read apart, so the rotation needs no shuffle.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

MAX_ROWS = 8


def qk_norm_rope(projected: Array, q_scale: Array | None, k_scale: Array | None, cos: Array, sin: Array, heads: int,
                 kv_heads: int, queries: int, eps: float, *, interpret: bool = False) -> tuple[Array, Array, Array]:
    """The same as `reference.qk_norm_rope`.

    Raises:
        NotImplementedError: a shape or dtype that the kernel does not take.
    """
    batch, rows, columns = projected.shape
    width = columns // (heads + 2 * kv_heads)
    if width & (width - 1) or width < 8:
        raise NotImplementedError(f"head dimension {width} is not a power of two of at least 8")
    if projected.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"dtype {projected.dtype}")
    block = MAX_ROWS
    while rows % block or (rows - queries) % block:
        block //= 2
    whole = pl.BlockSpec(memory_space=pl.ANY)
    scales = [scale for scale in (q_scale, k_scale) if scale is not None]
    if len(scales) == 1:
        raise NotImplementedError("a norm on only one of queries and keys")
    shapes = [jax.ShapeDtypeStruct((batch, n, h, width), projected.dtype)
              for n, h in ((queries, heads), (rows, kv_heads), (rows, kv_heads))]
    q, k, v = pl.pallas_call(
        partial(_kernel, heads=heads, kv_heads=kv_heads, skipped=rows - queries, block=block, eps=eps,
                norms=bool(scales)),
        grid=(rows // block, heads + 2 * kv_heads, batch), in_specs=[whole] * (3 + len(scales)), out_specs=[whole] * 3,
        out_shape=shapes, compiler_params=pltriton.CompilerParams(num_warps=1, num_stages=1), interpret=interpret,
        name="qk_norm_rope")(projected, cos, sin, *scales)
    return q, k, v


def _kernel(
    x_ref,  # [B, M, (H+2K)*C]
    cos_ref, sin_ref,  # [B, M, C/2]
    *refs,  # scales of queries and keys [C] where there are norms; q [B, N, H, C], k and v [B, M, K, C]
    heads: int, kv_heads: int, skipped: int, block: int, eps: float, norms: bool,
) -> None:
    q_ref, k_ref, v_ref = refs[-3:]
    part, head, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    half = cos_ref.shape[2]
    row = part * block
    low, high = pl.ds(0, half), pl.ds(half, half)
    rows = (pl.ds(b, 1), pl.ds(row, block))

    def read(offset):
        return x_ref[(*rows, pl.ds(head * (2 * half) + offset, half))].reshape(block, half)

    def write(ref, first_row, which, values):
        for place, value in zip((low, high), values, strict=True):
            ref[pl.ds(b, 1), pl.ds(first_row, block), pl.ds(which, 1), place] = value.astype(ref.dtype).reshape(
                1, block, 1, half)

    def normed_and_rotated(scale_ref):
        first, second = read(0), read(half)
        if norms:
            dtype = first.dtype
            first, second = first.astype(jnp.float32), second.astype(jnp.float32)
            mean = (jnp.sum(first * first, axis=1) + jnp.sum(second * second, axis=1)) / (2.0 * half)
            factor = lax.rsqrt(mean + eps)[:, None]
            # Rounded where the reference rounds.
            first = (first * factor).astype(dtype) * scale_ref[low].reshape(1, half)
            second = (second * factor).astype(dtype) * scale_ref[high].reshape(1, half)
        first, second = first.astype(jnp.float32), second.astype(jnp.float32)
        cos, sin = cos_ref[(*rows, low)].reshape(block, half), sin_ref[(*rows, low)].reshape(block, half)
        return first * cos - second * sin, second * cos + first * sin

    @pl.when(jnp.logical_and(head < heads, row >= skipped))
    def _():
        write(q_ref, row - skipped, head, normed_and_rotated(refs[0]))

    @pl.when(jnp.logical_and(head >= heads, head < heads + kv_heads))
    def _():
        write(k_ref, row, head - heads, normed_and_rotated(refs[1]))

    @pl.when(head >= heads + kv_heads)
    def _():
        write(v_ref, row, head - heads - kv_heads, (read(0), read(half)))
