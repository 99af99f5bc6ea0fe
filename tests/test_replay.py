"""The replay of plain answers against rounds that were really decoded."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from experiments import replay
from experiments.replay import accept_lengths
from jetspec_jax import JetSpecError, load_pretrained
from jetspec_jax.generate import generate
from tests.models import DATA


class Numbers:
    """Token ids as decimal numbers; no template."""

    chat_template = "yes"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(map(str, ids))

    def get_chat_template(self, *_):
        return self.chat_template

    def apply_chat_template(self, messages, **_):
        return messages[-1]["content"]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["replay.py", *map(str, arguments)])
    replay.main()


def test_replayed_rounds_are_the_decoded_ones(tmp_path, monkeypatch, capsys):
    pair = load_pretrained(DATA / "dense" / "target", DATA / "dense" / "head", dtype="float32")
    pair = dataclasses.replace(pair, tokenizer=Numbers())
    monkeypatch.setattr(replay, "load", lambda *_, **__: pair)
    prompts = ["5 9 13", "40 2 2 7 31 8", "1"]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    run(monkeypatch, "--suite", tmp_path / "mine.jsonl", "--budgets", "4,12", "--max-new-tokens", 24, "--batch-size", 2,
        "--json", "--out", tmp_path / "o")
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    trees = replay.trees_of(pair.head_config, [4, 12])
    assert [(row["method"], row["budget"]) for row in rows] == list(trees)
    for row, tree in zip(rows, trees.values(), strict=True):
        answers = [generate(pair, prompt, tree=tree, max_new_tokens=24) for prompt in prompts]
        assert (row["prompts"], row["tokens"]) == (3, sum(len(a.token_ids) - 1 for a in answers))
        assert row["rounds"] == sum(a.rounds for a in answers)
        assert row["accepted_length"] == pytest.approx(row["tokens"] / row["rounds"])
    assert max(row["accepted_length"] for row in rows) > 1.3  # the head drafts something
    assert "| jetspec-best-first | " in (tmp_path / "o" / "results.md").read_text()
    assert (tmp_path / "o" / "replay.png").stat().st_size > 1000
    with pytest.raises(JetSpecError, match="--max-new-tokens must be at least 2"):
        run(monkeypatch, "--max-new-tokens", 1)


def test_what_a_head_may_say_of_itself():
    """All tokens over all rounds, of best_first trees, up to the first budget that was not replayed."""
    def row(method, budget, tokens, rounds):
        return {"method": method, "budget": budget, "tokens": tokens, "rounds": rounds}

    rows = [row("jetspec-best-first", 2, 30, 20), row("jetspec-best-first", 2, 50, 30), row("jetspec", 2, 9, 9),
            row("jetspec-best-first", 4, 57, 30), row("jetspec-best-first", 16, 90, 30), row("jetspec-chain", 0, 5, 3)]
    assert accept_lengths(rows) == [1.6, 1.9]
    assert accept_lengths(rows[2:3]) == []
