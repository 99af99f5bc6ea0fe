"""Every kernel and backend against its reference, interpreted on the CPU."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jetspec_jax import TreeConfig
from jetspec_jax.attention import causal_bits, pack_bits
from jetspec_jax.tree import build_tree
from pallas_kernels import add_norm, grouped_matmul, qk_norm_rope, router
from pallas_kernels.tree_attention import pallas, reference
from pallas_kernels.tree_attention.config import TreeAttentionConfig, choose_config

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


def random_tree(rng, batch, nodes):
    """Ancestor bits of random trees, node 0 the root."""
    mask = np.zeros((batch, nodes, nodes), bool)
    for b in range(batch):
        for n in range(nodes):
            mask[b, n, n] = True
            if n:
                mask[b, n] |= mask[b, rng.integers(0, n)]
    return mask


def star(nodes):
    return np.eye(nodes, dtype=bool) | (np.arange(nodes) == 0)[None, :]


def inputs(rng, dtype, mask, heads, kv_heads, width, slots, cached, layers=2):
    batch, queries, new = mask.shape
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    return (draw(batch, queries, heads, width), draw(batch, new, kv_heads, width), draw(batch, new, kv_heads, width),
            pack_bits(jnp.asarray(mask)), draw(layers, batch, kv_heads, slots, width),
            draw(layers, batch, kv_heads, slots, width), jnp.int32(1), jnp.asarray(cached, jnp.int32))


def compare(arguments, dtype, config=None):
    with jax.numpy_rank_promotion("allow"):
        found = pallas.tree_attention(*arguments, config=config, interpret=True)
        again = pallas.tree_attention(*arguments, config=config, interpret=True)
    expected = reference.tree_attention(*arguments)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(again, np.float32))
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(expected, np.float32), atol=TOLERANCE[dtype])


CASES = {
    # mask [B, N, M], heads, kv_heads, width, slots, cached
    "plain decoding": (np.ones((1, 1, 1), bool), 4, 2, 16, 64, [40]),
    "plain, ragged batch, one empty prefix": (np.ones((3, 1, 1), bool), 8, 1, 32, 128, [0, 128, 17]),
    "chain": (np.tril(np.ones((2, 8, 8), bool)), 4, 4, 16, 64, [3, 64]),
    "star": (np.broadcast_to(star(33), (2, 33, 33)), 2, 1, 16, 96, [96, 1]),
    "bidirectional block over pending rows": (np.ones((1, 16, 32), bool), 4, 2, 32, 64, [30]),
    "one query over many": (np.ones((2, 1, 40), bool), 6, 2, 16, 48, [9, 0]),
    "groups of three": (np.tril(np.ones((1, 5, 5), bool)), 9, 3, 64, 64, [33]),
    "groups of five": (np.tril(np.ones((1, 6, 6), bool)), 10, 2, 16, 32, [32]),
    "groups of seven": (np.tril(np.ones((2, 3, 3), bool)), 7, 1, 8, 16, [16, 2]),
    "prompt chunk": (np.tril(np.ones((1, 128, 128), bool)), 4, 2, 64, 128, [128]),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", list(CASES))
def test_tree_attention(name, dtype):
    mask, *rest = CASES[name]
    compare(inputs(np.random.default_rng(0), dtype, mask, *rest), dtype)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_random_trees_of_every_group(heads):
    rng = np.random.default_rng(heads)
    compare(inputs(rng, jnp.float32, random_tree(rng, 2, 21), heads, 1, 16, 64, [50, 13]), jnp.float32)


def test_a_real_tree_with_padding_nodes():
    """Padding nodes see themselves alone."""
    logp = jnp.log(jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(4), (1, 3)), jnp.float32))
    tree = build_tree(TreeConfig(width=2, budget=40), jnp.asarray([1], jnp.int32),
                      jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), (1, 3, 2)), logp[..., :2])
    assert int(tree.size[0]) == tree.token.shape[1]
    mask = np.asarray(jax.jit(lambda: tree.ancestors)())
    mask = (mask[0][:, :, None] >> np.arange(32)) & 1
    mask = mask.reshape(mask.shape[0], -1)[None, :, :mask.shape[0]].astype(bool)
    compare(inputs(np.random.default_rng(1), jnp.float32, mask, 4, 2, 16, 64, [20]), jnp.float32)


def test_rows_that_see_nothing_are_zero():
    mask = np.zeros((1, 4, 4), bool)
    arguments = inputs(np.random.default_rng(0), jnp.float32, mask, 2, 1, 16, 32, [0])
    with jax.numpy_rank_promotion("allow"):
        assert not np.asarray(pallas.tree_attention(*arguments, interpret=True)).any()


@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize("cached", [0, 1, 31, 32, 100, 256])
def test_split_keys_are_combined(splits, cached):
    """Also where some splits have nothing to do, and in a cache filled to its last slot."""
    rng = np.random.default_rng(splits)
    config = TreeAttentionConfig(nodes=8, keys=16, splits=splits, warps=4, stages=2)
    compare(inputs(rng, jnp.float32, random_tree(rng, 2, 19), 4, 2, 16, 256, [cached, 77]), jnp.float32, config)


def test_slots_beyond_the_prefix_are_not_read():
    arguments = list(inputs(np.random.default_rng(0), jnp.float32, np.ones((1, 1, 1), bool), 2, 1, 16, 64, [16]))
    expected = reference.tree_attention(*arguments)
    config = TreeAttentionConfig(nodes=8, keys=16, splits=2, warps=4, stages=2)
    for side in (4, 5):
        arguments[side] = arguments[side].at[:, :, :, 16:].set(np.nan)
    with jax.numpy_rank_promotion("allow"):
        found = pallas.tree_attention(*arguments, config=config, interpret=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_heuristic_keeps_an_h100_busy():
    """Blocks launched for Qwen3-8B, batch 1: at least 100 for 132 multiprocessors, rows of 16 to 128."""
    for queries in (1, 16, 64, 128, 256):
        config = choose_config(1, queries, 32, 8, 128, 4096)
        blocks = 8 * -(-queries // config.nodes) * config.splits
        assert 100 <= blocks <= 132
        assert 16 <= config.nodes * 4 <= 128
    assert choose_config(16, 64, 32, 8, 128, 4096).splits == 1


@pytest.mark.parametrize(("width", "slots", "reason"), [(96, 64, "head dimension 96"), (64, 40, "40 cache slots")])
def test_shapes_that_are_not_taken(width, slots, reason):
    with pytest.raises(NotImplementedError, match=reason):
        choose_config(1, 4, 4, 2, width, slots)


def test_float64_is_not_taken():
    q = jnp.zeros((1, 1, 1, 16))
    with pytest.raises(NotImplementedError, match="float64"):
        pallas.tree_attention(q, q, q, causal_bits(1, 1), q[None], q[None], 0, jnp.zeros((1,), jnp.int32))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(("batch", "rows", "queries", "heads", "kv_heads", "width"), [
    (1, 1, 1, 4, 2, 16), (2, 24, 16, 6, 2, 32), (1, 5, 3, 9, 3, 64), (1, 64, 64, 4, 1, 128)])
def test_qk_norm_rope(batch, rows, queries, heads, kv_heads, width, norms, dtype):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) * 0.3, dtype)  # noqa: E731
    scales = (draw(width), draw(width)) if norms else (None, None)
    angle = jnp.asarray(rng.standard_normal((batch, rows, width // 2)), jnp.float32)
    arguments = (draw(batch, rows, (heads + 2 * kv_heads) * width), *scales, jnp.cos(angle), jnp.sin(angle), heads,
                 kv_heads, queries, 1e-6)
    found = qk_norm_rope.pallas.qk_norm_rope(*arguments, interpret=True)
    again = qk_norm_rope.pallas.qk_norm_rope(*arguments, interpret=True)
    expected = qk_norm_rope.reference.qk_norm_rope(*arguments)
    for a, b, c in zip(found, again, expected, strict=True):
        assert (a.dtype, a.shape) == (c.dtype, c.shape)
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(c, np.float32), atol=TOLERANCE[dtype])


def test_norm_and_rotation_by_hand():
    """One row, one head each, C = 2: norm to unit root-mean-square, scale, quarter turn."""
    projected = jnp.asarray([[[3.0, 4.0, 6.0, 8.0, 5.0, 7.0]]])
    quarter = (jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1)))
    q, k, v = qk_norm_rope.reference.qk_norm_rope(projected, jnp.asarray([1.0, 2.0]), jnp.asarray([1.0, 1.0]), *quarter,
                                                  1, 1, 1, 0.0)
    size = np.sqrt(12.5)
    np.testing.assert_allclose(q[0, 0, 0], [-8 / size, 3 / size])
    np.testing.assert_allclose(k[0, 0, 0], [-4 / size, 3 / size])
    np.testing.assert_allclose(v[0, 0, 0], [5, 7])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 5, 576), (3, 2, 48), (1, 3, 16384)])
def test_add_norm(shape, dtype):
    rng = np.random.default_rng(0)
    x, delta, scale = (jnp.asarray(rng.standard_normal(s) * 0.5, dtype) for s in (shape, shape, shape[-1:]))
    found = add_norm.pallas.add_norm(x, delta, scale, 1e-6, interpret=True)
    for a, b in zip(found, add_norm.reference.add_norm(x, delta, scale, 1e-6), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=TOLERANCE[dtype])


def test_add_norm_by_hand():
    total, normed = add_norm.reference.add_norm(jnp.asarray([[[1.0, 2.0]]]), jnp.asarray([[[2.0, 2.0]]]),
                                                jnp.asarray([1.0, 3.0]), 0.0)
    assert total.tolist() == [[[3.0, 4.0]]]
    np.testing.assert_allclose(normed[0, 0], [3 / np.sqrt(12.5), 12 / np.sqrt(12.5)])


@pytest.mark.parametrize(("kernel", "shape", "reason"), [
    (add_norm, (1, 1, 24), "width 24"), (qk_norm_rope, (1, 1, 36), "head dimension 12")])
def test_sizes_that_are_not_taken(kernel, shape, reason):
    x = jnp.zeros(shape, jnp.float32)
    half = jnp.zeros((1, 1, 6), jnp.float32)
    with pytest.raises(NotImplementedError, match=reason):
        if kernel is add_norm:
            add_norm.pallas.add_norm(x, x, x[0, 0], 1e-6)
        else:
            qk_norm_rope.pallas.qk_norm_rope(x, None, None, half, half, 1, 1, 1, 1e-6)


def expert_inputs(experts, count, size, width, dtype):
    """Inputs of `grouped_mlp` for the choices `experts` [N, A] of `count` experts."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) * 0.2, dtype)  # noqa: E731
    tokens, choices = np.shape(experts)
    wide = np.promote_types(dtype, np.float32)
    return (draw(tokens, size), jnp.asarray(experts, jnp.int32),
            jnp.asarray(rng.dirichlet(np.ones(choices), tokens), wide), draw(count, size, 2 * width),
            draw(count, width, size))


def random_choices(tokens, choices, count):
    return np.random.default_rng(0).permuted(np.tile(np.arange(count), (tokens, 1)), axis=1)[:, :choices]


def test_experts_by_loops():
    """The reference against one product after another; experts -1 and 4 are elsewhere and add nothing."""
    x, experts, weights, gate_up, down = expert_inputs([[3, 0], [1, -1], [0, 3], [4, 3]], 4, 6, 5, np.float64)
    expected = np.zeros((4, 6))
    for n, a in np.ndindex(4, 2):
        if 0 <= (e := int(experts[n, a])) < 4:
            gate, up = np.asarray(x[n]) @ gate_up[e, :, :5], np.asarray(x[n]) @ gate_up[e, :, 5:]
            expected[n] += weights[n, a] * ((gate / (1 + np.exp(-gate)) * up) @ down[e])
    np.testing.assert_allclose(grouped_matmul.reference.grouped_mlp(x, experts, weights, gate_up, down), expected,
                               atol=1e-12)


CHOICES = {
    # experts [N, A], count, D, F
    "one token": ([[6, 1]], 8, 32, 16),
    "fewer choices than experts, shared ones": ([[6, 1], [1, 2], [0, 6]], 8, 32, 16),
    "all rows to one expert, three tiles": (np.full((41, 1), 1), 3, 16, 32),
    "empty groups": (np.tile([[5, 2]], (5, 1)), 6, 64, 48),
    "experts elsewhere": (np.where(random_choices(9, 3, 7) < 4, random_choices(9, 3, 7), -1), 4, 32, 16),
    "more tokens than are looked through at a time": (random_choices(300, 2, 3), 3, 32, 16),
}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", list(CHOICES))
def test_grouped_mlp(name, dtype):
    arguments = expert_inputs(*CHOICES[name], dtype)
    kernel = jax.jit(lambda *arrays: grouped_matmul.pallas.grouped_mlp(*arrays, interpret=True))
    found, expected = kernel(*arguments), grouped_matmul.reference.grouped_mlp(*arguments)
    assert found.dtype == expected.dtype == jnp.float32
    np.testing.assert_array_equal(found, kernel(*arguments))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE[dtype])


def test_experts_that_nobody_chose_are_not_read():
    x, experts, weights, gate_up, down = expert_inputs([[6, 1], [1, 2]], 8, 16, 16, jnp.float32)
    unused = jnp.asarray([0, 3, 4, 5, 7])
    gate_up, down = gate_up.at[unused].set(np.nan), down.at[unused].set(np.nan)
    for out in (grouped_matmul.reference.grouped_mlp(x, experts, weights, gate_up, down),
                grouped_matmul.pallas.grouped_mlp(x, experts, weights, gate_up, down, interpret=True)):
        assert np.isfinite(out).all()


def test_expert_tiles_for_an_h100():
    """Qwen3-30B-A3B: one token keeps all multiprocessors busy; a mean expert of 256 tokens fits one tile."""
    for inner, width, parts in ((2048, 768, 2), (768, 2048, 1)):
        config = grouped_matmul.pallas.choose_config(1, 8, 128, inner, width, parts)
        assert 8 * width // config.columns >= 132
        assert grouped_matmul.pallas.choose_config(256, 8, 128, inner, width, parts).rows == 32


def test_router_by_hand():
    """Logits 1, 3, 3, 2 (of equal ones the lower id is first); weights of two from e^3 and e^3, of three with e^2."""
    x, matrix = jnp.ones((1, 16), jnp.float32), jnp.asarray([[1, 3, 3, 2], *[[0] * 4] * 15], jnp.float32)
    for kernel in (router.reference.router, partial(router.pallas.router, interpret=True)):
        experts, weights = kernel(x, matrix, 3, True)
        assert experts.tolist() == [[1, 2, 3]]
        total = 2 * np.exp(3) + np.exp(2)
        np.testing.assert_allclose(weights[0], [np.exp(3) / total, np.exp(3) / total, np.exp(2) / total], rtol=1e-6)
        np.testing.assert_allclose(kernel(x, matrix, 2, False)[1][0], np.exp(3) / (total + np.exp(1)), rtol=1e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("tokens", "size", "count", "choices", "normalised"), [
    (1, 48, 128, 8, True), (37, 64, 20, 3, False), (16, 128, 8, 2, True)])
def test_router(tokens, size, count, choices, normalised, dtype):
    rng = np.random.default_rng(0)
    x, matrix = (jnp.asarray(rng.standard_normal(shape) * 0.4, dtype) for shape in ((tokens, size), (size, count)))
    found = router.pallas.router(x, matrix, choices, normalised, interpret=True)
    expected = router.reference.router(x, matrix, choices, normalised)
    assert [(a.dtype, a.shape) for a in found] == [(a.dtype, a.shape) for a in expected]
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-5)


@pytest.mark.parametrize(("dtype", "size", "width", "count", "reason"), [
    (jnp.float64, 16, 16, 4, "float64"), (jnp.float32, 24, 16, 4, "24"), (jnp.float32, 16, 8, 4, "multiples of 16"),
    (jnp.float32, 16, 16, 300, "300 experts")])
def test_experts_that_are_not_taken(dtype, size, width, count, reason):
    x, experts, weights, gate_up, down = expert_inputs([[0]], count, size, width, dtype)
    with pytest.raises(NotImplementedError, match=reason):
        router.pallas.router(x, x.T @ jnp.ones((1, count), dtype), 1, True, interpret=True)
        grouped_matmul.pallas.grouped_mlp(x, experts, weights, gate_up, down, interpret=True)
