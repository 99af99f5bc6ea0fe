"""Step `correct`: every kernel at the sizes of real models against its reference, on fresh random numbers.

Floats are compared as a whole, by relative L2 distance from the reference on float32 copies, and loosely one by one:
one wrong number in a million is not in the distance. A kernel runs twice, each time into memory full of poison.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.h100_steps.bench import Bench
from jetspec_jax import PRESETS, kernels
from jetspec_jax.attention import causal_bits, pack_bits
from jetspec_jax.config import KernelBackend, TargetConfig
from pallas_kernels.gated_product.pallas import MAX_ROWS

TOLERANCE = {"bfloat16": 2e-2, "float32": 1e-4}  # of the relative L2 distance; products of TF32 would show
THREADS = 4
WORST = 3  # times that may one number be off, beside itself and the root mean square of all (a fifth is rounding)
POISON = 0x7FFFFFF1  # in integers; floats get NaN


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        kernel: the function of a backend.
        make: random numbers -> operands.
        tolerance: of floats.
        misses: share of the integers that may differ (where near-ties decide).
        x64: with 64-bit types on, which change what index arithmetic is traced to.
    """

    name: str
    kernel: Callable[[KernelBackend], Callable[..., Any]]
    make: Callable[[Draw], list[Array]]
    tolerance: float
    misses: float = 0.0
    x64: bool = False


class Draw:
    """Random arrays, made on the device, each from its own key."""

    def __init__(self, seed: int) -> None:
        self._keys = iter(jax.random.split(jax.random.key(seed), 16))
        self.host = np.random.default_rng(seed)

    def normal(self, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> Array:
        return (jax.random.normal(next(self._keys), shape, jnp.float32) * jnp.float32(scale)).astype(dtype)


def run(bench: Bench) -> None:
    """Writes correct.json: a row per case, also of what fails.

    Raises:
        AssertionError: some case failed.
    """
    found, rows = cases(bench.tiny), []
    seeds = range(int(time.time()), int(time.time()) + len(found))
    with ThreadPoolExecutor(1 if bench.tiny else THREADS) as pool:  # most of the time goes into compiling
        for row in pool.map(partial(check, backend=bench.kernels), found, seeds):
            rows.append(row)
            bench.save("correct", rows)
            told = row.get("error", row.get("outputs"))
            state = "ok    " if row["passed"] else f"FAILED with seed {row['seed']}:"
            print(f"  {state} {row['name']}: {told}"[:700], flush=True)
    bad = [row["name"] for row in rows if not row["passed"]]
    if bad:
        raise AssertionError(f"{len(bad)} of {len(rows)} kernels are wrong: {', '.join(bad)}")


def check(case: Case, seed: int, backend: KernelBackend) -> dict[str, Any]:
    """Runs a case: {name, seed, passed, and outputs with how many of them lay over poison, or error}."""
    row: dict[str, Any] = {"name": case.name, "seed": seed, "passed": False}
    try:
        with jax.enable_x64(True) if case.x64 else nullcontext(), jax.numpy_rank_promotion("allow"):
            operands = case.make(Draw(seed))
            wanted = jax.jit(case.kernel("reference"))(*map(widened, operands))
            kernel = over_poison(case.kernel(backend))
            found, again = kernel(operands), kernel(operands)
            typed = jax.eval_shape(case.kernel("reference"), *operands)
            parts = zip(*(jax.tree.leaves(each) for each in (found[0], again[0], wanted, typed)), strict=True)
            row["outputs"] = [compared(np.asarray(f), np.asarray(a), np.asarray(w), case)
                              | ({} if f.dtype == t.dtype else {"dtype": str(f.dtype), "passed": False})
                              for f, a, w, t in parts]
        row["poisoned"] = found[1] + again[1]
        # Where the poison did not become an output's memory, what was never written might look right.
        covered = row["poisoned"] == 2 * len(row["outputs"])
        row["passed"] = covered and all(output["passed"] for output in row["outputs"])
    except Exception:
        row["error"] = traceback.format_exc()[-4000:]
    return row


def widened(x: Array) -> Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def over_poison(kernel: Callable[..., Any]) -> Callable[[list[Array]], tuple[Any, int]]:
    """A function of the operands: (results, how many of them lie where poison was).

    The outputs get the poison's own memory; what is merely freed goes to other threads and to scratch as often.
    """
    program = jax.jit(lambda poison, *operands: kernel(*operands), donate_argnums=0, keep_unused=True)

    def run(operands: list[Array]) -> tuple[Any, int]:
        poison = [jnp.full(s.shape, jnp.nan if jnp.issubdtype(s.dtype, jnp.floating) else POISON, s.dtype)
                  for s in jax.tree.leaves(jax.eval_shape(kernel, *operands))]
        places = {x.unsafe_buffer_pointer() for x in jax.block_until_ready(poison)}
        results = jax.block_until_ready(program(poison, *operands))
        return results, sum(x.unsafe_buffer_pointer() in places for x in jax.tree.leaves(results))

    return run


def compared(found: np.ndarray, again: np.ndarray, wanted: np.ndarray, case: Case) -> dict[str, Any]:
    """One output beside the reference's, and beside its own second run."""
    same = found.tobytes() == again.tobytes()
    if found.shape != wanted.shape:
        return {"shape": found.shape, "wanted": wanted.shape, "passed": False}
    if np.issubdtype(wanted.dtype, np.integer):
        differ = int((found != wanted).sum())
        return {"differ": differ, "of": wanted.size, "same_again": same,
                "passed": same and differ <= case.misses * wanted.size}
    f, w = found.astype(np.float64), wanted.astype(np.float64)
    off, size = np.abs(f - w), max(float(np.linalg.norm(w)), 1e-30)
    distance, worst = float(np.linalg.norm(off)) / size, float((off / (np.abs(w) + size / w.size**0.5)).max())
    near = bool(distance < case.tolerance and worst < WORST * case.tolerance)  # NaN is below nothing
    return {"relative": distance, "worst": worst, "nan": int(np.isnan(f).sum()), "largest": float(off.max()),
            "same_again": same, "passed": same and near}


def cases(tiny: bool) -> list[Case]:
    """All of them, the most telling first."""
    if tiny:
        shape: dict[str, Any] = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 32, "num_layers": 2,
                                 "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
        dense = TargetConfig(**shape)
        experts = replace(dense, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16)
        return all_cases(dense, experts, dense.with_dtype("float32"), (8, 1, 4), (1, 4), ((64, 40),), (16,))
    dense, experts, small = (PRESETS[name].target for name in ("qwen3-8b", "qwen3-30b-a3b", "smollm2-135m"))
    return all_cases(dense, experts, small, (256, 1, 64, 16), (1, 16, 256), ((6144, 4096), (6144, 1023)), (256, 64, 16))


def all_cases(dense: TargetConfig, experts: TargetConfig, small: TargetConfig, counts: tuple[int, ...],
              few: tuple[int, ...], prefixes: tuple[tuple[int, int], ...], nodes: tuple[int, ...]) -> list[Case]:
    """Of three models.

    Args:
        small: in float32.
        counts, few: rows of the dense model (the small one does without the first, the most); of the experts.
        prefixes: cache slots, and how many are committed.
        nodes: of trees.
    """
    found = [*attention_cases(dense, counts, prefixes), *attention_cases(small, counts[1:], prefixes[:1])]
    for target, n in (*((dense, n) for n in counts), *((small, n) for n in counts[1:])):
        found += layer_cases(target, n)
    found += [*draft_cases(dense), *tree_cases(dense, nodes), *expert_cases(experts, few)]
    # Once more with 64-bit types: the first case of every kernel.
    first = {case.name.split()[0]: case for case in reversed(found)}
    return found + [replace(case, name=f"{case.name}, 64-bit types", x64=True) for case in first.values()]


def normals(target: TargetConfig) -> Callable[..., Array]:
    return lambda d, *shape, scale=1.0: d.normal(shape, target.jnp_dtype, scale)


def attention_cases(target: TargetConfig, counts: tuple[int, ...],
                    prefixes: tuple[tuple[int, int], ...]) -> Iterator[Case]:
    """Random trees over a prefix, a ragged batch with an empty prefix, and a prompt chunk."""
    most = max(counts)
    for slots, cached in prefixes:
        for n in counts:
            yield attention_case(target, f"{n} nodes over {cached}", random_tree, n, slots, [cached])
    slots, cached = prefixes[0]
    yield attention_case(target, f"{min(16, most)} nodes, three sequences", random_tree, min(16, most), slots,
                         [cached, 0, cached // 3])
    yield attention_case(target, f"chunk of {most}", lambda d, b, n: causal_bits(b, n), most, slots, [cached // 4 * 2])


def attention_case(target: TargetConfig, what: str, bits: Callable[[Draw, int, int], Array], n: int, slots: int,
                   cached: list[int]) -> Case:
    t, draw, b = target, normals(target), len(cached)
    unread = (np.arange(slots)[None, :] >= np.asarray(cached)[:, None])[None, :, None, :, None]

    def make(d: Draw) -> list[Array]:
        # What lies beyond the prefixes was left there by others, perhaps by a prompt that overflowed.
        caches = [jnp.where(unread, jnp.asarray(left, t.jnp_dtype), draw(d, 2, b, t.num_kv_heads, slots, t.head_dim))
                  for left in (jnp.nan, jnp.inf)]
        new = [draw(d, b, n, t.num_kv_heads, t.head_dim) for _ in range(2)]
        return [draw(d, b, n, t.num_heads, t.head_dim), *new, bits(d, b, n), *caches, jnp.int32(1),
                jnp.asarray(cached, jnp.int32)]

    return Case(f"tree_attention {t.dtype} {what}", kernels.tree_attention, make, TOLERANCE[t.dtype])


def random_tree(d: Draw, batch: int, nodes: int) -> Array:
    """Ancestor bits [B, N, words] of a random tree; node 0 is the root."""
    mask = np.eye(nodes, dtype=bool)
    for n in range(1, nodes):
        mask[n] |= mask[d.host.integers(0, n)]
    return pack_bits(jnp.asarray(np.broadcast_to(mask, (batch, nodes, nodes))))


def layer_cases(target: TargetConfig, n: int) -> Iterator[Case]:
    """The other kernels of a layer on N rows."""
    t, draw, near = target, normals(target), TOLERANCE[target.dtype]
    wide, label = t.intermediate_size, f"{target.dtype} {n} rows"

    def rope(backend: KernelBackend) -> Callable[..., Any]:
        step = kernels.qk_norm_rope(backend, heads=t.num_heads, kv_heads=t.num_kv_heads, queries=n, eps=t.rms_norm_eps)
        return step if t.qk_norm else lambda x, cos, sin: step(x, None, None, cos, sin)

    def rope_operands(d: Draw) -> list[Array]:
        scales = [draw(d, t.head_dim) for _ in range(2)] if t.qk_norm else []
        return [draw(d, 1, n, (t.num_heads + 2 * t.num_kv_heads) * t.head_dim), *scales, *angles(d, n, t)]

    yield Case(f"qk_norm_rope {label}", rope, rope_operands, near)
    yield Case(f"add_norm {label}", partial(kernels.add_norm, eps=t.rms_norm_eps),
               lambda d: [draw(d, 1, n, t.hidden_size), draw(d, 1, n, t.hidden_size), draw(d, t.hidden_size)], near)
    if n <= MAX_ROWS:  # else the kernel is its reference
        yield Case(f"gated_product {label}", kernels.gated_product,
                   lambda d: [draw(d, 1, n, t.hidden_size),
                              draw(d, t.hidden_size, 2 * wide, scale=t.hidden_size**-0.5)], near)


def angles(d: Draw, rows: int, target: TargetConfig) -> list[Array]:
    """Cosines and sines [1, M, C/2]."""
    angle = d.normal((1, rows, target.head_dim // 2), jnp.float32, 3.0)
    return [jnp.cos(angle), jnp.sin(angle)]


def draft_cases(target: TargetConfig) -> Iterator[Case]:
    """What only the draft head's block asks: rows that are seen and do not ask, and the best tokens of every slot."""
    t, draw, near, block = target, normals(target), TOLERANCE[target.dtype], 16
    h, k, c, d_model, slots = t.num_heads, t.num_kv_heads, t.head_dim, t.hidden_size, 256

    def block_operands(d: Draw) -> list[Array]:
        new = [draw(d, 1, 2 * block, k, c) for _ in range(2)]
        sees = np.tril(np.ones((1, block, 2 * block), bool), block)
        sees[:, :, 3:block] = False  # three of the waiting rows are real
        caches = [draw(d, 1, 1, k, slots, c) for _ in range(2)]
        return [draw(d, 1, block, h, c), *new, pack_bits(jnp.asarray(sees)), *caches, jnp.int32(0),
                jnp.asarray([slots - block], jnp.int32)]

    def rope(backend: KernelBackend) -> Callable[..., Any]:
        return kernels.qk_norm_rope(backend, heads=h, kv_heads=k, queries=block, eps=t.rms_norm_eps)

    yield Case(f"tree_attention {t.dtype} draft block", kernels.tree_attention, block_operands, near)
    yield Case(f"qk_norm_rope {t.dtype} draft block", rope,
               lambda d: [draw(d, 1, 2 * block, (h + 2 * k) * c), draw(d, c), draw(d, c), *angles(d, 2 * block, t)],
               near)
    yield Case(f"add_norm {t.dtype} draft block", partial(kernels.add_norm, eps=t.rms_norm_eps),
               lambda d: [draw(d, 1, block, d_model), draw(d, 1, block, d_model), draw(d, d_model),
                          draw(d, 1, block, d_model)], near)
    for width in (7, 16):
        yield Case(f"top_w float32 {block} rows width {width}", partial(kernels.top_w, width=width, skip=1),
                   lambda d: [d.normal((1, block, t.vocab_size), jnp.float32, 3.0)], TOLERANCE["float32"])


def tree_cases(target: TargetConfig, counts: tuple[int, ...], depths: int = 15) -> Iterator[Case]:
    """Both builders; integers are equal or wrong."""
    def make(width: int, d: Draw) -> list[Array]:
        logp = np.sort(np.log(d.host.dirichlet(np.ones(width + 3), (2, depths))[..., :width]))[..., ::-1]
        tokens = d.host.permuted(np.tile(np.arange(target.vocab_size), (2 * depths, 1))[:, :64], axis=1)[:, :width]
        return [jnp.asarray([5, 6], jnp.int32), jnp.asarray(tokens.reshape(2, depths, width), jnp.int32),
                jnp.asarray(logp.copy(), jnp.float32)]

    for nodes in counts:
        for best_first, width in ((False, 7), (True, 16), (False, 16), (True, 7)):
            yield Case(f"tree_build {'best_first' if best_first else 'accum_logp'} {nodes} nodes width {width}",
                       partial(kernels.tree_build, nodes=nodes, best_first=best_first), partial(make, width),
                       TOLERANCE["float32"])


def expert_cases(target: TargetConfig, counts: tuple[int, ...]) -> Iterator[Case]:
    """Router and experts of a layer of experts. Which of two experts is the better may be a near-tie."""
    t, draw, near = target, normals(target), TOLERANCE[target.dtype]
    e, a, inner, width = t.num_experts, t.num_experts_per_tok, t.hidden_size, t.moe_intermediate_size

    def router_operands(n: int, d: Draw) -> list[Array]:
        return [draw(d, n, inner), draw(d, inner, e, scale=inner**-0.5)]

    def expert_operands(n: int, d: Draw) -> list[Array]:
        chosen = d.host.permuted(np.tile(np.arange(e), (n, 1)), axis=1)[:, :a]
        return [draw(d, n, inner), jnp.asarray(chosen, jnp.int32),
                jnp.asarray(d.host.dirichlet(np.ones(a), n), jnp.float32),
                draw(d, e, inner, 2 * width, scale=inner**-0.5), draw(d, e, width, inner, scale=width**-0.5)]

    for n in counts:
        yield Case(f"router {t.dtype} {n} rows", partial(kernels.router, choices=a, normalised=t.norm_topk_prob),
                   partial(router_operands, n), near, misses=0.005)
        yield Case(f"grouped_mlp {t.dtype} {n} rows", kernels.grouped_mlp, partial(expert_operands, n), near)
