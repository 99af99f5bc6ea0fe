"""Tree builders against the recorded trees, a heap in plain Python, and enumeration."""

import heapq
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jetspec_jax.attention import unpack_bits
from jetspec_jax.config import TreeConfig
from jetspec_jax.tree import build_tree, tree_capacity
from tests.models import DATA


def heap_accum_logp(tokens, logp, anchor, budget):
    """The published algorithm: pop the best, add its children at once; earlier insertion wins a tie."""
    depths, width = logp.shape
    nodes = [(anchor, -1, 0, 0.0)]
    heap = [(-0.0, 0)]
    while heap and len(nodes) < budget:
        _, best = heapq.heappop(heap)
        _, _, depth, score = nodes[best]
        if depth == depths:
            continue
        for w in range(min(width, budget - len(nodes))):
            child = score + logp[depth, w]
            nodes.append((tokens[depth, w], best, depth + 1, child))
            heapq.heappush(heap, (-child, len(nodes) - 1))
    return nodes


def assert_tree(tree, row, nodes):
    """Node for node, ancestors by walking to the root, padding inert."""
    size = len(nodes)
    assert int(tree.size[row]) == size
    for field, index in (("token", 0), ("parent", 1), ("depth", 2)):
        assert getattr(tree, field)[row, :size].tolist() == [int(node[index]) for node in nodes]
    np.testing.assert_allclose(tree.score[row, :size], [node[3] for node in nodes], rtol=1e-12)
    bits = np.asarray(unpack_bits(tree.ancestors, tree.token.shape[1]))[row]
    for n in range(tree.token.shape[1]):
        path, at = {n}, n
        while n < size and nodes[at][1] >= 0:
            at = nodes[at][1]
            path.add(at)
        assert set(np.flatnonzero(bits[n]).tolist()) == path
    assert not np.asarray(tree.depth[row, size:]).any()
    assert (np.asarray(tree.parent[row, size:]) == -1).all()


def random_draft(seed, batch, depths, width, tied):
    rng = np.random.default_rng(seed)
    logp = np.sort(rng.integers(-3, 1, (batch, depths, width)) * 0.5 if tied
                   else np.log(rng.dirichlet(np.ones(width + 3), (batch, depths))[..., :width]))[..., ::-1].copy()
    tokens = np.stack([rng.permuted(np.arange(width + 5))[:width] for _ in range(batch * depths)])
    return tokens.reshape(batch, depths, width).astype(np.int32), logp


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("depths", "width", "budget"), [
    (7, 4, 16), (7, 7, 64), (15, 7, 256), (3, 1, 64), (1, 5, 64), (2, 3, 100), (5, 16, 33), (4, 3, 1), (4, 3, 2)])
def test_accum_logp_equals_a_heap(depths, width, budget, tied):
    tokens, logp = random_draft(depths * budget, 3, depths, width, tied)
    anchor = np.asarray([3, 1, 2], np.int32)
    tree = jax.jit(build_tree, static_argnums=0)(TreeConfig("accum_logp", width, budget), anchor, tokens, logp)
    for row in range(3):
        assert_tree(tree, row, heap_accum_logp(tokens[row], logp[row], anchor[row], budget))


@pytest.mark.parametrize(("depths", "width", "budget"), [(4, 3, 20), (3, 2, 64), (6, 2, 40), (2, 7, 1), (3, 1, 9)])
def test_best_first_is_the_set_of_best_prefixes(depths, width, budget):
    tokens, logp = random_draft(7, 2, depths, width, tied=False)
    tree = build_tree(TreeConfig("best_first", width, budget), np.asarray([3, 1], np.int32), tokens, logp)
    for row in range(2):
        prefixes = [(sum(logp[row, d, w] for d, w in enumerate(path)), path)
                    for depth in range(depths + 1) for path in itertools.product(range(width), repeat=depth)]
        best = sorted(prefixes, key=lambda p: -p[0])[:budget]
        nodes, index = [], {}
        for score, path in best:
            index[path] = len(nodes)
            nodes.append(([3, 1][row] if not path else tokens[row, len(path) - 1, path[-1]],
                          index[path[:-1]] if path else -1, len(path), score))
        assert_tree(tree, row, nodes)


def test_best_first_stays_closed_under_parents_when_all_scores_tie():
    tokens = np.broadcast_to(np.arange(3, dtype=np.int32), (1, 4, 3))
    tree = build_tree(TreeConfig("best_first", 3, 30), np.asarray([9], np.int32), tokens, np.zeros((1, 4, 3)))
    parent = np.asarray(tree.parent[0])
    assert int(tree.size[0]) == 30
    assert (parent[1:] < np.arange(1, 30)).all()
    assert (np.asarray(tree.depth[0])[1:] == np.asarray(tree.depth[0])[parent[1:]] + 1).all()
    edges = list(zip(parent[1:].tolist(), np.asarray(tree.token[0])[1:].tolist(), strict=True))
    assert len(set(edges)) == len(edges)  # siblings carry different tokens


def test_chain_is_the_argmax_of_each_depth():
    tokens, logp = random_draft(0, 1, 5, 3, tied=False)
    tree = build_tree(TreeConfig("chain", 3, 4), np.asarray([8], np.int32), tokens, logp)
    first = tokens[0, :3, 0]
    assert_tree(tree, 0, [(8, -1, 0, 0.0), *((first[d], d, d + 1, logp[0, :d + 1, 0].sum()) for d in range(3))])


def test_a_tree_written_out():
    """Root 9; depth 1: 4 (-.1) or 5 (-2.); depth 2: 6 (-.2) or 7 (-1.)."""
    tokens = np.asarray([[[4, 5], [6, 7]]], np.int32)
    logp = np.asarray([[[-0.1, -2.0], [-0.2, -1.0]]])
    tree = build_tree(TreeConfig("accum_logp", 2, 6), np.asarray([9], np.int32), tokens, logp)
    assert tree.token.tolist() == [[9, 4, 5, 6, 7, 6]]
    assert tree.parent.tolist() == [[-1, 0, 0, 1, 1, 2]]
    assert tree.ancestors[0, :, 0].tolist() == [0b1, 0b11, 0b101, 0b1011, 0b10011, 0b100101]


def test_impossible_tokens_still_order():
    logp = np.asarray([[[0.0, -np.inf, -np.inf], [0.0, -np.inf, -np.inf]]])
    tokens = np.broadcast_to(np.arange(3, dtype=np.int32), (1, 2, 3))
    for builder in ("accum_logp", "best_first"):
        tree = build_tree(TreeConfig(builder, 3, 13), np.asarray([9], np.int32), tokens, logp)
        assert int(tree.size[0]) == 13
        assert np.isfinite(np.asarray(tree.score)).all()


@pytest.mark.parametrize(("config", "depths", "nodes"), [
    (TreeConfig("accum_logp", 7, 64), 15, 64), (TreeConfig("accum_logp", 2, 64), 3, 15),
    (TreeConfig("best_first", 1, 64), 15, 16), (TreeConfig("chain", 7, 64), 7, 8), (TreeConfig("chain", 7, 3), 7, 3)])
def test_capacity(config, depths, nodes):
    assert tree_capacity(config, depths) == nodes


@pytest.mark.parametrize("name", ["dense", "tied_bidirectional"])
def test_recorded_trees(name):
    activations = load_file(DATA / name / "activations.safetensors")
    for case in json.loads((DATA / name / "expected.json").read_text())["cases"]:
        logits = jnp.asarray(activations[f"{case['case']}.draft_logits"])[None]
        for expected in case["trees"]:
            top, tokens = jax.lax.top_k(logits, expected["width"])
            logp = top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
            tree = build_tree(TreeConfig("accum_logp", expected["width"], expected["budget"]),
                              jnp.asarray([expected["token_ids"][0]], jnp.int32), tokens.astype(jnp.int32), logp)
            assert tree.token[0].tolist() == expected["token_ids"]
            assert tree.parent[0].tolist() == expected["parents"]
            assert tree.depth[0].tolist() == expected["depth"]
            np.testing.assert_allclose(tree.score[0], expected["cum_logprob"], atol=1e-5)
