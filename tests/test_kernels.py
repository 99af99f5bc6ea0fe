"""Every kernel and backend against its reference, interpreted on the CPU."""

from __future__ import annotations

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jetspec_jax import TreeConfig
from jetspec_jax.attention import causal_bits, pack_bits
from jetspec_jax.tree import build_tree
from pallas_kernels import add_norm, gated_product, qk_norm_rope, top_w, tree_build
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


@pytest.fixture(params=["pallas", "triton"])
def attention(request):
    """The GPU kernel of each lowering, interpreted."""
    if request.param == "pallas":
        kernel = pallas.tree_attention
    else:
        pytest.importorskip("torch")
        pytest.importorskip("triton", minversion="3.7")  # older interpreters do not work with today's NumPy
        kernel = importlib.import_module("pallas_kernels.tree_attention.triton").tree_attention

    def interpreted(*arguments, config=None):
        with jax.numpy_rank_promotion("allow"):
            return kernel(*arguments, config=config, interpret=True)

    return interpreted


def compare(attention, arguments, dtype, config=None):
    found, again = (attention(*arguments, config=config) for _ in range(2))
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
def test_tree_attention(attention, name, dtype):
    mask, *rest = CASES[name]
    compare(attention, inputs(np.random.default_rng(0), dtype, mask, *rest), dtype)


@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_random_trees_of_every_group(attention, heads):
    rng = np.random.default_rng(heads)
    compare(attention, inputs(rng, jnp.float32, random_tree(rng, 2, 21), heads, 1, 16, 64, [50, 13]), jnp.float32)


def test_a_real_tree_with_padding_nodes(attention):
    """Padding nodes see themselves alone."""
    logp = jnp.log(jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(4), (1, 3)), jnp.float32))
    tree = build_tree(TreeConfig(width=2, budget=40), jnp.asarray([1], jnp.int32),
                      jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), (1, 3, 2)), logp[..., :2])
    assert int(tree.size[0]) == tree.token.shape[1]
    mask = np.asarray(jax.jit(lambda: tree.ancestors)())
    mask = (mask[0][:, :, None] >> np.arange(32)) & 1
    mask = mask.reshape(mask.shape[0], -1)[None, :, :mask.shape[0]].astype(bool)
    compare(attention, inputs(np.random.default_rng(1), jnp.float32, mask, 4, 2, 16, 64, [20]), jnp.float32)


def test_rows_that_see_nothing_are_zero(attention):
    mask = np.zeros((1, 4, 4), bool)
    arguments = inputs(np.random.default_rng(0), jnp.float32, mask, 2, 1, 16, 32, [0])
    assert not np.asarray(attention(*arguments)).any()


@pytest.mark.parametrize("splits", [2, 4, 8])
def test_split_keys_are_combined(attention, splits):
    """Also where some splits have nothing to do, and in a cache filled to its last slot."""
    rng = np.random.default_rng(splits)
    config = TreeAttentionConfig(nodes=8, keys=16, splits=splits, warps=4, stages=2)
    cached = [0, 1, 31, 32, 100, 256]
    compare(attention, inputs(rng, jnp.float32, random_tree(rng, 6, 19), 2, 1, 16, 256, cached), jnp.float32, config)


@pytest.mark.parametrize("heads", [1, 4, 16])
def test_split_keys_of_a_lone_query(attention, heads):
    config = TreeAttentionConfig(nodes=max(1, 16 // heads), keys=16, splits=4, warps=4, stages=2)
    rng = np.random.default_rng(0)
    ones = np.ones((2, 1, 1), bool)
    compare(attention, inputs(rng, jnp.float32, ones, heads, 1, 16, 64, [40, 3]), jnp.float32, config)


@pytest.mark.parametrize("cached", [16, 21])
def test_slots_beyond_the_prefix_are_not_read(attention, cached, request):
    """Triton's loads are masked; Pallas's take the whole block that the prefix ends in."""
    arguments = list(inputs(np.random.default_rng(0), jnp.float32, np.ones((1, 1, 1), bool), 2, 1, 16, 64, [cached]))
    expected = reference.tree_attention(*arguments)
    config = TreeAttentionConfig(nodes=8, keys=16, splits=2, warps=4, stages=2)
    unread = cached if "triton" in request.node.callspec.id else -(-cached // 16) * 16
    for side in (4, 5):
        arguments[side] = arguments[side].at[:, :, :, unread:].set(np.nan)
    np.testing.assert_allclose(attention(*arguments, config=config), expected, atol=1e-5)


def test_the_heuristic_keeps_an_h100_busy():
    """Blocks launched for Qwen3-8B, batch 1, on 132 multiprocessors: one each, or two of 64 lines."""
    for queries in (1, 16, 64, 128, 256):
        config = choose_config(1, queries, 32, 8, 128, 4096)
        blocks = 8 * -(-queries // config.nodes) * config.splits
        lines = config.nodes * 4
        assert (200 <= blocks <= 264 and lines == 64) if queries == 256 else 100 <= blocks <= 132
        assert 16 <= lines <= 128
    assert choose_config(16, 64, 32, 8, 128, 4096).splits == 1


def test_float32_keeps_few_numbers_in_registers():
    """Queries of a block, at most 2048 of them or 16 lines (the least of a product), and 32 keys at a time.

    Of wide heads none are loaded in advance. (tests/test_kernel_limits.py asks the compiler.)
    """
    for width, lines, stages in ((64, 32, 2), (128, 16, 1), (256, 16, 1)):
        config = choose_config(1, 256, 8, 8, width, 4096, itemsize=4)
        assert (config.nodes, config.keys, config.warps, config.stages) == (lines, 32, 8, stages)


@pytest.mark.parametrize(("width", "slots", "reason"), [(96, 64, "head dimension 96"), (64, 40, "40 cache slots")])
def test_shapes_that_are_not_taken(width, slots, reason):
    with pytest.raises(NotImplementedError, match=reason):
        choose_config(1, 4, 4, 2, width, slots)


def test_float64_is_not_taken(attention):
    q = jnp.zeros((1, 1, 1, 16))
    with pytest.raises(NotImplementedError, match="float64"):
        attention(q, q, q, causal_bits(1, 1), q[None], q[None], 0, jnp.zeros((1,), jnp.int32))


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
    before = jnp.asarray(rng.standard_normal((shape[0], 3, shape[2])), dtype)
    for rows in ((x, delta, scale), (x, delta, scale, before)):
        found = add_norm.pallas.add_norm(*rows, eps=1e-6, interpret=True)
        for a, b in zip(found, add_norm.reference.add_norm(*rows, eps=1e-6), strict=True):
            assert (a.dtype, a.shape) == (dtype, b.shape)
            np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=TOLERANCE[dtype])


def test_add_norm_by_hand():
    total, normed = add_norm.reference.add_norm(jnp.asarray([[[1.0, 2.0]]]), jnp.asarray([[[2.0, 2.0]]]),
                                                jnp.asarray([1.0, 3.0]), jnp.asarray([[[7.0, 8.0]]]), eps=0.0)
    assert normed[0, 0].tolist() == [7.0, 8.0]
    assert total.tolist() == [[[3.0, 4.0]]]
    np.testing.assert_allclose(normed[0, 1], [3 / np.sqrt(12.5), 12 / np.sqrt(12.5)])


@pytest.mark.parametrize(("kernel", "shape", "reason"), [
    (add_norm, (1, 1, 24), "width 24"), (qk_norm_rope, (1, 1, 36), "head dimension 12")])
def test_sizes_that_are_not_taken(kernel, shape, reason):
    x = jnp.zeros(shape, jnp.float32)
    half = jnp.zeros((1, 1, 6), jnp.float32)
    with pytest.raises(NotImplementedError, match=reason):
        if kernel is add_norm:
            add_norm.pallas.add_norm(x, x, x[0, 0], eps=1e-6)
        else:
            qk_norm_rope.pallas.qk_norm_rope(x, None, None, half, half, 1, 1, 1, 1e-6)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("batch", "rows", "size", "features"), [
    (1, 1, 32, 16), (2, 5, 48, 96), (1, 64, 128, 192), (3, 100, 16, 32)])
def test_gated_product(batch, rows, size, features, dtype):
    """The last case has more rows than the kernel takes."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, rows, size)), dtype)
    weight = jnp.asarray(rng.standard_normal((size, 2 * features)) / np.sqrt(4 * size), dtype)
    found = gated_product.pallas.gated_product(x, weight, interpret=True)
    again = gated_product.pallas.gated_product(x, weight, interpret=True)
    expected = gated_product.reference.gated_product(x, weight)
    assert (found.dtype, found.shape) == (dtype, (batch, rows, features))
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(again, np.float32))
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(expected, np.float32), atol=TOLERANCE[dtype])


def test_gated_product_by_hand():
    """x = 2: gate 1 and -1 times x, up 3 and 5 times x."""
    found = gated_product.reference.gated_product(jnp.asarray([[[2.0]]]), jnp.asarray([[1.0, -1.0, 3.0, 5.0]]))
    np.testing.assert_allclose(found[0, 0], [2 / (1 + np.exp(-2)) * 6, -2 / (1 + np.exp(2)) * 10])


def test_gated_product_fills_an_h100():
    """Columns of F per block: for Qwen3's widths one or few waves over 132 multiprocessors."""
    pieces = {features: gated_product.pallas.choose_pieces(features) for features in (3072, 6144, 12288, 25600)}
    assert pieces[12288] == (64, 32)  # 128 blocks
    for features, chosen in pieces.items():
        waves = features / sum(chosen) / 132
        assert waves / np.ceil(waves) > 0.7


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("batch", "rows", "skip", "vocabulary", "width"), [
    (1, 16, 1, 300, 7), (2, 3, 0, 23, 16), (1, 2, 0, 10000, 5), (1, 2, 1, 4096, 1), (1, 1, 0, 4097, 4)])
def test_top_w(batch, rows, skip, vocabulary, width, tied):
    """Also a last piece with fewer logits than W, and equal logits within a piece and across pieces."""
    rng = np.random.default_rng(0)
    logits = rng.integers(-3, 3, (batch, rows, vocabulary)) if tied else rng.standard_normal((batch, rows, vocabulary))
    logits = jnp.asarray(logits, jnp.float32)
    tokens, logp = top_w.pallas.top_w(logits, width, skip, interpret=True)
    again = top_w.pallas.top_w(logits, width, skip, interpret=True)
    expected = top_w.reference.top_w(logits, width, skip)
    assert tokens.dtype == jnp.int32
    assert tokens.shape == logp.shape == (batch, rows - skip, width)
    np.testing.assert_array_equal(tokens, expected[0])
    np.testing.assert_allclose(logp, expected[1], atol=1e-5)
    np.testing.assert_array_equal(logp, again[1])


def test_top_w_by_hand():
    tokens, logp = top_w.reference.top_w(jnp.log(jnp.asarray([[[1.0, 1.0, 1.0], [0.1, 0.6, 0.3]]])), 2, 1)
    assert tokens.tolist() == [[[1, 2]]]
    np.testing.assert_allclose(logp, np.log([[[0.6, 0.3]]]))


def test_top_w_of_which_one_row_is_used_does_not_sort():
    """XLA on the CPU would cut off the other rows first, and then sort all of the vocabulary."""
    def first_row(logits):
        return [x[:, :1] for x in top_w.reference.top_w(logits, 7, 1)]

    program = jax.jit(first_row).lower(jax.ShapeDtypeStruct((1, 16, 4096), jnp.float32)).compile().as_text()
    assert "TopK" in program
    assert " sort(" not in program


def random_draft(rng, batch, depths, width, tied):
    """Tokens and log-probabilities [B, G-1, W], most likely first; ties within and across depths where wanted."""
    logp = rng.integers(-3, 1, (batch, depths, width)) * 0.5 if tied \
        else np.log(rng.dirichlet(np.ones(width + 3), (batch, depths))[..., :width])
    tokens = np.stack([rng.permuted(np.arange(width + 5))[:width] for _ in range(batch * depths)])
    return (jnp.asarray(rng.integers(0, 99, batch), jnp.int32),
            jnp.asarray(tokens.reshape(batch, depths, width), jnp.int32),
            jnp.asarray(np.sort(logp)[..., ::-1].copy(), jnp.float32))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("best_first", [False, True])
@pytest.mark.parametrize(("depths", "width", "nodes"), [
    (15, 7, 256), (7, 4, 16), (5, 16, 33), (15, 1, 16), (1, 5, 6), (4, 3, 1), (4, 3, 2), (2, 3, 13)])
def test_tree_build(depths, width, nodes, best_first, tied):
    """A chain (width 1), a star (one depth), N = 1, budgets that are no multiple of W, whole trees; three sequences."""
    arguments = random_draft(np.random.default_rng(nodes), 3, depths, width, tied)
    size = {"nodes": nodes, "best_first": best_first}
    build = jax.jit(partial(tree_build.pallas.tree_build, interpret=True, **size))
    for found, again, expected in zip(build(*arguments), build(*arguments),
                                      tree_build.reference.tree_build(*arguments, **size), strict=True):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(found, again)


def test_trees_of_impossible_tokens():
    """Log-probabilities of minus infinity still order and add."""
    anchor, tokens, logp = random_draft(np.random.default_rng(0), 1, 3, 4, tied=False)
    logp = logp.at[:, 1:].set(-jnp.inf)
    for best_first in (False, True):
        size = {"nodes": 20, "best_first": best_first}
        found = tree_build.pallas.tree_build(anchor, tokens, logp, **size, interpret=True)
        for a, b in zip(found, tree_build.reference.tree_build(anchor, tokens, logp, **size), strict=True):
            np.testing.assert_array_equal(a, b)
        assert int(found[-1][0]) == 20


@pytest.mark.parametrize("kernel", ["tree_build", "top_w", "gated_product"])
def test_kernels_that_do_not_take_float64(kernel):
    x = jnp.zeros((1, 2, 16))
    with pytest.raises(NotImplementedError, match="float64"):
        if kernel == "tree_build":
            tree_build.pallas.tree_build(x[0, :1, 0].astype(jnp.int32), x.astype(jnp.int32), x, 8, False)
        elif kernel == "top_w":
            top_w.pallas.top_w(x, 2)
        else:
            gated_product.pallas.gated_product(x, x[0].T)
