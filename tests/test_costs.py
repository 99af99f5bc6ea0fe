"""What forwards cost: read between the rows that were timed, kept for the next process, and decided by."""

from __future__ import annotations

import dataclasses
import errno
import json

import jax
import pytest

from jetspec_jax import JetSpecError, TreeConfig, costs, tiles
from jetspec_jax.autoregressive import autoregressive_shapes
from jetspec_jax.config import AutoregressiveHeadConfig
from jetspec_jax.costs import Costs, costs_of, fastest_layout, fastest_nodes
from jetspec_jax.generate import best_tree, default_tree, generate
from tests.models import random_pair, tiny_head, tiny_target
from tests.test_tiles import WHOLE

# Seconds by rows (1, 2, 4, 8, 16, 32, 64), cheap up to four: the target takes 1, 1, 1, 2, 4, 8, 16 and the head half.
LM_HEAD = (0.25, 0.25, 0.25, 0.5, 1.0, 2.0, 4.0)
LAYERS = (0.75, 0.75, 0.75, 1.5, 3.0, 6.0, 12.0)
COSTS = Costs(None, LM_HEAD, LAYERS, 1 / 3)


@pytest.fixture(scope="module")
def pair():
    target = tiny_target(**WHOLE)
    return random_pair(1, target, tiny_head(target, intermediate_size=64, head_dim=32, block_size=6))


def knowing(pair, *lengths, **changes):
    return dataclasses.replace(pair.head_config, accept_lengths=lengths, **changes)


def test_speeds(pair):
    """Worked out by hand: tokens over (draft of its slots, verification of its nodes)."""
    head = knowing(pair, 1.5, 2.1, 2.6, 3.0)
    assert COSTS.speeds(head) == pytest.approx(
        {1: 1, 2: 1.5 / 1.5, 4: 2.1 / 1.5, 8: 2.6 / 2.75, 16: 3.0 / 4.75})  # 6 slots lie between 4 and 8 rows: 0.75
    assert COSTS.speeds(dataclasses.replace(head, causal=False))[2] == pytest.approx(1.5 / 1.75)
    # Three sequences: rows 3, 6, 12, 24, 48; slots 6, 12, 18, 18.
    assert COSTS.speeds(head, 3) == pytest.approx(
        {1: 3, 2: 4.5 / (0.75 + 1.5), 4: 6.3 / (1.5 + 3), 8: 7.8 / (2.25 + 6), 16: 9 / (2.25 + 12)})
    assert set(COSTS.speeds(head, 9)) == {1, 2, 4}  # 72 rows were never timed
    assert COSTS.speeds(head, 80)[1] == pytest.approx(80 / 20)  # but plain decoding is always known
    assert COSTS.speeds(None) == COSTS.speeds(AutoregressiveHeadConfig.like(head)) == {1: 1}


def test_plain_decoding_unless_a_tree_wins_clearly():
    assert fastest_nodes({1: 1.0, 2: 1.02, 4: 1.04}) == 1
    assert fastest_nodes({1: 1.0, 2: 1.06, 4: 1.2, 8: 1.1}) == 4
    assert fastest_nodes({1: 1.0}) == 1


def test_the_layout_that_decodes_one_sequence_fastest(pair):
    def layout(tile, *layers):
        return Costs(tile, LM_HEAD, layers, 1 / 3)

    quick = tuple(0.8 * seconds for seconds in LAYERS)
    steep = (0.4, 3.0, 3.0, 3.0, 3.0, 9.0, 9.0)  # good at one row alone
    head = knowing(pair, 1.5, 2.1)
    assert fastest_layout((layout(None, *LAYERS), layout(64, *quick)), head) == 64
    assert fastest_layout((layout(None, *quick), layout(64, *steep)), head) is None
    assert fastest_layout((layout(None, *quick), layout(64, *steep)), None) == 64
    assert fastest_layout((layout(None, *quick), layout(64, *quick)), head) is None


def test_the_default_tree_is_the_fastest(pair, monkeypatch):
    monkeypatch.setattr(tiles, "LEAST_BYTES", 0)  # a large one
    head = knowing(pair, 1.5, 2.1, 2.6, 3.0)
    timed = dataclasses.replace(pair, head_config=head, costs=(Costs(64, LM_HEAD, LM_HEAD), COSTS))
    assert default_tree(timed) == best_tree(timed) == TreeConfig("best_first", 16, 4)
    assert default_tree(timed, 3) is None  # speeds 3, 2, 1.4, ...: no tree wins
    assert default_tree(timed, 65) is None  # no tree of so many was timed
    assert max(generate(timed, [3, 1, 4], max_new_tokens=9).tree_sizes) == 4


def test_what_does_not_decide(pair, monkeypatch):
    """Nothing was timed, the head knows nothing, the target is small, or this is no CPU."""
    four, published = TreeConfig("best_first", 16, 4), TreeConfig("accum_logp", 7, 64)
    assert default_tree(dataclasses.replace(pair, costs=(COSTS,))) == published
    monkeypatch.setattr(tiles, "LEAST_BYTES", 0)
    assert default_tree(pair) == default_tree(dataclasses.replace(pair, costs=(COSTS,))) == four
    known = dataclasses.replace(pair, costs=(COSTS,), head_config=knowing(pair, 1.2, 1.3))
    assert default_tree(known) is None
    assert best_tree(known) == TreeConfig("best_first", 16, 4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert default_tree(known) == published


def test_timed_once(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "ROWS", (1, 2, 5))
    monkeypatch.setattr(Costs, "plausible", lambda _: True)  # other tests run beside this one
    folder = tmp_path / "costs"

    def found():
        return costs_of(pair.target_config, pair.head_config, pair.params, folder)

    first = found()
    assert [entry.tile for entry in first] == [None, 64]
    assert all(len(part) == 3 and min(part) > 0 for entry in first for part in (entry.lm_head, entry.layers))
    (file,) = folder.glob("*.json")
    assert json.loads(file.read_text())["cores"] == costs.cores()
    timed = costs._time
    monkeypatch.setattr(costs, "_time", lambda *_: pytest.fail("timed again"))
    assert found() == first
    # Tiles of the pair itself, another head and none are no other target.
    tiled = tiles.to_tiles(pair.target_config, pair.params.target)[0]
    assert costs_of(tiled, knowing(pair, 1.5), pair.params, folder) == first
    alone = costs_of(pair.target_config, None, dataclasses.replace(pair.params, head={}), folder)
    assert [entry.head_share for entry in alone] == [0, 0]
    assert [entry.layers for entry in alone] == [entry.layers for entry in first]
    monkeypatch.setattr(costs, "_time", timed)
    monkeypatch.setattr(costs, "cores", lambda: 17)
    found()
    assert len(list(folder.glob("*.json"))) == 2


def test_the_head_takes_its_share(pair, tmp_path, monkeypatch):
    """By the numbers of its layers and what joins the tapped states, of the target's layers."""
    monkeypatch.setattr(costs, "_time", lambda *_: (COSTS, COSTS))

    def count(params):
        return sum(leaf.size for name, tree in params["params"].items() if name not in ("embedding", "lm_head")
                   for leaf in jax.tree.leaves(tree))

    share = costs_of(pair.target_config, pair.head_config, pair.params, tmp_path)[0].head_share
    assert share == pytest.approx(count(pair.params.head) / count(pair.params.target))


def test_nothing_to_choose_is_not_timed(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "_time", lambda *_: pytest.fail("timed"))
    wide = dataclasses.replace(pair.target_config, dtype="bfloat16")  # no tiles
    assert costs_of(wide, pair.head_config, pair.params, tmp_path) == ()
    assert costs_of(wide, None, pair.params, tmp_path) == ()


def test_a_disturbed_timing_is_not_kept(pair, tmp_path, monkeypatch):
    disturbed = Costs(None, LM_HEAD, (0.75, 3.0, 0.75, 1.5, 3.0, 6.0, 12.0))
    assert COSTS.plausible() and not disturbed.plausible()
    monkeypatch.setattr(costs, "_time", lambda *_: (disturbed, COSTS))
    found = costs_of(pair.target_config, None, pair.params, tmp_path)
    assert [entry.layers for entry in found] == [disturbed.layers, LAYERS]
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"costs": 3}', b'{"costs": [{}]}', *(
    b'{"costs": [{"tile": null, "lm_head": %b, "layers": [1.0, 2.0, 3.0]}]}' % part
    for part in (b"[1.0, -1.0, 2.0]", b"[1.0]", b'["a", 1.0, 2.0]', b"null"))])
def test_a_damaged_file_is_timed_anew(pair, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(costs, "ROWS", (1, 2, 5))
    odd = dataclasses.replace(pair.target_config, vocab_size=100)  # no tiles
    known = (Costs(None, (1.0, 2.0, 3.0), (2.0, 3.0, 4.0)),)
    monkeypatch.setattr(costs, "_time", lambda *_: known)
    params, head = random_pair(0, odd).params, knowing(pair, 1.5)
    params = dataclasses.replace(params, head={})
    assert costs_of(odd, head, params, tmp_path) == known
    (file,) = tmp_path.glob("*.json")
    sound = file.read_bytes()
    file.write_bytes(damage)
    assert costs_of(odd, head, params, tmp_path) == known
    assert file.read_bytes() == sound


def test_where_nothing_can_be_kept_it_is_timed_once(pair, tmp_path, monkeypatch):
    times = []
    monkeypatch.setattr(costs, "_time", lambda *_: times.append(1) or (COSTS, COSTS))
    (tmp_path / "file").write_text("no folder")

    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    assert len(costs_of(pair.target_config, None, pair.params, tmp_path / "file")) == 2
    monkeypatch.setattr(costs, "write_text", full)
    assert len(costs_of(pair.target_config, None, pair.params, tmp_path / "costs")) == 2
    assert times == [1, 1]


def test_lengths_that_no_head_can_have(pair):
    for lengths in ((0.9,), (2.1,), (1.5, 4.5), (1.9, 1.5), (float("nan"),), ("1",), (True,), (1.0,) * 7):
        with pytest.raises(JetSpecError, match="accept_lengths must be mean tokens a round by trees of 2, 4, 8"):
            knowing(pair, *lengths)
    assert autoregressive_shapes(AutoregressiveHeadConfig.like(knowing(pair, 1.5)))
