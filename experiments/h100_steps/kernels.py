"""Step `kernels`: every kernel of a round, at every size that it is launched with, beside its floor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from experiments.h100.costs import kernel_cost
from experiments.h100.hlo import Shape
from experiments.h100.plan import Setup, abstract_params
from experiments.h100.roofline import roofline
from experiments.h100_steps.bench import Bench
from experiments.h100_steps.launches import SHARED_BYTES, Timing, time_all
from experiments.h100_steps.loops import decoder_of, empty_state
from jetspec_jax.decode import run_rounds

HLO_NAMES = {"bool": "pred", "bfloat16": "bf16", "float16": "f16", "float32": "f32", "int32": "s32", "uint32": "u32"}


def run(bench: Bench) -> None:
    """Writes kernels.json: a row per kernel and size, of the largest tree and of plain decoding."""
    sizes, timings = bench.sizes, []
    seen: set[str] = set()
    for budget in (max(sizes.budgets), 1):
        setup = bench.setup_at(budget, sizes.contexts[0])
        for call in distinct_calls(setup, sizes.slots):
            key = f"{kernel_name(call)} {[str(var.aval) for var in call.invars]}"
            if key not in seen:
                seen.add(key)
                timings.append(timing_of(call, setup, bench))
    time_all("kernels", timings, bench)


def timing_of(call: Any, setup: Setup, bench: Bench) -> Timing:
    name, shapes = kernel_name(call), [shape_of(var.aval) for var in call.invars]
    read, flops = kernel_cost(name, shapes, setup.context)
    size = sum(read) + sum(shape_of(var.aval).bytes for var in call.outvars)
    row = {"kernel": name, "budget": setup.tree.budget, "floor_us": roofline(size, flops) * 1e6,
           "operands": " ".join(str(s) for s in shapes if s.dims and s.size > 1)}
    shared: dict[int, Array] = {}

    def operands(launch: int) -> list[Array]:
        made = []
        for i, var in enumerate(call.invars):
            aval = var.aval
            large = shape_of(aval).bytes > SHARED_BYTES
            array = shared.get(i) if large else None
            if array is None:
                array = fill(name, i, aval, setup.context, launch, call, bench)
            if large:
                shared[i] = array
            made.append(array)
        return made

    bind = partial(call.primitive.bind, **call.params)
    return Timing(row, bind, [var.aval for var in call.invars], operands, sum(read))


def distinct_calls(setup: Setup, slots: int) -> Iterator[Any]:
    """The Pallas calls of a round, as they are traced."""
    number = jax.ShapeDtypeStruct((), jnp.int32)
    decoder = decoder_of(setup)
    state = jax.eval_shape(lambda: empty_state(decoder, setup.batch, slots))
    traced = jax.make_jaxpr(run_rounds, static_argnums=0)(decoder, abstract_params(setup), state, number, number)
    yield from kernel_calls(traced.jaxpr)


def kernel_calls(jaxpr: Any) -> Iterator[Any]:
    """All Pallas calls of a traced program, also those inside loops, branches and nested functions."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
            continue
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from kernel_calls(inner)


def kernel_name(call: Any) -> str:
    return str(call.params["name"])


def shape_of(aval: Any) -> Shape:
    return Shape(HLO_NAMES[str(aval.dtype)], aval.shape)


def fill(name: str, index: int, aval: Any, context: int, launch: int, call: Any, bench: Bench) -> Array:
    """An operand: normal numbers; whole numbers are 0, but attention's first two are its layer and committed slots."""
    if jnp.issubdtype(aval.dtype, jnp.floating):
        return bench.random(launch * len(call.invars) + index, aval.shape, aval.dtype)
    if name == "tree_attention" and index < 2:
        layers = call.invars[-1].aval.shape[0]
        return jnp.full(aval.shape, launch % layers if index == 0 else context, aval.dtype)
    return jnp.zeros(aval.shape, aval.dtype)
