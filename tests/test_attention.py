"""Tree attention against a dense softmax written out in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from jetspec_jax.attention import causal_bits, pack_bits, unpack_bits
from pallas_kernels.tree_attention import reference
from pallas_kernels.tree_attention.reference import tree_attention


def dense(q, new_k, new_v, mask, cache_k, cache_v, layer, cached):
    """One query, one head, one loop at a time."""
    batch, queries, heads, width = q.shape
    out = np.zeros_like(q)
    for b in range(batch):
        for n in range(queries):
            for h in range(heads):
                g = h // (heads // new_k.shape[2])
                keys = np.concatenate([cache_k[layer, b, g, :cached[b]], new_k[b, mask[b, n], g]])
                values = np.concatenate([cache_v[layer, b, g, :cached[b]], new_v[b, mask[b, n], g]])
                if len(keys):
                    scores = keys @ q[b, n, h] / np.sqrt(width)
                    weights = np.exp(scores - scores.max())
                    out[b, n, h] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize(("batch", "queries", "new", "heads", "kv_heads", "slots", "cached"), [
    (1, 1, 1, 4, 2, 16, [7]), (3, 5, 5, 6, 2, 40, [0, 40, 13]), (2, 4, 40, 3, 3, 37, [36, 1]),
    (2, 33, 33, 2, 1, 64, [64, 0]), (1, 3, 3, 1, 1, 1, [1])])
def test_equals_dense_attention(monkeypatch, batch, queries, new, heads, kv_heads, slots, cached):
    monkeypatch.setattr(reference, "block_size", lambda *shape: 16)  # several blocks, the last one odd-sized
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, queries, heads, 8))
    new_k, new_v = rng.standard_normal((2, batch, new, kv_heads, 8))
    cache_k, cache_v = rng.standard_normal((2, 3, batch, kv_heads, slots, 8))
    mask = rng.random((batch, queries, new)) < 0.5
    mask[0, 0] = False  # with an empty cache this query sees nothing at all
    args = [jnp.asarray(a) for a in (q, new_k, new_v)]
    out = tree_attention(*args, pack_bits(jnp.asarray(mask)), jnp.asarray(cache_k), jnp.asarray(cache_v), 1,
                         jnp.asarray(cached, jnp.int32))
    np.testing.assert_allclose(out, dense(q, new_k, new_v, mask, cache_k, cache_v, 1, cached), atol=1e-12)


@pytest.mark.parametrize(("shape", "block"), [((1, 3, 64), 512), ((8, 3, 64), 256), ((64, 3, 64), 32),
                                              ((1000, 8, 128), 32), ((1, 8, 1024), 64)])
def test_blocks_shrink_as_batches_grow(shape, block):
    assert reference.block_size(*shape) == block


def test_slots_beyond_cached_are_never_read():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 2, 2, 8))) for _ in range(3))
    cache = rng.standard_normal((1, 1, 2, 32, 8))
    poisoned = cache.copy()
    poisoned[:, :, :, 5:] = np.nan
    outs = [tree_attention(q, k, v, causal_bits(1, 2), jnp.asarray(c), jnp.asarray(cache), 0,
                           jnp.asarray([5], jnp.int32)) for c in (cache, poisoned)]
    np.testing.assert_array_equal(*outs)


def test_float32_stays_close_to_float64():
    rng = np.random.default_rng(2)
    q, k, v = (rng.standard_normal((2, 9, 4, 16)) for _ in range(3))
    cache = rng.standard_normal((2, 2, 4, 300, 16))
    results = [tree_attention(*(jnp.asarray(a, dtype) for a in (q, k, v)), causal_bits(2, 9),
                              jnp.asarray(cache, dtype), jnp.asarray(cache[::-1].copy(), dtype), 1,
                              jnp.asarray([300, 17], jnp.int32)) for dtype in (jnp.float32, jnp.float64)]
    assert results[0].dtype == jnp.float32
    np.testing.assert_allclose(results[0], results[1], atol=2e-6)


def test_bits_are_packed_lowest_first():
    rows = np.zeros((1, 34), bool)
    rows[0, [0, 3, 31, 33]] = True
    packed = pack_bits(jnp.asarray(rows))
    assert packed.dtype == jnp.uint32
    assert packed.tolist() == [[1 + 8 + 2**31, 2]]
    np.testing.assert_array_equal(unpack_bits(packed, 34), rows)


def test_causal_bits_are_a_lower_triangle():
    assert unpack_bits(causal_bits(1, 3), 3).astype(int).tolist() == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]]
