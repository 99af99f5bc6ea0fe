"""Weights in tiles: the same numbers, the same tokens, and where they are used."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jetspec_jax import JetSpecError, TreeConfig, checkpoint, load_pretrained, pretrained, tiles, with_head
from jetspec_jax.autoregressive import autoregressive_shapes
from jetspec_jax.config import AutoregressiveHeadConfig
from jetspec_jax.costs import ROWS, Costs
from jetspec_jax.draft import Params
from jetspec_jax.errors import DamagedError
from jetspec_jax.generate import generate
from jetspec_jax.pair import Pair
from jetspec_jax.sharding import make_mesh
from jetspec_jax.target import target_embed, target_logits, target_shapes
from jetspec_jax.tiles import MOST_ROWS, can_lie_in_tiles, columns, from_tiles, tiled_product, to_tiles
from jetspec_jax.training.initial import head_from_target
from tests.models import random_pair, random_params, tiny_head, tiny_target

WHOLE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 1,
         "head_dim": 32, "dtype": "float32"}  # all have a multiple of 64
SIZES = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24}  # all matrices have a multiple of 8 columns


@pytest.mark.parametrize("rows", [1, 7, MOST_ROWS, MOST_ROWS + 1, 150])
def test_product(rows):
    """Against NumPy, on both sides of the number of rows where the way changes."""
    random = np.random.default_rng(rows)
    x, w = random.normal(size=(2, rows, 12)), random.normal(size=(12, 40))
    stored = jnp.asarray(w.reshape(12, 5, 8).transpose(1, 0, 2))
    np.testing.assert_allclose(tiled_product(jnp.asarray(x), stored), x @ w, rtol=1e-12)
    at = random.integers(0, 40, (3, 2))
    np.testing.assert_array_equal(columns(stored, jnp.asarray(at)), w[:, at].transpose(1, 2, 0))


def in_tiles(pair: Pair) -> Pair:
    """A copy of the pair with its weights in tiles of 8 columns."""
    copied = jax.tree.map(jnp.copy, pair.params)
    target, target_params = to_tiles(pair.target_config, copied.target, tile=8)
    head, head_params = to_tiles(pair.head_config, copied.head, tile=8)
    return dataclasses.replace(pair, target_config=target, head_config=head, params=Params(target_params, head_params))


@pytest.mark.parametrize("options", [{"tie_embeddings": True}, {"qkv_bias": True, "out_bias": True},
                                     {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
                                      "dense_layers": (0,)}], ids=["tied", "untied", "experts"])
def test_the_same_model(options):
    """Trees, tokens and logits of the plain matrices; and the way back is exact."""
    target = tiny_target(**SIZES, **options)
    pair = random_pair(3, target, tiny_head(target))
    tiled = in_tiles(pair)
    assert tiled.target_config.weight_tile == tiled.head_config.weight_tile == 8
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7]]
    for tree in (TreeConfig("best_first", 4, 12), TreeConfig(budget=MOST_ROWS + 9)):
        one, other = (generate(p, prompts, max_new_tokens=20, tree=tree, eos_token_ids=()) for p in (pair, tiled))
        assert [(a.token_ids, a.accept_lengths) for a in one] == [(a.token_ids, a.accept_lengths) for a in other]
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 16)))
    ids, subset = jnp.asarray([[7, 23, 0]]), jnp.asarray([2, 23, 11])
    for function, argument in ((target_embed, ids), (target_logits, hidden),
                               (lambda *args: target_logits(*args, subset), hidden)):
        one, other = (function(p.target_config, p.params.target, argument) for p in (pair, tiled))
        np.testing.assert_allclose(one, other, rtol=1e-12)
    for config, params, plain in ((tiled.target_config, tiled.params.target, pair.params.target),
                                  (tiled.head_config, tiled.params.head, pair.params.head)):
        restored = from_tiles(config, params)
        assert restored[0].weight_tile is None
        jax.tree.map(np.testing.assert_array_equal, restored[1], plain)
    assert from_tiles(pair.target_config, pair.params.target)[1] is pair.params.target
    assert to_tiles(tiled.target_config, tiled.params.target, tile=4)[1] is tiled.params.target


def test_an_autoregressive_head_in_tiles():
    target = tiny_target(**SIZES)
    pair = random_pair(3, target)
    head = AutoregressiveHeadConfig.like(tiny_head(target, block_size=4))
    params = random_params(autoregressive_shapes(head), np.random.default_rng(0))
    pair = dataclasses.replace(pair, head_config=head, params=Params(pair.params.target, params))
    one, other = (generate(p, [3, 1, 4], max_new_tokens=12, tree=TreeConfig(width=2, budget=5))
                  for p in (pair, in_tiles(pair)))
    assert (one.token_ids, one.accept_lengths) == (other.token_ids, other.accept_lengths)


def test_shapes_are_told_in_tiles_too():
    tiled = dataclasses.replace(tiny_target(**SIZES), weight_tile=8)
    shapes = target_shapes(tiled)["params"]
    assert shapes["embedding"].shape == (24, 16)
    assert shapes["lm_head"].shape == (3, 16, 8)
    assert shapes["layers_0"]["mlp"]["gate_up_proj"]["kernel"].shape == (6, 16, 8)
    for sizes in ({"vocab_size": 25}, {"intermediate_size": 22}, {"hidden_size": 18}):
        with pytest.raises(JetSpecError, match=r"a matrix of \d+ columns cannot lie in tiles of 8"):
            target_shapes(dataclasses.replace(tiled, **sizes))


def test_a_checkpoint_holds_plain_matrices(tmp_path):
    target = tiny_target(**SIZES, dtype="float32")
    pair = random_pair(1, target, tiny_head(target))
    tiled = in_tiles(pair)
    with checkpoint.written_beside(tmp_path / "saved") as beside:
        checkpoint.save(beside, tiled.target_config, tiled.params.target, "a test")
    config, params = checkpoint.load(tmp_path / "saved")
    assert config == target
    jax.tree.map(np.testing.assert_array_equal, params, pair.params.target)
    description = (tmp_path / "saved" / "jetspec.json").read_text()
    assert "weight_tile" not in description
    # Nor does a description decide how weights lie in memory.
    (tmp_path / "saved" / "jetspec.json").write_text(description.replace('"config": {', '"config": {"weight_tile": 5,'))
    assert checkpoint.load_config(tmp_path / "saved") == target


@pytest.fixture
def kept(tmp_path):
    """A pair with its weights in tiles, and the folder in which each of its models is kept so."""
    target = tiny_target(**SIZES, dtype="float32")
    pair = in_tiles(random_pair(1, target, tiny_head(target)))
    for name, config, params in (("t", pair.target_config, pair.params.target),
                                 ("h", pair.head_config, pair.params.head)):
        with checkpoint.written_beside(tmp_path / name) as beside:
            checkpoint.save(beside, config, params, "a test", tiles=True)
    return pair, tmp_path


def test_a_checkpoint_can_hold_tiles(kept):
    pair, folder = kept
    for name, config, params, shares in (("t", pair.target_config, pair.params.target, 2),
                                         ("h", pair.head_config, pair.params.head, 1)):
        assert json.loads((folder / name / "jetspec.json").read_text())["version"] == 3  # unknown to earlier releases
        assert checkpoint.load_config(folder / name) == config
        found, loaded = checkpoint.load(folder / name, tiles=True)
        assert found == config
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
        plain, expected = from_tiles(config, params)
        with checkpoint.written_beside(folder / f"{name}-plain") as beside:
            checkpoint.save(beside, plain, expected, "a test", tiles=True)
        assert json.loads((folder / f"{name}-plain" / "jetspec.json").read_text())["version"] == 2
        found, loaded = checkpoint.load(folder / name)
        assert found == plain
        jax.tree.map(np.testing.assert_array_equal, loaded, expected)
        found, loaded = checkpoint.load(folder / name, mesh=make_mesh(shares))
        assert found == plain
        _, other = checkpoint.load(folder / f"{name}-plain", mesh=make_mesh(shares))
        jax.tree.map(np.testing.assert_array_equal, loaded, other)
        assert {leaf.sharding for leaf in jax.tree.leaves(loaded)} == {
            leaf.sharding for leaf in jax.tree.leaves(other)}


def test_loading_takes_kept_tiles_as_it_is_asked(kept):
    _, folder = kept
    for options, tile in (({}, None), ({"tiles": True}, 8), ({"tiles": False}, None), ({"mesh": make_mesh(1)}, None)):
        found = load_pretrained(folder / "t", folder / "h", **options)
        assert (found.target_config.weight_tile, found.head_config.weight_tile) == (tile, tile)
    assert load_pretrained(folder / "t", mesh=make_mesh(2)).target_config.weight_tile is None


@pytest.mark.parametrize(("value", "message"), [
    (None, "shape or dtype"), (0, "positive integer"), ("8", "positive integer"), (16, "."), (4, "shape or dtype")])
def test_tiles_of_another_size_are_refused(kept, value, message):
    file = kept[1] / "t" / "jetspec.json"
    description = json.loads(file.read_text())
    description["config"]["weight_tile"] = value
    file.write_text(json.dumps(description))
    with pytest.raises(DamagedError, match=message):
        checkpoint.load(kept[1] / "t")


def test_training_asks_for_plain_matrices():
    target = tiny_target(**SIZES)
    tiled = in_tiles(random_pair(1, target, tiny_head(target)))
    with pytest.raises(JetSpecError, match="tiles=False"):
        head_from_target(tiled.target_config, tiny_head(target), tiled.params.target, jax.random.key(0))


def test_what_can_lie_in_tiles():
    """float32, and every matrix in whole tiles."""
    config = tiny_target(**WHOLE)
    assert can_lie_in_tiles(config, target_shapes(config))
    assert can_lie_in_tiles(dataclasses.replace(config, tie_embeddings=True), target_shapes(config))
    for other in (config.with_dtype("float64"), dataclasses.replace(config, vocab_size=129),
                  dataclasses.replace(config, intermediate_size=48),
                  dataclasses.replace(config, product_dtype="bfloat16")):
        assert not can_lie_in_tiles(other, target_shapes(other)), other


@pytest.fixture
def folders(tmp_path):
    """A target and a head that can lie in tiles."""
    target = tiny_target(**WHOLE)
    pair = random_pair(1, target, tiny_head(target, intermediate_size=64, num_heads=2, head_dim=32))
    for name, config, params in (("t", target, pair.params.target), ("h", pair.head_config, pair.params.head)):
        with checkpoint.written_beside(tmp_path / name) as beside:
            checkpoint.save(beside, config, params, "a test")
    return tmp_path / "t", tmp_path / "h"


def test_loading_lays_out_what_timing_found(folders, monkeypatch):
    def loaded(**options):
        found = load_pretrained(*folders, **options)
        return found.target_config.weight_tile, found.head_config.weight_tile

    slow, fast = (tuple(seconds * (rows + 9) for rows in ROWS) for seconds in (2e-3, 1e-3))
    found = [Costs(None, slow, slow, 0.1), Costs(64, fast, fast, 0.1)]
    monkeypatch.setattr(pretrained, "costs_of", lambda *_: tuple(found))
    assert loaded() == (None, None)  # too small to matter
    assert loaded(tiles=True) == (64, 64)
    monkeypatch.setattr(tiles, "LEAST_BYTES", 0)
    assert loaded() == (64, 64)
    assert loaded(tiles=False) == (None, None)
    found[1] = Costs(64, slow, slow, 0.1)
    assert loaded() == (None, None)
    found.clear()  # nothing to choose
    assert loaded() == (None, None)
    with pytest.raises(JetSpecError, match="leave out tiles or mesh"):
        loaded(tiles=True, mesh=make_mesh(1))
    with pytest.raises(JetSpecError, match="tiles=False"):
        dataclasses.replace(tiny_target(**WHOLE), weight_tile=8, product_dtype="bfloat16")


def test_another_head_lies_as_the_target_does(folders):
    pair = load_pretrained(*folders, tiles=True)
    assert with_head(pair, folders[1]).head_config.weight_tile == 64
    assert with_head(load_pretrained(*folders), folders[1]).head_config.weight_tile is None


def test_a_matrix_that_no_tile_divides():
    target = tiny_target(**SIZES)
    with pytest.raises(JetSpecError, match=r"a matrix of \d+ columns cannot lie in tiles of 7"):
        to_tiles(target, random_pair(1, target).params.target, tile=7)
