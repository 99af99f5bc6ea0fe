"""The paper's analyses: the faithfulness gap against a forward per branch, and the plot of finished runs."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import paper
from jetspec_jax import JetSpecError, SamplingParams
from jetspec_jax.attention import causal_bits
from jetspec_jax.cache import KVCache
from jetspec_jax.target import target_forward, target_logits
from jetspec_jax.training.batches import Batches
from jetspec_jax.training.config import TrainConfig
from jetspec_jax.training.dataset import Dataset, DatasetInfo, DatasetWriter
from jetspec_jax.training.loss import block_slots
from jetspec_jax.training.record import record_answers
from tests.models import random_pair, tiny_head, tiny_target

LAYERS = (0, 1)


def test_the_gap_of_a_branch(tmp_path):
    """log q - log p of packed anchors equals what a forward over each text of its own says."""
    target = tiny_target(dtype="float32")
    pair = random_pair(0, target, tiny_head(target, num_layers=1))
    writer = DatasetWriter(tmp_path / "d", DatasetInfo("tiny", LAYERS, 16, 23, {}))
    writer.add(list(record_answers(pair, [[3, 1, 4], [5, 9]], LAYERS, max_new_tokens=14, batch_size=2,
                                   sampling=SamplingParams(), seed=0)))
    dataset = Dataset([tmp_path / "d"])
    batch = Batches(dataset, TrainConfig(steps=1, row_tokens=40, anchors=6)).assemble(
        [[0, 1]], np.random.default_rng(0))
    head, params = pair.head_config, pair.params
    gaps = np.asarray(paper.branch_gaps(target, head, LAYERS, params.head, params.target, batch))

    slots = block_slots(target, head, params.target, params.head, batch, LAYERS, head.block_size)
    log_q = np.asarray(jax.nn.log_softmax(target_logits(target, params.target, slots.hidden[0])))  # [A, G-1, V]
    checked = 0
    for a, (anchor, real) in enumerate(zip(batch.anchor[0], np.asarray(slots.real[0]), strict=True)):
        if not real[-1]:
            assert np.isnan(gaps[a])
            continue
        chain = log_q[a].argmax(-1)
        start = anchor - batch.position[0, anchor]
        text = [*batch.tokens[0, start:anchor + 1], *chain]
        n = len(text)
        out = target_forward(target, params.target, jnp.asarray([text], jnp.int32),
                             jnp.arange(n, dtype=jnp.int32)[None], causal_bits(1, n), KVCache.create(target, 1, 1),
                             jnp.zeros((1,), jnp.int32))
        log_p = np.asarray(jax.nn.log_softmax(target_logits(target, params.target, out.hidden)[0]))
        places = np.arange(n - len(chain) - 1, n - 1)
        expected = log_q[a].max(-1).sum() - log_p[places, chain].sum()
        np.testing.assert_allclose(gaps[a], expected, atol=1e-4)
        checked += 1
    assert checked >= 2


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["paper.py", *map(str, arguments)])
    paper.main()


def recorded(folder, pair, prompts, tokens, **recipe):
    """A dataset of these prompts in this order."""
    writer = DatasetWriter(folder, DatasetInfo("tiny", LAYERS, 16, 23, recipe))
    writer.add(list(record_answers(pair, prompts, LAYERS, max_new_tokens=tokens, batch_size=4,
                                   sampling=SamplingParams(), seed=0)))
    return folder


def test_trainings_that_are_compared(tmp_path, monkeypatch):
    """gamma, subset and foreign on a tiny pair: one row per training, all on the same held-out answers."""
    target = tiny_target(dtype="float32", qk_norm=False)
    shape = tiny_head(target, intermediate_size=24, num_heads=4, num_kv_heads=2)
    pair = random_pair(0, target, shape)
    monkeypatch.setitem(paper.PRESETS, "tiny", SimpleNamespace(head=shape))
    monkeypatch.setattr(paper, "load_pretrained", lambda *_, **__: pair)
    prompts = [[3, 1, 4 + i] for i in range(6)]
    recipe = {"mixture": {"conversations": 6}, "seed": 0, "max_prompt_tokens": 9}
    own = recorded(tmp_path / "own", pair, prompts, 12, **recipe)
    other = recorded(tmp_path / "other", pair, [[*prompt, 7] for prompt in prompts[::-1]], 8, **recipe)
    common = ("--model", "tiny", "--dataset", own, "--steps", 2, "--held-out", 2, "--row-tokens", 40,
              "--vocab-subset", 22)
    with jax.numpy_dtype_promotion("standard"):
        run(monkeypatch, "gamma", *common, "--gammas", 0, 3, "--out", tmp_path / "g")
        run(monkeypatch, "subset", *common, "--out", tmp_path / "s")
        run(monkeypatch, "foreign", *common, "--foreign-dataset", other, "--out", tmp_path / "f")
        with pytest.raises(JetSpecError, match="their seed is"):
            run(monkeypatch, "foreign", *common, "--foreign-dataset",
                recorded(tmp_path / "x", pair, prompts, 4, **{**recipe, "seed": 1}), "--out", tmp_path / "y")
        with pytest.raises(JetSpecError, match="no held-out answer is longer than a block of 6"), \
                monkeypatch.context() as patch:
            patch.setattr(paper, "train", None)  # said before any training
            run(monkeypatch, "gamma", "--model", "tiny", "--dataset", tmp_path / "x", "--held-out", 2,
                "--row-tokens", 40, "--out", tmp_path / "z")
    rows = {name: json.loads((tmp_path / name / "results.json").read_text()) for name in "gsf"}
    assert [(row["gamma"], row["causal"]) for row in rows["g"]] == [(0, True), (0, False), (3, True), (3, False)]
    assert [row["run"] for row in rows["s"]] == ["22 tokens", "full vocabulary"]
    assert [row["run"] for row in rows["f"]] == ["own answers", "foreign answers"]
    assert all(np.isfinite([row["median gap"], row["mean gap"]]).all() for row in rows["g"])
    # The same head, steps and data: what gamma weighs differently must show, what does not differ must not.
    assert rows["g"][0]["loss"] != rows["g"][2]["loss"]
    assert rows["s"][0]["loss"] == pytest.approx(rows["s"][1]["loss"], rel=0.2)
    assert rows["f"][0]["loss"] != rows["f"][1]["loss"]
    assert all(1 <= row["accept_chain"] <= row["accept_accum_logp_64"] <= 4 for part in rows.values() for row in part)
    for name, plot in (("g", "gamma"), ("s", "subset"), ("f", "foreign")):
        assert (tmp_path / name / f"{plot}.png").stat().st_size > 1000


def test_faithfulness_of_two_heads(tmp_path, monkeypatch):
    """One row a head, shares that add up, and a head of the wrong kind is named."""
    target = tiny_target(dtype="float32")
    heads = {"a": tiny_head(target, num_layers=1), "b": tiny_head(target, num_layers=1, causal=False)}
    pairs = {name: random_pair(0, target, head) for name, head in heads.items()}
    data = recorded(tmp_path / "d", pairs["a"], [[3, 1, 4 + i] for i in range(6)], 14)
    monkeypatch.setattr(paper, "load_pretrained", lambda *_, **__: pairs["a"])
    monkeypatch.setattr(paper, "with_head", lambda _, head: pairs[head])
    common = ("faithfulness", "--dataset", data, "--held-out", 4, "--row-tokens", 40, "--vocab-subset", 22)
    with jax.numpy_dtype_promotion("standard"):
        run(monkeypatch, *common, "--causal-head", "a", "--bidirectional-head", "b", "--out", tmp_path / "out")
        with pytest.raises(JetSpecError, match="--causal-head b holds no causal"):
            run(monkeypatch, *common, "--causal-head", "b", "--bidirectional-head", "b", "--out", tmp_path / "x")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["head"] for row in rows] == ["causal", "bidirectional"]
    assert rows[0]["branches"] == rows[1]["branches"] > 4
    for row in rows:
        shares = [row[name] for name in ("-inf to 5", "5 to 20", "20 to 40", "40 to 80", "80 to inf")]
        assert sum(shares) == pytest.approx(1)
    assert rows[0]["mean gap"] != rows[1]["mean gap"]
    assert (tmp_path / "out" / "faithfulness.png").stat().st_size > 1000


def test_own_and_foreign_answers_meet(tmp_path):
    """Prompts that one of the two lacks are left out; both come in one order."""
    pair = random_pair(0, tiny_target(dtype="float32"), tiny_head(tiny_target(dtype="float32")))
    first, second = (recorded(tmp_path / name, pair, prompts, 4, mixture={"conversations": 3}, seed=0)
                     for name, prompts in (("a", [[5], [6], [7]]), ("b", [[5], [6]])))
    own, foreign = paper.same_prompts(Dataset([first]), Dataset([second]))
    assert own.indices == foreign.indices == [0, 1]
    assert [own.tokens(i)[0] for i in range(2)] == [foreign.tokens(i)[0] for i in range(2)] == [5, 6]
    with pytest.raises(JetSpecError, match="to the same prompts"):
        paper.same_prompts(Dataset([first]), Dataset([first, second]))


def test_runs_in_one_picture(tmp_path, monkeypatch, capsys):
    for name, last in (("causal", 2.5), ("dflash", 2.0)):
        (tmp_path / name).mkdir()
        entries = [{"step": 0, "accept_chain": 1.0, "accept_accum_logp_64": 1.0}, {"step": 5, "loss": 3.0},
                   {"step": 10, "accept_chain": 1.5, "accept_accum_logp_64": last}]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n")
    run(monkeypatch, "heads", "--run", tmp_path / "causal", "--run", tmp_path / "dflash", "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["run"], r["step"], r["accept_accum_logp_64"]) for r in rows] == [
        ("causal", 10, 2.5), ("dflash", 10, 2.0)]
    assert "| causal | 10 | 1.500 | 2.500 |" in capsys.readouterr().out
    assert (tmp_path / "out" / "heads.png").stat().st_size > 1000
    with pytest.raises(JetSpecError, match=r"holds no metrics\.jsonl"):
        run(monkeypatch, "heads", "--run", tmp_path, "--out", tmp_path / "out")
    with pytest.raises(JetSpecError, match="subset needs --dataset"):
        run(monkeypatch, "subset", "--out", tmp_path / "out")
