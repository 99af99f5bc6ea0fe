"""Step `rows`: are a row's bits the same whatever other rows there are? For every kernel and product of a layer.

256 rows are computed together; then some of them alone, in another order, and the bits of the same rows compared.
Products give float32; kernels give what they give, whose rounding hides most differences but not all of a million.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.h100_steps.bench import Bench
from experiments.h100_steps.loops import COMPILERS
from experiments.h100_steps.matmul import library_product, weight_shapes
from jetspec_jax import kernels
from jetspec_jax.attention import pack_bits

TREE_EDGES = 0.3  # share of earlier nodes that a node sees; itself always


@dataclass(frozen=True)
class Operation:
    """Something that turns rows into rows.

    Attributes:
        call: of the chosen rows.
        pick: chosen rows (int array) -> operands of `call`; the axis of the rows is 1 (0 for a plain product).
        axis: of the rows in the results.
        shuffled: whether rows may come in any order (nodes of a tree may not, alone: their parents go with them).
    """

    name: str
    call: Callable[..., Any]
    pick: Callable[[np.ndarray], list[Array]]
    axis: int = 1
    shuffled: bool = True


def run(bench: Bench) -> None:
    """Writes rows.json: per operation and number of rows, how many elements of the same rows differ."""
    most, rows = max(bench.sizes.rows), []
    rng = np.random.default_rng(0)
    with ThreadPoolExecutor(COMPILERS) as pool:
        for found in pool.map(partial(compare, bench=bench, orders=orders(most, bench.sizes.rows, rng)),
                              operations(most, bench)):
            rows += found
            bench.save("rows", rows)
            for row in found:
                print("  ", *(f"{key}={value}" for key, value in row.items()), flush=True)


def orders(most: int, counts: tuple[int, ...], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Which rows go together: so many of them shuffled, and all of them shuffled."""
    return {str(n): rng.permutation(most)[:n] for n in counts}


def compare(operation: Operation, *, bench: Bench, orders: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    call = jax.jit(operation.call, compiler_options=bench.options)
    most = max(len(order) for order in orders.values())
    whole = results(call, operation.pick(np.arange(most)))
    found = []
    for order in orders.values():
        chosen = order if operation.shuffled else np.arange(len(order))
        row: dict[str, Any] = {"operation": operation.name, "rows": len(order), "shuffled": operation.shuffled}
        try:
            alone = results(call, operation.pick(chosen))
            pairs = [(a, np.take(b, chosen, operation.axis)) for a, b in zip(alone, whole, strict=True)]
            row |= {"differ": sum(int((bits(a) != bits(b)).sum()) for a, b in pairs),
                    "of": sum(a.size for a, _ in pairs), "dtype": str(alone[0].dtype)}
        except Exception as error:  # the others are worth knowing
            row["error"] = f"{type(error).__name__}: {error}"[:2000]
        found.append(row)
    return found


def results(call: Callable[..., Any], operands: list[Array]) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(call(*operands))]


def bits(values: np.ndarray) -> np.ndarray:
    return values.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[values.dtype.itemsize])


def operations(most: int, bench: Bench) -> list[Operation]:
    """Every product of a layer, and every kernel that turns rows into rows."""
    return [*(product(name, inner, width, most, bench) for name, inner, width in weight_shapes(bench)),
            *row_kernels(most, bench), attention(most, bench)]


def product(name: str, inner: int, width: int, most: int, bench: Bench) -> Operation:
    x, w = bench.random(1, (most, inner)), bench.random(2, (inner, width))
    return Operation(f"product {name}", library_product, lambda rows: [x[rows], w], axis=0)


def row_kernels(most: int, bench: Bench) -> list[Operation]:
    """Those whose rows do not see each other."""
    t, backend = bench.setup.target, bench.kernels
    d, columns = t.hidden_size, (t.num_heads + 2 * t.num_kv_heads) * t.head_dim
    x, delta, scale = bench.random(1, (1, most, d)), bench.random(2, (1, most, d)), bench.random(3, (d,))
    weight, projected = bench.random(4, (d, 2 * t.intermediate_size)), bench.random(5, (1, most, columns))
    angle = bench.random(6, (1, most, t.head_dim // 2), jnp.float32)
    scales = [bench.random(7 + i, (t.head_dim,)) for i in range(2)]
    logits = bench.random(9, (1, most, t.vocab_size), jnp.float32)

    def rope(projected: Array, *rest: Array) -> Any:
        return kernels.qk_norm_rope(backend, heads=t.num_heads, kv_heads=t.num_kv_heads, queries=projected.shape[1],
                                    eps=t.rms_norm_eps)(projected, *rest)

    return [Operation("add_norm", kernels.add_norm(backend, t.rms_norm_eps),
                      lambda rows: [x[:, rows], delta[:, rows], scale]),
            Operation("gated_product", kernels.gated_product(backend), lambda rows: [x[:, rows], weight]),
            Operation("qk_norm_rope", rope, lambda rows: [projected[:, rows], *scales, jnp.cos(angle[:, rows]),
                                                          jnp.sin(angle[:, rows])]),
            Operation("top_w", kernels.top_w(backend, width=bench.setup.tree.width, skip=0),
                      lambda rows: [logits[:, rows]])]


def attention(most: int, bench: Bench) -> Operation:
    """The first nodes of a tree alone: a node's ancestors come before it."""
    t, context = bench.setup.target, bench.sizes.contexts[0]
    tree = np.tril(np.random.default_rng(1).random((most, most)) < TREE_EDGES) | np.eye(most, dtype=bool)
    q = bench.random(1, (1, most, t.num_heads, t.head_dim))
    k, v = (bench.random(2 + i, (1, most, t.num_kv_heads, t.head_dim)) for i in range(2))
    caches = [bench.random(4 + i, (1, 1, t.num_kv_heads, bench.sizes.slots, t.head_dim)) for i in range(2)]

    def pick(rows: np.ndarray) -> list[Array]:
        seen = pack_bits(jnp.asarray(tree[None][:, rows][:, :, rows]))
        return [q[:, rows], k[:, rows], v[:, rows], seen, *caches, jnp.int32(0), jnp.full((1,), context, jnp.int32)]

    return Operation("tree_attention", kernels.tree_attention(bench.kernels), pick, shuffled=False)
