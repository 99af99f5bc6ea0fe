"""Tree attention for NVIDIA GPUs in Pallas, lowered through Triton.

One block holds the rows (nodes x query heads of one group) of one key/value head, so that keys and values are read
once for the whole group, and walks the committed keys up to the sequence's length; then the new tokens, 32 columns
and one word of bits per row at a time. With `splits` > 1 several blocks share the committed keys and a second launch
combines what they found.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.tree_attention.config import WORD, TreeAttentionConfig, choose_config, padded
from pallas_kernels.tree_attention.reference import settle

LOWEST = -3e38  # stands for -inf where a difference of two must not be NaN
LOG2_E = 1.4426950408889634
COMBINED_ROWS = 8  # rows per block of the second launch: many small blocks


def tree_attention(q: Array, new_k: Array, new_v: Array, visible: Array, cache_k: Array, cache_v: Array,
                   layer: Array | int, cached: Array, *, config: TreeAttentionConfig | None = None,
                   interpret: bool = False) -> Array:
    """The same as `reference.tree_attention`.

    Args:
        config: block sizes; None chooses them.
        interpret: run on any backend, slowly, to test.

    Raises:
        NotImplementedError: a shape or dtype that the kernel does not take.
    """
    batch, queries, heads, width = q.shape
    new, kv_heads, slots = new_k.shape[1], new_k.shape[2], cache_k.shape[3]
    if q.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"dtype {q.dtype}")
    config = config or choose_config(batch, queries, heads, kv_heads, width, slots, q.dtype.itemsize)
    group = heads // kv_heads
    wide = padded(group)
    # A lone query and a lone new token are repeated in registers; other sizes are padded to whole blocks.
    rows = _pad(q.reshape(batch, queries, kv_heads, group, width), {1: config.nodes if queries > 1 else 1, 3: wide})
    bits = _pad(lax.bitcast_convert_type(visible, jnp.int32), {1: config.nodes if queries > 1 else 1})
    new_k, new_v = (_pad(x, {1: WORD if new > 1 else 1}) for x in (new_k, new_v))
    blocks = -(-queries // config.nodes)
    lines = config.nodes * wide  # rows of one product
    whole = pl.BlockSpec(memory_space=pl.ANY)
    partials = (batch * kv_heads, config.splits, blocks * lines)
    if config.splits == 1:
        out_shape: Any = jax.ShapeDtypeStruct(rows.shape, q.dtype)
        out_specs: Any = whole
    else:
        out_shape = [jax.ShapeDtypeStruct((*partials, width), jnp.float32), jax.ShapeDtypeStruct(partials, jnp.float32),
                     jax.ShapeDtypeStruct(partials, jnp.float32)]
        out_specs = [whole] * 3
    found = pl.pallas_call(
        partial(_kernel, config=config, kv_heads=kv_heads, words=-(-new // WORD)),
        grid=(blocks, batch * kv_heads, config.splits), in_specs=[whole] * 8, out_specs=out_specs, out_shape=out_shape,
        compiler_params=pltriton.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret, name="tree_attention",
    )(jnp.asarray(layer, jnp.int32).reshape(1), cached, rows, new_k, new_v, bits, cache_k, cache_v)
    if config.splits > 1:
        few = min(config.nodes, max(1, COMBINED_ROWS // wide))  # nodes per block
        found = pl.pallas_call(
            partial(_combine, nodes=few, splits=config.splits, kv_heads=kv_heads),
            grid=(-(-rows.shape[1] // few), batch * kv_heads), in_specs=[whole] * 3, out_specs=whole,
            out_shape=jax.ShapeDtypeStruct(rows.shape, q.dtype),
            compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1), interpret=interpret,
            name="tree_attention_combine")(*found)
    return found[:, :queries, :, :group].reshape(batch, queries, heads, width)


def _pad(x: Array, multiples: dict[int, int]) -> Array:
    """Pads axes to multiples; nothing at all for the shapes that decoding uses."""
    widths = [(0, -size % multiples.get(axis, 1)) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, widths) if any(after for _, after in widths) else x


def _kernel(
    layer_ref,  # int32 [1]
    cached_ref,  # int32 [B]
    q_ref,  # [B, N, K, g, C]
    k_ref, v_ref,  # [B, M, K, C]
    bits_ref,  # int32 [B, N, ceil(M/32)]
    cache_k_ref, cache_v_ref,  # [L, B, K, S, C]
    *out_refs,  # [B, N, K, g, C]; or partial sums [B*K, splits, rows, C], their norms and peaks [B*K, splits, rows]
    config: TreeAttentionConfig, kv_heads: int, words: int,
) -> None:
    block, which, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    b, head = lax.div(which, jnp.int32(kv_heads)), lax.rem(which, jnp.int32(kv_heads))
    nodes, group, width = config.nodes, q_ref.shape[3], q_ref.shape[4]
    lines = nodes * group
    stored = min(nodes, q_ref.shape[1])  # nodes in memory: all of the block, or the only one
    here = (pl.ds(b, 1), pl.ds(block * nodes, stored), pl.ds(head, 1), slice(None), slice(None))
    q = jnp.broadcast_to(q_ref[here].reshape(stored, group, width), (nodes, group, width)).reshape(lines, width)
    layer, cached = layer_ref[0], cached_ref[b]
    scale = jnp.float32(width**-0.5 * LOG2_E)

    def meet(k, v, mask, carry):
        """Adds keys [X, C] and values [X, C] under mask [lines or 1, X] to the running softmax."""
        total, norm, peak = carry
        scores = pltriton.dot(q, k, trans_b=True, precision=_precision(q)) * scale
        scores = jnp.where(mask, scores, LOWEST)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
        weights = jnp.where(mask, jnp.exp2(scores - new_peak[:, None]), 0.0)
        decay = jnp.exp2(peak - new_peak)
        total = total * decay[:, None] + pltriton.dot(weights.astype(v.dtype), v, precision=_precision(q))
        return total, norm * decay + jnp.sum(weights, axis=1), new_peak

    def committed(i, carry):
        at = (pl.ds(layer, 1), pl.ds(b, 1), pl.ds(head, 1), pl.ds(i * config.keys, config.keys), slice(None))
        slot = i * config.keys + lax.broadcasted_iota(jnp.int32, (1, config.keys), 1)
        # What lies beyond the prefix is not even read: a weight of zero would not put an infinite value away.
        v = pltriton.load(cache_v_ref.at[at], mask=(slot < cached).reshape(1, 1, 1, config.keys, 1), other=0.0)
        return meet(cache_k_ref[at].reshape(config.keys, width), v.reshape(config.keys, width), slot < cached, carry)

    def fresh(j, carry):
        columns = min(WORD, k_ref.shape[1])
        at = (pl.ds(b, 1), pl.ds(j * WORD, columns), pl.ds(head, 1), slice(None))
        k, v = settle(*(ref[at].reshape(columns, width) for ref in (k_ref, v_ref)))
        k, v = (jnp.broadcast_to(x, (WORD, width)) for x in (k, v))
        word = bits_ref[pl.ds(b, 1), pl.ds(block * nodes, stored), pl.ds(j, 1)].reshape(stored, 1, 1)
        column = lax.broadcasted_iota(jnp.int32, (nodes, group, WORD), 2)
        mask = (lax.shift_right_logical(jnp.broadcast_to(word, column.shape), column) & 1).reshape(lines, WORD) == 1
        return meet(k, v, mask, carry)

    carry = (jnp.zeros((lines, width), jnp.float32), jnp.zeros((lines,), jnp.float32),
             jnp.full((lines,), LOWEST, jnp.float32))
    steps = lax.div(cached + jnp.int32(config.keys - 1), jnp.int32(config.keys))
    share = lax.div(steps + jnp.int32(config.splits - 1), jnp.int32(config.splits))
    first = jnp.minimum(split * share, steps)
    carry = lax.fori_loop(first, jnp.minimum(first + share, steps), committed, carry)
    # The last split has the smallest share of committed keys and takes the new ones.
    last = split == config.splits - 1
    if q.dtype == jnp.float32:  # a loop known to run once would be merged with the one before, and spill registers
        last = last & (cached >= 0)
    words_here = lax.convert_element_type(last, jnp.int32) * jnp.int32(words)
    total, norm, peak = lax.fori_loop(jnp.int32(0), words_here, fresh, carry)
    if config.splits == 1:
        out_refs[0][here] = _finish(total, norm, stored, nodes, group, out_refs[0].dtype)
    else:
        at = (pl.ds(which, 1), pl.ds(split, 1), pl.ds(block * lines, lines))
        out_refs[0][(*at, slice(None))] = total.reshape(1, 1, lines, width)
        out_refs[1][at] = norm.reshape(1, 1, lines)
        out_refs[2][at] = peak.reshape(1, 1, lines)


def _combine(
    total_ref,  # [B*K, splits, rows, C]
    norm_ref, peak_ref,  # [B*K, splits, rows]
    out_ref,  # [B, N, K, g, C]
    *, nodes: int, splits: int, kv_heads: int,
) -> None:
    """Brings the splits' partial softmaxes of a few nodes to one peak and adds them."""
    block, which = pl.program_id(0), pl.program_id(1)
    b, head = lax.div(which, jnp.int32(kv_heads)), lax.rem(which, jnp.int32(kv_heads))
    group, width = out_ref.shape[3], out_ref.shape[4]
    lines = nodes * group
    total, norm = jnp.zeros((lines, width), jnp.float32), jnp.zeros((lines,), jnp.float32)
    peak = jnp.full((lines,), LOWEST, jnp.float32)
    for split in range(splits):
        at = (pl.ds(which, 1), pl.ds(split, 1), pl.ds(block * lines, lines))
        theirs = peak_ref[at].reshape(lines)
        new_peak = jnp.maximum(peak, theirs)
        decay, weight = jnp.exp2(peak - new_peak), jnp.exp2(theirs - new_peak)
        total = total * decay[:, None] + total_ref[(*at, slice(None))].reshape(lines, width) * weight[:, None]
        norm, peak = norm * decay + norm_ref[at].reshape(lines) * weight, new_peak
    stored = min(nodes, out_ref.shape[1])
    here = (pl.ds(b, 1), pl.ds(block * nodes, stored), pl.ds(head, 1), slice(None), slice(None))
    out_ref[here] = _finish(total, norm, stored, nodes, group, out_ref.dtype)


def _finish(total, norm, stored: int, nodes: int, group: int, dtype):
    """The rows' results [1, stored, 1, g, C]; rows that see nothing get zeros."""
    out = (total / jnp.where(norm > 0, norm, 1.0)[:, None]).reshape(nodes, group, total.shape[1])
    if stored < nodes:  # a lone query, repeated: its copies are equal
        out = jnp.max(out, axis=0)
    return out.astype(dtype).reshape(1, stored, 1, group, total.shape[1])


def _precision(x: Array) -> lax.Precision | None:
    """float32 products stay float32 (no TF32)."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
