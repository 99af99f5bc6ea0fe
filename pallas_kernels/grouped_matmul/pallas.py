"""The same for NVIDIA GPUs in Pallas, lowered through Triton: gate and up, down, and the weighted sum, a launch each.

A block takes some columns of one expert. It finds the expert's rows among the choices of all tokens by itself, so that
nothing is sorted, gathers them while it multiplies, and exits at once if there are none. Rows between the launches
keep the order of the choices: row n * A + a belongs to choice a of token n.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

MAX_TOKENS = 256  # tokens whose choices are looked through at a time
BUSY_BLOCKS = 264  # two for each multiprocessor of an H100


@dataclass(frozen=True)
class GroupedMatmulConfig:
    """How one product is cut.

    Attributes:
        rows: of an expert, taken at a time; an expert with more re-reads its weights.
        columns: of the output, a block.
        depth: of the inner dimension, a step.
        warps, stages: of Triton.
    """

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 4


def choose_config(tokens: int, choices: int, experts: int, inner: int, width: int, parts: int,
                  itemsize: int = 2) -> GroupedMatmulConfig:
    """Tiles for `parts` products [rows, inner] x [inner, width] of each expert, of `itemsize` bytes a number.

    Raises:
        NotImplementedError: a size that the kernel does not take.
    """
    depth, columns = min(inner & -inner, 128 // itemsize), min(width & -width, 256 // (parts * itemsize))
    if min(depth, columns) < 16:  # both are powers of two that divide
        raise NotImplementedError(f"expert matrices of {inner} x {width}: both must be multiples of 16")
    while columns > 32 and min(experts, tokens * choices) * (width // columns) < BUSY_BLOCKS:
        columns //= 2
    rows = 16
    while rows < 64 and rows * experts < 2 * tokens * choices:  # twice the mean, so that few experts need a second tile
        rows *= 2
    return GroupedMatmulConfig(rows, columns, depth)


def grouped_mlp(x: Array, experts: Array, weights: Array, gate_up: Array, down: Array, *,
                interpret: bool = False) -> Array:
    """The same as `reference.grouped_mlp`.

    Raises:
        NotImplementedError: a shape or dtype that the kernel does not take.
    """
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"dtype {x.dtype}")
    hidden = _grouped_matmul(x, experts, gate_up, gated=True, interpret=interpret)
    out = _grouped_matmul(hidden, experts, down, gated=False, interpret=interpret)
    # Rows of experts that are not here were never written. (As unsigned numbers, negative ids are large.)
    here = experts.astype(jnp.uint32) < gate_up.shape[0]
    scaled = out.astype(jnp.float32).reshape(*experts.shape, -1) * weights[:, :, None]
    return jnp.sum(jnp.where(here[:, :, None], scaled, 0), axis=1)


def _grouped_matmul(x: Array, experts: Array, matrices: Array, gated: bool, interpret: bool) -> Array:
    """Row n*A + a: token n (gated) or row n*A + a (not gated) of x, times the matrix of expert experts[n, a].

    Returns:
        [N*A, Z] for matrices [E, Y, Z]; gated, [N*A, Z/2]: silu of the first half's product times the second's.
    """
    (tokens, choices), (count, inner, width), parts = experts.shape, matrices.shape, 2 if gated else 1
    config = choose_config(tokens, choices, count, inner, width // parts, parts, x.dtype.itemsize)
    slots = min(count, tokens * choices)  # experts that can have rows at all
    whole = pl.BlockSpec(memory_space=pl.ANY)
    out: Array = pl.pallas_call(
        partial(_kernel, config=config, parts=parts), grid=(width // parts // config.columns, slots),
        in_specs=[whole] * 3, out_specs=whole,
        out_shape=jax.ShapeDtypeStruct((tokens * choices, width // parts), x.dtype),
        compiler_params=pltriton.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret, name="grouped_gate_up" if gated else "grouped_down")(experts, x, matrices)
    return out


def _kernel(
    experts_ref,  # int32 [N, A]
    x_ref,  # [N, Y] for two parts, [N*A, Y] for one
    matrices_ref,  # [E, Y, parts*Z]
    out_ref,  # [N*A, Z]
    *, config: GroupedMatmulConfig, parts: int,
) -> None:
    column, slot = pl.program_id(0) * config.columns, pl.program_id(1)
    (tokens, choices), (count, inner, width) = experts_ref.shape, matrices_ref.shape
    group = min(pl.next_power_of_2(tokens), MAX_TOKENS)
    groups = jnp.int32(-(-tokens // group))
    # With fewer choices than experts, slot s stands for the expert of choice s, else for expert s.
    by_choice = tokens * choices < count
    expert = experts_ref[lax.div(slot, jnp.int32(choices)), lax.rem(slot, jnp.int32(choices))] if by_choice else slot

    def chosen(i):
        """Of the i-th group of tokens: the row of each that chose the expert, [group]; N*A for the others."""
        shape = (group, pl.next_power_of_2(choices))
        token = i * group + lax.broadcasted_iota(jnp.int32, shape, 0)
        choice = lax.broadcasted_iota(jnp.int32, shape, 1)
        inside = (token < tokens) & (choice < choices)
        ids = pltriton.load(experts_ref.at[token, choice], mask=inside, other=-1)
        return jnp.min(jnp.where(inside & (ids == expert), token * choices + choice, tokens * choices), axis=1)

    def survey(i, carry):
        total, first = carry
        row = chosen(i)
        return total + jnp.sum(row < tokens * choices, dtype=jnp.int32), jnp.minimum(first, jnp.min(row))

    total, first = lax.fori_loop(jnp.int32(0), groups, survey, (jnp.int32(0), jnp.int32(tokens * choices)))
    if by_choice:  # the first choice of an expert takes all its rows
        total = jnp.where((first == slot) & (expert >= 0) & (expert < count), total, jnp.int32(0))

    def tile(t, carry):
        def find(i, state):
            rows, before = state
            row = chosen(i)
            is_chosen = (row < tokens * choices).astype(jnp.int32)
            place = before + jnp.cumsum(is_chosen, axis=0, dtype=jnp.int32) - is_chosen
            wanted = t * config.rows + lax.broadcasted_iota(jnp.int32, (config.rows, group), 0)
            hit = (place[None, :] == wanted) & (is_chosen[None, :] == 1)
            rows = jnp.minimum(rows, jnp.min(jnp.where(hit, row[None, :], tokens * choices), axis=1))
            return rows, before + jnp.sum(is_chosen, dtype=jnp.int32)

        rows, _ = lax.fori_loop(jnp.int32(0), groups, find,
                                (jnp.full((config.rows,), tokens * choices, jnp.int32), jnp.int32(0)))
        rows = rows[:, None]
        source = lax.div(rows, jnp.int32(choices)) if parts == 2 else rows

        def step(j, sums):
            at = (config.rows, config.depth)
            inward = j * config.depth + lax.broadcasted_iota(jnp.int32, at, 1)
            real = jnp.broadcast_to(rows < tokens * choices, at)
            left = pltriton.load(x_ref.at[jnp.broadcast_to(source, at), inward], mask=real, other=0.0)
            places = [pl.ds(part * (width // parts) + column, config.columns) for part in range(parts)]
            right = [matrices_ref[pl.ds(expert, 1), pl.ds(j * config.depth, config.depth), place].reshape(
                config.depth, config.columns) for place in places]
            return tuple(total + pltriton.dot(left, matrix, precision=_precision(left))
                         for total, matrix in zip(sums, right, strict=True))

        shape = (config.rows, config.columns)
        sums = lax.fori_loop(jnp.int32(0), jnp.int32(inner // config.depth), step,
                             (jnp.zeros(shape, jnp.float32),) * parts)
        value = sums[0] if parts == 1 else sums[0] * jax.nn.sigmoid(sums[0]) * sums[1]
        across = column + lax.broadcasted_iota(jnp.int32, shape, 1)
        pltriton.store(out_ref.at[jnp.broadcast_to(rows, shape), across], value.astype(out_ref.dtype),
                       mask=jnp.broadcast_to(rows < tokens * choices, shape))
        return carry

    lax.fori_loop(jnp.int32(0), lax.div(total + jnp.int32(config.rows - 1), jnp.int32(config.rows)), tile, jnp.int32(0))


def _precision(x: Array) -> lax.Precision | None:
    """float32 products stay float32 (no TF32)."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
