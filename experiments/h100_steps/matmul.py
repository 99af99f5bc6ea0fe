"""Step `matmul`: an own product with a fixed order of sums beside the library's, for a layer's weights and the LM head.

Whether rows can have the same bits whatever runs beside them (and trees the bits of plain decoding) depends on what
products of one fixed cut cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from experiments.h100.roofline import roofline
from experiments.h100_steps.bench import Bench
from experiments.h100_steps.launches import Timing, time_all
from pallas_kernels import gated_product


@dataclass(frozen=True)
class Cut:
    """How a product [N, A] x [A, Z] is cut: rows, columns and depth of a step, blocks that share the depth."""

    rows: int
    columns: int
    depth: int
    splits: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"own, {self.rows} x {self.columns} x {self.depth}, {self.splits} splits, {self.warps} warps"


SPLITS = {"qkv": 2, "output": 4, "gate and up": 1, "down": 4, "LM head": 1}
GATED_ROWS = (1, 16, 64)  # where the kernel is compared with the library's product and XLA's gate
CUTS = {64: ((64, 64, 64, 4, 4), (64, 128, 64, 4, 4)), 256: ((256, 64, 64, 8, 3), (128, 128, 64, 8, 3))}


def run(bench: Bench) -> None:
    """Writes matmul.json: the library's product and own cuts at 64 and 256 rows, and the gated product."""
    timings = []
    for name, inner, width in weight_shapes(bench):
        for rows in (64, 256) if not bench.tiny else (8,):
            calls = {"library": partial(library_product, wide=name == "LM head")}
            for cut in cuts_of(name, rows, bench):
                calls[str(cut)] = partial(own_product, cut=cut, interpret=bench.tiny)
            timings += [timing_of(name, what, call, (rows, inner, width), bench) for what, call in calls.items()]
    time_all("matmul", timings + gated(bench), bench)


def gated(bench: Bench) -> list[Timing]:
    """The gated MLP's first half: our one launch, and the library's product with the gate after it."""
    t, timings = bench.setup.target, []
    for rows in GATED_ROWS if not bench.tiny else (8,):
        calls: dict[str, Callable[..., Array]] = {
            "gated_product": partial(gated_product.pallas.gated_product, interpret=bench.tiny),
            "library and gate": gated_product.reference.gated_product}
        for what, call in calls.items():
            size = (rows, t.hidden_size, 2 * t.intermediate_size)
            timings.append(timing_of("gate and up, gated", what, lambda x, w, call=call: call(x[None], w), size, bench))
    return timings


def weight_shapes(bench: Bench) -> list[tuple[str, int, int]]:
    """(name, A, Z) of a layer's products and the LM head."""
    t = bench.setup.target
    heads, kv = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    return [("qkv", t.hidden_size, heads + 2 * kv), ("output", heads, t.hidden_size),
            ("gate and up", t.hidden_size, 2 * t.intermediate_size), ("down", t.intermediate_size, t.hidden_size),
            ("LM head", t.hidden_size, t.vocab_size)]


def cuts_of(name: str, rows: int, bench: Bench) -> list[Cut]:
    if bench.tiny:
        return [Cut(8, 16, 16, 2, 1, 1)]
    return [Cut(r, columns, depth, SPLITS[name], warps, stages) for r, columns, depth, warps, stages in CUTS[rows]]


def timing_of(name: str, what: str, call: Any, size: tuple[int, int, int], bench: Bench) -> Timing:
    rows, inner, width = size
    dtype = bench.setup.target.jnp_dtype
    shapes = [jax.ShapeDtypeStruct((rows, inner), dtype), jax.ShapeDtypeStruct((inner, width), dtype)]
    read = dtype.itemsize * inner * (rows + width)
    row = {"weight": name, "rows": rows, "product": what,
           "floor_us": roofline(read + dtype.itemsize * rows * width, 2 * rows * inner * width) * 1e6}
    return Timing(row, call, shapes, lambda launch: [bench.random(2 * launch + i, leaf.shape, leaf.dtype)
                                                     for i, leaf in enumerate(shapes)], read)


def library_product(x: Array, w: Array, *, wide: bool = True) -> Array:
    """[N, A] x [A, Z] -> [N, Z], float32 or x's dtype, as the model asks for it."""
    return jnp.dot(x, w, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32 if wide else x.dtype)


def own_product(x: Array, w: Array, *, cut: Cut, interpret: bool) -> Array:
    """The same as partial sums float32 [splits, N, Z]; whoever reads them adds them in order."""
    rows, width = x.shape[0], w.shape[1]
    whole = pl.BlockSpec(memory_space=pl.ANY)
    out: Array = pl.pallas_call(
        partial(_kernel, cut=cut), grid=(-(-rows // cut.rows), width // cut.columns, cut.splits), in_specs=[whole] * 2,
        out_specs=whole, out_shape=jax.ShapeDtypeStruct((cut.splits, rows, width), jnp.float32),
        compiler_params=pltriton.CompilerParams(num_warps=cut.warps, num_stages=cut.stages), interpret=interpret,
        name="own_product")(x, w)
    return out


def _kernel(
    x_ref,  # [N, A]
    w_ref,  # [A, Z]
    out_ref,  # [splits, N, Z]
    *, cut: Cut,
) -> None:
    row, column, split = pl.program_id(0) * cut.rows, pl.program_id(1) * cut.columns, pl.program_id(2)
    steps = x_ref.shape[1] // (cut.depth * cut.splits)
    rows, columns = pl.ds(row, cut.rows), pl.ds(column, cut.columns)
    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None

    def step(i, total):
        at = pl.ds((split * steps + i) * cut.depth, cut.depth)
        return total + pltriton.dot(x_ref[rows, at], w_ref[at, columns], precision=precision)

    total = lax.fori_loop(jnp.int32(0), jnp.int32(steps), step, jnp.zeros((cut.rows, cut.columns), jnp.float32))
    out_ref[pl.ds(split, 1), rows, columns] = total.reshape(1, cut.rows, cut.columns)
