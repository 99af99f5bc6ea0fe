"""What forwards cost: read between the rows that were timed, kept for the next process, and decided by."""

from __future__ import annotations

import dataclasses
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

# Seconds by rows (1, 2, 4, 8, 16, 32, 64): cheap up to four rows.
TARGET = (1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 16.0)
HEAD = (0.5, 0.5, 0.5, 0.6, 1.0, 2.0, 4.0)


@pytest.fixture(scope="module")
def pair():
    target = tiny_target(**WHOLE)
    return random_pair(1, target, tiny_head(target, intermediate_size=64, head_dim=32, block_size=6))


def knowing(pair, *lengths, **changes):
    return dataclasses.replace(pair.head_config, accept_lengths=lengths, **changes)


def test_speeds(pair):
    """Worked out by hand: tokens over (draft of its slots, verification of its nodes)."""
    head = knowing(pair, 1.5, 2.1, 2.6, 3.0)
    assert Costs(None, TARGET, HEAD).speeds(head) == pytest.approx(
        {1: 1, 2: 1.5 / 1.5, 4: 2.1 / 1.5, 8: 2.6 / 2.55, 16: 3.0 / 4.55})  # 6 slots lie between 4 and 8 rows: 0.55
    assert Costs(None, TARGET, HEAD).speeds(dataclasses.replace(head, causal=False))[2] == pytest.approx(1.5 / 1.55)
    # Three sequences: rows 3, 6, 12, 24, 48; slots 6, 12, 18, 18.
    assert Costs(None, TARGET, HEAD).speeds(head, 3) == pytest.approx(
        {1: 3, 2: 4.5 / (0.55 + 1.5), 4: 6.3 / (0.8 + 3), 8: 7.8 / (1.125 + 6), 16: 9 / (1.125 + 12)})
    assert set(Costs(None, TARGET, HEAD).speeds(head, 9)) == {1, 2, 4}  # 72 rows were never timed
    assert Costs(None, TARGET, HEAD).speeds(head, 80)[1] == pytest.approx(80 / 20)  # but plain decoding is always known
    assert Costs(None, TARGET, None).speeds(None) == {1: 1}
    assert Costs(None, TARGET, HEAD).speeds(AutoregressiveHeadConfig.like(head)) == {1: 1}


def test_plain_decoding_unless_a_tree_wins_clearly():
    assert fastest_nodes({1: 1.0, 2: 1.02, 4: 1.04}) == 1
    assert fastest_nodes({1: 1.0, 2: 1.06, 4: 1.2, 8: 1.1}) == 4
    assert fastest_nodes({1: 1.0}) == 1


def test_the_layout_that_decodes_one_sequence_fastest(pair):
    quick = tuple(0.8 * seconds for seconds in TARGET)
    steep = (0.7, 3.0, 3.0, 3.0, 3.0, 9.0, 9.0)  # good at one row alone
    head = knowing(pair, 1.5, 2.1)
    assert fastest_layout((Costs(None, TARGET, HEAD), Costs(64, quick, HEAD)), head) == 64
    assert fastest_layout((Costs(None, quick, HEAD), Costs(64, steep, HEAD)), head) is None
    assert fastest_layout((Costs(None, quick, HEAD), Costs(64, steep, HEAD)), None) == 64
    assert fastest_layout((Costs(None, quick, HEAD), Costs(64, quick, HEAD)), head) is None


def test_the_default_tree_is_the_fastest(pair, monkeypatch):
    monkeypatch.setattr(tiles, "LEAST_BYTES", 0)  # a large one
    head = knowing(pair, 1.5, 2.1, 2.6, 3.0)
    timed = dataclasses.replace(pair, head_config=head, costs=(Costs(64, HEAD, HEAD), Costs(None, TARGET, HEAD)))
    assert default_tree(timed) == best_tree(timed) == TreeConfig("best_first", 16, 4)
    assert default_tree(timed, 3) is None  # speeds 3, 2.2, 1.7, ...: no tree wins
    prompts = [[3, 1, 4]] * 3
    assert max(generate(timed, prompts[0], max_new_tokens=9).tree_sizes) == 4


def test_what_does_not_decide(pair, monkeypatch):
    """Nothing was timed, the head knows nothing, the target is small, or this is no CPU."""
    costs = (Costs(None, TARGET, HEAD),)
    four, published = TreeConfig("best_first", 16, 4), TreeConfig("accum_logp", 7, 64)
    assert default_tree(dataclasses.replace(pair, costs=costs)) == published
    monkeypatch.setattr(tiles, "LEAST_BYTES", 0)
    assert default_tree(pair) == default_tree(dataclasses.replace(pair, costs=costs)) == four
    known = dataclasses.replace(pair, costs=costs, head_config=knowing(pair, 1.2, 1.3))
    assert default_tree(known) is None
    assert best_tree(known) == TreeConfig("best_first", 16, 4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert default_tree(known) == published


def test_timed_once(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "ROWS", (1, 2, 5))
    folder = tmp_path / "costs"

    def found():
        return costs_of(pair.target_config, pair.head_config, pair.params, folder)

    first = found()
    assert [entry.tile for entry in first] == [None, 64]
    assert all(len(part) == 3 and min(part) > 0 for entry in first for part in (entry.target, entry.head))
    (file,) = folder.glob("*.json")
    assert json.loads(file.read_text())["cores"] == costs.cores()
    timed = costs._time
    monkeypatch.setattr(costs, "_time", lambda *_: pytest.fail("timed again"))
    assert found() == first
    # Tiles of the pair itself, and what its head accepts, are no other model.
    tiled = tiles.to_tiles(pair.target_config, pair.params.target)[0]
    assert costs_of(tiled, knowing(pair, 1.5), pair.params, folder) == first
    monkeypatch.setattr(costs, "_time", timed)
    monkeypatch.setattr(costs, "cores", lambda: 17)
    found()
    assert len(list(folder.glob("*.json"))) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"costs": 3}', b'{"costs": [{}]}',
                                    b'{"costs": [{"tile": null, "target": [1.0, -1.0, 2.0], "head": null}]}',
                                    b'{"costs": [{"tile": null, "target": [1.0], "head": null}]}',
                                    b'{"costs": [{"tile": null, "target": ["a", 1.0, 2.0], "head": null}]}'])
def test_a_damaged_file_is_timed_anew(pair, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(costs, "ROWS", (1, 2, 5))
    odd = dataclasses.replace(pair.target_config, vocab_size=100, dtype="float32")  # no tiles
    known = (Costs(None, (1.0, 2.0, 3.0), None),)
    monkeypatch.setattr(costs, "_time", lambda *_: known)
    shapes = random_pair(0, odd).params
    assert costs_of(odd, None, shapes, tmp_path) == known
    (file,) = tmp_path.glob("*.json")
    sound = file.read_bytes()
    file.write_bytes(damage)
    assert costs_of(odd, None, shapes, tmp_path) == known
    assert file.read_bytes() == sound


def test_a_folder_that_cannot_be_written(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(costs, "_time", lambda *_: "timed")
    (tmp_path / "costs").write_text("no folder")
    assert costs_of(pair.target_config, None, pair.params, tmp_path / "costs") == "timed"


def test_lengths_that_no_head_can_have(pair):
    for lengths in ((0.9,), (2.1,), (1.5, 4.5), (float("nan"),), ("1",), (True,), (1.0,) * 7):
        with pytest.raises(JetSpecError, match="accept_lengths must be mean tokens a round by trees of 2, 4, 8"):
            knowing(pair, *lengths)
    assert autoregressive_shapes(AutoregressiveHeadConfig.like(knowing(pair, 1.5)))
