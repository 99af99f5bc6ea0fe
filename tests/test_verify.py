"""Acceptance against a walk from the root, one node at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from jetspec_jax.config import TreeConfig
from jetspec_jax.tree import build_tree, root_only
from jetspec_jax.verify import accept


def walk(tree, row, verdict):
    """Follows the target's choice while a child carries it."""
    at, path, tokens = 0, [0], [int(verdict[0])]
    while True:
        children = [n for n in range(int(tree.size[row])) if int(tree.parent[row, n]) == at
                    and int(tree.token[row, n]) == int(verdict[at])]
        if not children:
            return path, tokens
        at = children[0]
        path.append(at)
        tokens.append(int(verdict[at]))


@pytest.mark.parametrize("builder", ["accum_logp", "best_first", "chain"])
@pytest.mark.parametrize(("width", "budget"), [(4, 40), (2, 100), (1, 64), (3, 33)])
def test_equals_a_walk(builder, width, budget):
    rng = np.random.default_rng(budget)
    batch, depths = 16, 5
    tokens = np.stack([rng.permutation(6)[:width] for _ in range(batch * depths)]).reshape(batch, depths, width)
    logp = np.sort(np.log(rng.dirichlet(np.ones(width), (batch, depths))))[..., ::-1].copy()
    tree = build_tree(TreeConfig(builder, width, budget), jnp.zeros((batch,), jnp.int32), tokens.astype(np.int32), logp)
    verdict = rng.integers(0, 6, tree.token.shape).astype(np.int32)
    # Make agreement likely: most nodes' verdict is the token of one of their children.
    for b in range(batch):
        for n in range(1, int(tree.size[b])):
            if rng.random() < 0.6:
                verdict[b, int(tree.parent[b, n])] = int(tree.token[b, n])
    path = accept(tree, jnp.asarray(verdict), depths + 1)
    lengths = set()
    for b in range(batch):
        nodes, new = walk(tree, b, verdict[b])
        assert int(path.count[b]) == len(nodes)
        assert path.nodes[b, :len(nodes)].tolist() == nodes
        assert path.tokens[b, :len(nodes)].tolist() == new
        lengths.add(len(nodes))
    assert len(lengths) > 1  # the cases tell something


def test_padding_is_never_accepted():
    """Padding nodes carry token 0 at depth 0; a verdict of 0 must not lead to them."""
    tree = build_tree(TreeConfig("accum_logp", 1, 64), jnp.asarray([0], jnp.int32), jnp.ones((1, 2, 1), jnp.int32),
                      jnp.zeros((1, 2, 1)))
    path = accept(tree, jnp.zeros(tree.token.shape, jnp.int32), 3)
    assert path.count.tolist() == [1]
    assert path.nodes[0, 0] == 0


def test_a_lone_root_yields_the_free_token():
    path = accept(root_only(jnp.asarray([5, 6], jnp.int32)), jnp.asarray([[7], [8]], jnp.int32), 1)
    assert path.count.tolist() == [1, 1]
    assert path.tokens.tolist() == [[7], [8]]
