"""The paper's analyses: the faithfulness gap against a forward per branch, and the plot of finished runs."""

from __future__ import annotations

import json
import sys

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
