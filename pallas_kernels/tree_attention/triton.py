"""Tree attention for NVIDIA GPUs in plain Triton, launched by jax-triton.

The same cut of the work as `pallas.py`. Loads are masked, so nothing is padded in memory, nothing beyond a prefix is
read, and any head dimension is taken that the config takes. Importing this module needs `triton`; running it on a GPU
needs `jax_triton`; interpreting it needs torch, whose tensors Triton's interpreter works on.
"""

from __future__ import annotations

import inspect
import math
from functools import cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from jax import Array

from pallas_kernels.tree_attention.config import TreeAttentionConfig, choose_config, padded

LOWEST = tl.constexpr(-3e38)  # stands for -inf where a difference of two must not be NaN
WORD = tl.constexpr(32)  # columns of new tokens met at a time
LOG2_E = math.log2(math.e)
COMBINED_ROWS = 4  # per block of the combine
H100 = 90  # compute capability


def tree_attention(q: Array, new_k: Array, new_v: Array, visible: Array, cache_k: Array, cache_v: Array,
                   layer: Array | int, cached: Array, *, config: TreeAttentionConfig | None = None,
                   interpret: bool = False) -> Array:
    """The same as `reference.tree_attention`.

    Args:
        config: block sizes; None chooses them.
        interpret: run in Triton's interpreter on the CPU, slowly, to test; TRITON_INTERPRET=1 must have been set
            before Triton was imported.

    Raises:
        NotImplementedError: a shape or dtype that the kernel does not take.
    """
    batch, queries, heads, width = q.shape
    new, kv_heads, slots = new_k.shape[1], new_k.shape[2], cache_k.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"dtype {q.dtype}")
    config = config or choose_config(batch, queries, heads, kv_heads, width, slots, q.dtype.itemsize)
    group = heads // kv_heads
    columns = max(16, padded(width))  # tensor cores sum over 16 columns at least
    rows = (batch, queries, heads)
    whole = jax.ShapeDtypeStruct((*rows, width), q.dtype)
    found = _launch(
        tree_attention_kernel, [jnp.asarray(layer, jnp.int32).reshape(1), cached, q, new_k, new_v, visible, cache_k,
                                cache_v],
        [whole] if config.splits == 1 else
        [jax.ShapeDtypeStruct((config.splits, *shape), jnp.float32) for shape in ((*rows, width), rows, rows)],
        (-(-queries // config.nodes), batch * kv_heads, config.splits), config.warps, config.stages, interpret,
        **({"norm_ptr": None, "peak_ptr": None} if config.splits == 1 else {}), scale=width**-0.5 * LOG2_E,
        batch=batch, queries=queries, new=new, kv_heads=kv_heads, group=group, wide=padded(group), width=width,
        columns=columns, slots=slots, nodes=config.nodes, keys=config.keys, splits=config.splits, interpreted=interpret)
    if config.splits == 1:
        return found[0]
    return _launch(
        tree_attention_combine, found, [whole], (-(-math.prod(rows) // COMBINED_ROWS),), 4, 1, interpret,
        rows=math.prod(rows), width=width, columns=columns, splits=config.splits, wide=padded(config.splits),
        block=COMBINED_ROWS)[0]


@triton.jit
def tree_attention_kernel(
    layer_ptr,  # int32 [1]
    cached_ptr,  # int32 [B]
    q_ptr,  # [B, N, H, C]
    k_ptr, v_ptr,  # [B, M, K, C]
    bits_ptr,  # uint32 [B, N, ceil(M/32)]
    cache_k_ptr, cache_v_ptr,  # [L, B, K, S, C]
    out_ptr,  # [B, N, H, C]; or partial sums [splits, B, N, H, C]
    norm_ptr, peak_ptr,  # None; or the norms and peaks of the partial sums [splits, B, N, H]
    scale: tl.constexpr, batch: tl.constexpr, queries: tl.constexpr, new: tl.constexpr, kv_heads: tl.constexpr,
    group: tl.constexpr, wide: tl.constexpr, width: tl.constexpr, columns: tl.constexpr, slots: tl.constexpr,
    nodes: tl.constexpr, keys: tl.constexpr, splits: tl.constexpr, interpreted: tl.constexpr,
):
    block, which, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, head = which // kv_heads, which % kv_heads
    line = tl.arange(0, nodes * wide)  # rows of one product: nodes x query heads of the group
    node, member = block * nodes + line // wide, line % wide
    here = (node < queries) & (member < group)
    row = ((b * queries + node) * kv_heads + head) * group + member
    q = _load(q_ptr, row, here, width, columns)

    total = tl.zeros((nodes * wide, columns), tl.float32)
    norm = tl.zeros((nodes * wide,), tl.float32)
    peak = tl.full((nodes * wide,), LOWEST, tl.float32)
    cached = tl.load(cached_ptr + b)
    piece = ((tl.load(layer_ptr).to(tl.int64) * batch + b) * kv_heads + head) * (slots * width)
    steps = tl.cdiv(cached, keys)
    share = tl.cdiv(steps, splits)
    first = tl.minimum(split * share, steps)
    for i in range(first, tl.minimum(first + share, steps)):
        slot = i * keys + tl.arange(0, keys)
        k = _load(cache_k_ptr + piece, slot, slot < cached, width, columns)
        v = _load(cache_v_ptr + piece, slot, slot < cached, width, columns)
        total, norm, peak = _meet(q, k, v, (slot < cached)[None, :], total, norm, peak, scale, interpreted)

    if split == splits - 1:  # it has the smallest share of committed keys and takes the new ones
        words: tl.constexpr = (new + WORD - 1) // WORD
        for j in range(words):
            column = tl.arange(0, WORD)
            token = j * WORD + column
            k = _load(k_ptr, (b * new + token) * kv_heads + head, token < new, width, columns)
            v = _load(v_ptr, (b * new + token) * kv_heads + head, token < new, width, columns)
            k, v = _settle(k, v)
            word = tl.load(bits_ptr + (b * queries + node) * words + j, mask=here, other=0)
            mask = ((word[:, None] >> column[None, :]) & 1) == 1
            total, norm, peak = _meet(q, k, v, mask, total, norm, peak, scale, interpreted)

    if splits == 1:
        _store(out_ptr, row, here, total / tl.where(norm > 0, norm, 1.0)[:, None], width, columns)
    else:
        row += split * (batch * queries * kv_heads * group)
        _store(out_ptr, row, here, total, width, columns)
        tl.store(norm_ptr + row, norm, mask=here)
        tl.store(peak_ptr + row, peak, mask=here)


@triton.jit
def _meet(q, k, v, mask, total, norm, peak, scale: tl.constexpr, interpreted: tl.constexpr):
    """Adds keys [X, C] and values [X, C] under mask [lines or 1, X] to the running softmax."""
    scores = tl.where(mask, _dot(q, tl.trans(k), interpreted) * scale, LOWEST)
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.where(mask, tl.exp2(scores - new_peak[:, None]), 0.0)
    decay = tl.exp2(peak - new_peak)
    total = total * decay[:, None] + _dot(weights.to(v.dtype), v, interpreted)
    return total, norm * decay + tl.sum(weights, 1), new_peak


@triton.jit
def _settle(k, v):
    """`reference.settle` of keys and values [X, C]."""
    wide_k, wide_v = k.to(tl.float32), v.to(tl.float32)  # Triton's interpreter has no constants of bfloat16
    sound = (tl.min((tl.abs(wide_v) < float("inf")).to(tl.int32), 1) == 1)[:, None]
    return tl.where(sound, wide_k, float("nan")).to(k.dtype), tl.where(sound, wide_v, 0.0).to(v.dtype)


@triton.jit
def _dot(a, b, interpreted: tl.constexpr):
    """float32 products stay float32 (no TF32)."""
    if interpreted:  # Triton's interpreter has no product of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load(ptr, row, valid, width: tl.constexpr, columns: tl.constexpr):
    """Rows [X] of an array [.., C] as [X, columns]; zeros where not valid."""
    column = tl.arange(0, columns)[None, :]
    return tl.load(ptr + row[:, None] * width + column, mask=valid[:, None] & (column < width), other=0.0)


@triton.jit
def _store(ptr, row, valid, values, width: tl.constexpr, columns: tl.constexpr):
    """Values [X, columns] into the valid rows [X] of an array [.., C]."""
    column = tl.arange(0, columns)[None, :]
    tl.store(ptr + row[:, None] * width + column, values.to(ptr.dtype.element_ty),
             mask=valid[:, None] & (column < width))


@triton.jit
def tree_attention_combine(
    total_ptr,  # [splits, rows, C]
    norm_ptr, peak_ptr,  # [splits, rows]
    out_ptr,  # [rows, C]
    rows: tl.constexpr, width: tl.constexpr, columns: tl.constexpr, splits: tl.constexpr, wide: tl.constexpr,
    block: tl.constexpr,
):
    """Brings the splits' partial softmaxes to one peak and adds them."""
    row = tl.program_id(0) * block + tl.arange(0, block)
    split = tl.arange(0, wide)
    column = tl.arange(0, columns)
    at = split[:, None] * rows + row[None, :]
    valid = (split < splits)[:, None] & (row < rows)[None, :]
    peak = tl.load(peak_ptr + at, mask=valid, other=LOWEST)
    weight = tl.exp2(peak - tl.max(peak, 0)[None, :])
    norm = tl.sum(tl.load(norm_ptr + at, mask=valid, other=0.0) * weight, 0)
    total = tl.load(total_ptr + at[:, :, None] * width + column[None, None, :],
                    mask=valid[:, :, None] & (column < width)[None, None, :], other=0.0)
    total = tl.sum(total * weight[:, :, None], 0)
    _store(out_ptr, row, row < rows, total / tl.where(norm > 0, norm, 1.0)[:, None], width, columns)


def _launch(kernel: Any, arrays: list[Array], outputs: list[jax.ShapeDtypeStruct], grid: tuple[int, ...], warps: int,
            stages: int, interpret: bool, **static: Any) -> list[Array]:
    """Runs a kernel on arrays, with pointers to the outputs after those to the arrays."""
    if interpret:
        return jax.pure_callback(lambda *inputs: _interpreted(kernel, inputs, outputs, grid, static), outputs, *arrays)
    jax_triton = _jax_triton()
    name = "out_type" if "out_type" in inspect.signature(jax_triton.triton_call).parameters else "out_shape"
    # Without a GPU the program is compiled for another machine: an H100.
    capability = None if jax.default_backend() == "gpu" else H100
    return jax_triton.triton_call(*arrays, kernel=kernel, grid=grid, num_warps=warps, num_stages=stages,
                                  compute_capability=capability, name=kernel.__name__, **{name: outputs}, **static)


@cache
def _jax_triton() -> Any:
    """jax-triton, mended where it is older than the JAX in use.

    JAX 0.12 tells rules for dead code which inputs are live, as the second of three arguments; jax-triton's rule up to
    0.4.1 knows two, and every jit would end in a TypeError. Falls away with the first jax-triton that knows three.
    """
    import jax_triton
    from jax.interpreters import partial_eval

    primitive, rules = jax_triton.triton_lib.triton_kernel_call_p, cast("dict[Any, Any]", partial_eval.dce_rules)
    rule = rules.get(primitive)  # jax-triton 0.3 has none
    if rule and jax.__version_info__ >= (0, 12) and len(inspect.signature(rule).parameters) == 2:
        rules[primitive] = lambda used_outs, live_ins, eqn: rule(used_outs, eqn)
    return jax_triton


def _interpreted(kernel: Any, inputs: tuple[Array, ...], outputs: list[jax.ShapeDtypeStruct], grid: tuple[int, ...],
                 static: dict[str, Any]) -> list[np.ndarray]:
    import torch

    def tensor(x: np.ndarray) -> torch.Tensor:
        if x.dtype == jnp.bfloat16:  # unknown to NumPy, so torch takes its bits
            return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(x)

    found = [np.empty(x.shape, x.dtype) for x in outputs]
    kernel[grid](*(tensor(np.array(x)) for x in inputs), *map(tensor, found), **static)
    return found
