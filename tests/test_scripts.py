"""The scripts as a user runs them, in their own processes with fully optimised programs."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from experiments.common import tree_from
from experiments.decode import build_parser
from jetspec_jax import TreeConfig
from jetspec_jax import generate as generation
from tests.models import DATA, random_pair, tiny_head, tiny_target

ROOT = Path(__file__).parent.parent
PAIR = ("--model", DATA / "dense" / "target", "--head", DATA / "dense" / "head")


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # as conftest set them
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=300)


def decode(*arguments):
    return run("experiments/decode.py", *arguments)


def test_decode_on_the_default_pair_in_json():
    done = decode("--prompt", "The capital of France is", "--no-chat-template", "--max-new-tokens", 8, "--budget", 8,
                  "--compare-ar", "--json")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    report = json.loads(lines[-1])
    assert "Paris" in report["text"]
    assert report["identical"] is True
    assert len(report["token_ids"]) == 8
    assert report["rounds"] == len(report["accept_lengths"])
    assert report["tokens_per_second"] > 0
    assert report["ar"]["rounds"] == 7
    assert report["text"] in done.stdout.replace(lines[-1], "")  # it was streamed
    assert report["mean_accept_length"] > 1  # the shipped head drafts
    assert report["ar"]["token_ids"] == report["token_ids"]
    assert "tokens identical: True" in done.stdout


def test_decode_on_a_recorded_pair():
    """Without a tokenizer prompts are token ids; the run is the recorded one."""
    case = json.loads((DATA / "dense" / "expected.json").read_text())["cases"][0]
    prompt = load_file(DATA / "dense" / "activations.safetensors")["0.prompt"].tolist()
    done = decode(*PAIR, "--prompt", " ".join(map(str, prompt)), "--max-new-tokens", case["max_new"], "--compare-ar",
                  "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["text"], report["identical"]) == (None, True)
    assert report["token_ids"] == case["ar_token_ids"]
    assert report["accept_lengths"] == case["runs"][1]["accept_lengths"]
    assert " ".join(map(str, case["ar_token_ids"])) in done.stdout


def test_an_answer_without_rounds_is_reported_too():
    done = decode(*PAIR, "--prompt", "5", "--max-new-tokens", 1, "--compare-ar", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rounds"] == 0


@pytest.mark.parametrize(("draft", "rounds"), [("lookup", None), ("none", 11)])
def test_decoding_without_a_head(draft, rounds):
    """A target alone; the tokens are those of plain decoding."""
    case = json.loads((DATA / "dense" / "expected.json").read_text())["cases"][0]
    prompt = load_file(DATA / "dense" / "activations.safetensors")["0.prompt"].tolist()
    done = decode(*PAIR[:2], "--draft", draft, "--prompt", " ".join(map(str, prompt)), "--max-new-tokens", 12, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["token_ids"] == case["ar_token_ids"][:12]
    assert rounds is None or report["rounds"] == rounds


def test_the_default_tree_is_the_pairs(monkeypatch):
    parse = build_parser().parse_args
    pair = random_pair(0, tiny_target(), tiny_head(tiny_target()))
    assert tree_from(parse([]), pair) == tree_from(parse([])) == TreeConfig("accum_logp", 7, 64)
    monkeypatch.setattr(generation, "CPU_TREE_BYTES", 0)  # a large one
    assert tree_from(parse([]), pair) == TreeConfig("best_first", 16, 4)
    assert tree_from(parse(["--budget", "64"]), pair) == TreeConfig("best_first", 16, 64)
    assert tree_from(parse(["--tree-builder", "accum_logp"]), pair) == TreeConfig("accum_logp", 7, 4)
    monkeypatch.setattr(generation.jax, "default_backend", lambda: "gpu")
    assert tree_from(parse([]), pair) == TreeConfig("accum_logp", 7, 64)


@pytest.mark.parametrize(("arguments", "message"), [
    (("--budget", 0), "tree budget"), (("--tree-width", 17), "tree width"), (("--temperature", -1), "temperature"),
    (("--top-p", 2), "top_p"), (("--seed", -1), "--seed"),
    (("--max-new-tokens", 0), "--max-new-tokens"), ((*PAIR, "--prompt", " "), "no tokenizer"),
    (("--prompt-file", "absent.txt"), "cannot read --prompt-file absent.txt"),
    (("--model", "qwen3-4b"), "no draft head is known for qwen3-4b"), (PAIR[:2], "name one with --head"),
    (("--draft", "none", "--compare-ar"), "--compare-ar compares with plain decoding"),
    (("--draft", "lookup", "--budget", 8), "they cannot go with --draft lookup"),
    (("--model", "qwen3-9b"), "unknown target 'qwen3-9b'"), ((*PAIR, "--prompt", "Hi"), "no tokenizer"),
    (("--system", "Be brief.", "--no-chat-template"), "--system")])
def test_a_users_mistake_is_one_line(arguments, message):
    done = decode(*arguments)
    assert done.returncode == 2
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", ["", '{"text": "a"}\n', "[1]\n", '{"prompt": 3}\n', "{\n"])
def test_bad_prompt_files(tmp_path, content):
    from argparse import Namespace

    from experiments.decode import read_prompts
    from jetspec_jax import JetSpecError
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(JetSpecError, match=r"p\.jsonl"):
        read_prompts(Namespace(prompt=None, prompt_file=tmp_path / "p.jsonl"))


def test_convert_as_a_module(tmp_path):
    done = run("-m", "converters", "head", DATA / "dense" / "head", tmp_path / "h")
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr  # the progress bar
    done = run("-m", "converters", "export-head", tmp_path / "h", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (DATA / "dense" / "head", tmp_path / "back"))
    assert {n: t.tobytes() for n, t in before.items()} == {n: t.tobytes() for n, t in after.items()}


def test_round_cost_reports_phases():
    done = run("experiments/round_cost.py", *PAIR, "--budget", 8, "--context", 32, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report["milliseconds"]) == {"draft", "head commit", "tree", "verify", "accept", "commit", "round"}
    assert all(value > 0 for value in report["milliseconds"].values())


def test_benchmark_on_a_users_prompts(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Count from one to ten."}\n')
    done = run("experiments/benchmark.py", "--suite", tmp_path / "mine.jsonl", "--methods",
               "jetspec,jetspec-chain,lookup",
               "--budgets", "8,4", "--limit", 1, "--max-new-tokens", 10, "--repeats", 1, "--json",
               "--out", tmp_path / "o")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    rows = report["rows"]
    assert report["peers"] == []
    assert [(row["method"], row["budget"]) for row in rows] == [
        ("plain", 1), ("jetspec", 4), ("jetspec", 8), ("jetspec-chain", 8), ("lookup", 8)]
    for row in rows:
        assert (row["prompts"], row["tokens"], row["temperature"], row["identical"]) == (1, 10, 0, 1)
        # The first token comes from the prompt, each round brings at least one of the others.
        assert 1 <= row["rounds"] <= 9
        assert 9 / row["rounds"] <= row["accepted_length"] <= 8
        assert row["tokens_per_second"] > 0
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / rows[0]["tokens_per_second"])
        assert sum(row["share"].values()) == pytest.approx(1)
        assert set(row["share"]) == {"draft", "tree", "verify", "accept"}
    assert rows[0]["rounds"] == 9
    assert json.loads((tmp_path / "o" / "results.json").read_text()) == report
    assert len((tmp_path / "o" / "results.md").read_text().splitlines()) == 2 + len(rows)
    assert (tmp_path / "o" / "scaling.png").stat().st_size > 1000


@pytest.mark.parametrize(("arguments", "message"), [
    (("--suite", "gsm9k"), "gsm9k"), (("--suite", "gsm8k", "--methods", "magic"), "--methods 'magic'"),
    (("--suite", "gsm8k", "--budgets", "0"), "--budgets"), (("--suite", "gsm8k", "--limit", 0), "--limit"),
    (("--suite", "gsm8k", "--max-new-tokens", 1), "--max-new-tokens must be at least 2"),
    (("--suite", "gsm8k", "--out", "README.md"), "README.md cannot be a folder"),
    (("--suite", "gsm8k", "--methods", "dflash"), "--bidirectional-head")])
def test_a_benchmark_that_cannot_be_run(arguments, message):
    done = run("experiments/benchmark.py", *arguments)
    assert done.returncode == 2
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_benchmark_beside_transformers(tmp_path):
    """Peers stand in a list of their own: they have no rounds. At temperature 1 they are refused."""
    pytest.importorskip("torch")
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Count from one to ten."}\n')
    common = ("experiments/benchmark.py", "--suite", tmp_path / "mine.jsonl", "--budgets", 4, "--limit", 1,
              "--max-new-tokens", 6, "--repeats", 1, "--json")
    done = run(*common, "--methods", "jetspec,transformers,transformers-lookup")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [row["method"] for row in report["rows"]] == ["plain", "jetspec"]
    assert [row["method"] for row in report["peers"]] == ["transformers", "transformers-lookup"]
    for row in report["peers"]:
        assert (row["tokens"], row["identical"], row["prompts"]) == (6, 1, 1)
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / report["rows"][0]["tokens_per_second"])
        assert "rounds" not in row
    done = run(*common, "--methods", "jetspec,transformers", "--temperature", 1)
    assert done.returncode == 2
    assert "compare with it at temperature 0" in done.stderr
    done = run(*common, "--methods", "jetspec", "--temperature", 1)
    assert done.returncode == 0, done.stderr
    assert [row["identical"] for row in json.loads(done.stdout.splitlines()[-1])["rows"]] == [1, 1]


def test_benchmark_with_heads_of_other_kinds(tmp_path):
    """dflash, ddtree and eagle3 decode losslessly with converted heads; a head of another kind is told."""
    import jax

    from jetspec_jax import checkpoint, load_pretrained
    from jetspec_jax.autoregressive import init_autoregressive
    from jetspec_jax.config import PRESETS, AutoregressiveHeadConfig
    from jetspec_jax.head import init_head
    shape = dataclasses.replace(PRESETS["smollm2-135m"].head, dtype="float32", num_layers=1)
    two_way = dataclasses.replace(shape, causal=False)
    stepwise = AutoregressiveHeadConfig(**{
        field.name: getattr(shape, field.name) for field in dataclasses.fields(AutoregressiveHeadConfig)})
    for name, config, params in (("two-way", two_way, init_head(two_way, jax.random.key(0))),
                                 ("stepwise", stepwise, init_autoregressive(stepwise, jax.random.key(0)))):
        checkpoint.save(tmp_path / name, config, params, source="a test")
    assert load_pretrained("smollm2-135m", tmp_path / "two-way").head_config.causal is False
    (tmp_path / "mine.jsonl").write_text('{"prompt": "Count from one to ten."}\n')
    common = ("experiments/benchmark.py", "--suite", tmp_path / "mine.jsonl", "--budgets", 4, "--limit", 1,
              "--max-new-tokens", 6, "--repeats", 1, "--json", "--methods", "dflash,ddtree,eagle3")
    done = run(*common, "--bidirectional-head", tmp_path / "two-way", "--autoregressive-head", tmp_path / "stepwise")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["method"], row["budget"], row["identical"]) for row in rows] == [
        ("plain", 1, 1), ("dflash", 8, 1), ("ddtree", 4, 1), ("eagle3", 4, 1)]
    assert all(sum(row["share"].values()) == pytest.approx(1) for row in rows)
    done = run(*common, "--bidirectional-head", tmp_path / "stepwise", "--autoregressive-head", tmp_path / "stepwise")
    assert done.returncode == 2
    assert "needs a head that is bidirectional, and the given one is autoregressive" in done.stderr
