"""Times rounds and the kernels that they launch, on the device that JAX sees."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from experiments.h100.costs import kernel_cost
from experiments.h100.hlo import Shape
from experiments.h100.plan import Setup, abstract_params, abstract_state
from experiments.h100.roofline import floor, head_operations, roofline, target_operations
from experiments.phases import ROUNDS, ready_state
from jetspec_jax import Pair, SamplingParams
from jetspec_jax.checkpoint import first_line
from jetspec_jax.decode import Decoder, run_rounds
from jetspec_jax.draft import NoDrafter
from jetspec_jax.programs import compiler_options

SHARED_BYTES = 64e6  # operands beyond are the same for all launches of a kernel: caches and large weights
HLO_NAMES = {"bool": "pred", "bfloat16": "bf16", "float16": "f16", "float32": "f32", "int32": "s32", "uint32": "u32"}


def measure_rounds(pair: Pair, setups: list[Setup], repeats: int) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Plain decoding, and a row per budget; seconds of one round, the least of `repeats`."""
    setup = setups[0]
    verify = target_operations(setup.target, 1, setup.context, 1)
    plain = {"seconds": time_rounds(pair, Decoder(setup.target, NoDrafter()), setup.context, repeats),
             "floor_seconds": floor(verify)}
    rows = []
    for setup in setups:
        nodes = setup.decoder.drafter.nodes
        operations = (target_operations(setup.target, nodes, setup.context, 1)
                      + head_operations(setup.target, setup.head, setup.context, 1))
        rows.append({"budget": nodes, "seconds": time_rounds(pair, setup.decoder, setup.context, repeats),
                     "floor_seconds": floor(operations)})
    return plain, rows


def time_rounds(pair: Pair, decoder: Decoder, context: int, repeats: int) -> float:
    """Seconds of a round, in a loop of `ROUNDS` on the device."""
    # Donated buffers may not be shared, as constants of one program may be.
    state = jax.tree.map(jnp.copy, ready_state(pair, decoder, SamplingParams(), context))
    start = jax.device_get((state.length, state.rounds))
    program = jax.jit(run_rounds, static_argnums=0, donate_argnums=2, compiler_options=compiler_options())
    best = float("inf")
    for i in range(repeats + 1):
        # The same rounds every time: the counters go back, so that the context does not grow.
        state = replace(state, length=jnp.asarray(start[0]), rounds=jnp.asarray(start[1]))
        jax.block_until_ready(state)
        begin = time.perf_counter()
        state = jax.block_until_ready(program(decoder, pair.params, state, jnp.int32(ROUNDS), jnp.int32(1)))
        if i:  # the first run compiles
            best = min(best, (time.perf_counter() - begin) / ROUNDS)
    return best


def measure_kernels(setup: Setup, turns: int, launches: int, repeats: int) -> list[dict[str, Any]]:
    """Every kernel that a round launches, at every size that it launches it with, `turns` times `launches` times."""
    number = jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.make_jaxpr(run_rounds, static_argnums=0)(
        setup.decoder, abstract_params(setup), abstract_state(setup, setup.decoder, SamplingParams()), number, number)
    calls: dict[str, Any] = {}
    for call in kernel_calls(traced.jaxpr):
        calls.setdefault(f"{kernel_name(call)} {[str(var.aval) for var in call.invars]}", call)
    rows = []
    for call in calls.values():
        name, shapes = kernel_name(call), [shape_of(var.aval) for var in call.invars]
        read, flops = kernel_cost(name, shapes, setup.context)
        size = sum(read) + sum(shape_of(var.aval).bytes for var in call.outvars)
        shared = [fill(name, i, var.aval, setup.context) for i, var in enumerate(call.invars)]
        operands = [[array if array.nbytes > SHARED_BYTES else jnp.copy(array) for array in shared]
                    for _ in range(launches)]
        row: dict[str, Any] = {"name": name, "operands": " ".join(str(s) for s in shapes if s.dims and s.size > 1)}
        try:
            row |= {"seconds": time_kernel(call, operands, turns, repeats), "floor_seconds": roofline(size, flops)}
        except jax.errors.JaxRuntimeError as error:  # the other kernels are worth knowing
            row["error"] = first_line(error)
        rows.append(row)
    return rows


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


def fill(name: str, index: int, aval: Any, context: int) -> Array:
    """An operand: normal numbers; whole numbers are 0, but attention's second operand counts committed slots."""
    if jnp.issubdtype(aval.dtype, jnp.floating):
        return jax.random.normal(jax.random.key(index), aval.shape, aval.dtype)
    return jnp.full(aval.shape, context if name == "tree_attention" and index == 1 else 0, aval.dtype)


def time_kernel(call: Any, operands: list[list[Array]], turns: int, repeats: int) -> float:
    """Seconds of one launch.

    Args:
        operands: for every launch of a turn its own, or XLA would make equal launches one.
        turns: of a loop on the device; the barrier keeps its launches inside.
    """

    def launch_all(operands: list[list[Array]]) -> list[list[Array]]:
        return [call.primitive.bind(*each, **call.params) for each in operands]

    def turn(_: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        barred: tuple[Any, Any] = lax.optimization_barrier((carry[0], launch_all(carry[0])))
        return barred

    def many(operands: list[list[Array]]) -> Any:
        return lax.fori_loop(jnp.int32(0), jnp.int32(turns), turn, (operands, launch_all(operands)))[1]

    program = jax.jit(many, compiler_options=compiler_options())
    best = float("inf")
    for i in range(repeats + 1):
        begin = time.perf_counter()
        jax.block_until_ready(program(operands))
        if i:  # the first run compiles
            best = min(best, (time.perf_counter() - begin) / ((turns + 1) * len(operands)))
    return best
