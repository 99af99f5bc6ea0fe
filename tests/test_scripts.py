"""The scripts as a user runs them, in their own processes with fully optimised programs."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import decode as decode_script
from experiments.common import tree_from
from experiments.decode import answer_all, beside, build_parser, show_beside
from jetspec_jax import SamplingParams, TreeConfig, checkpoint, load_pretrained, tiles
from jetspec_jax.autoregressive import autoregressive_shapes
from jetspec_jax.config import AutoregressiveHeadConfig
from jetspec_jax.generate import Generation, StreamChunk
from jetspec_jax.head import head_shapes
from jetspec_jax.target import target_shapes
from tests.models import DATA, random_pair, random_params, tiny_head, tiny_target

ROOT = Path(__file__).parent.parent
PAIR = ("--model", DATA / "dense" / "target", "--head", DATA / "dense" / "head")


def run(*arguments, flags=""):
    environment = os.environ | {"XLA_FLAGS": flags}  # not those of conftest
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
    assert "identical: True" in done.stdout
    assert report["beside_ar"]["forwards_ratio"] == pytest.approx(7 / report["rounds"])
    assert report["beside_ar"]["speed_ratios"] == [report["beside_ar"]["speed_ratio"]]


def generation(tokens, rounds, seconds, prompt_seconds=1.0):
    ones = [1] * rounds
    return Generation(None, list(range(tokens)), ones, ones, rounds, "length", seconds, prompt_seconds, 0)


def test_the_comparison_takes_the_median_of_the_prompts_ratios():
    """Ours 1, 2 and 9 s a token, plain 3, 5 and 4; a round 2, 5 and 22.5 s, plain 3, 5 and 4. One disturbed prompt does
    not decide, as it would over all tokens (100 s / 75 s); nor are prompts mixed, as by the medians (4 s / 2 s)."""
    ours = [generation(11, 5, 11.0), generation(11, 4, 21.0), generation(6, 2, 46.0)]
    plain = [generation(11, 10, 31.0), generation(11, 10, 51.0), generation(6, 5, 21.0)]
    found = beside(ours, plain)
    assert found["speed_ratios"] == pytest.approx([3.0, 2.5, 4 / 9])
    assert found["speed_ratio"] == pytest.approx(2.5)
    assert found["round_costs"] == pytest.approx([2 / 3, 1.0, 5.625])
    assert found["forwards_ratio"] == pytest.approx(25 / 11)


def test_answers_without_rounds_are_not_compared():
    one = generation(1, 0, 1.0)
    assert beside([one], [one]) is None
    found = beside([one, generation(5, 2, 5.0)], [one, generation(5, 4, 9.0)])
    assert (found["speed_ratio"], found["forwards_ratio"], found["speed_ratios"]) == (2.0, 2.0, [2.0])


@pytest.mark.parametrize(("seconds", "busy"), [(20.0, False), (24.0, False), (26.0, True), (15.0, True)])
def test_what_the_machine_changes_is_told_last_and_that_it_was_busy(seconds, busy, capsys):
    """Rounds cost 1 and `seconds` / 20 plain ones: 26 s and 15 s are more than a quarter apart from 20 s."""
    ours = [generation(11, 5, 11.0), generation(11, 5, 1 + seconds / 2)]
    plain = [generation(11, 10, 21.0), generation(11, 10, 21.0)]
    report = decode_script.summarize(ours) | {"ar": decode_script.summarize(plain), "identical": True,
                                              "beside_ar": beside(ours, plain)}
    show_beside(report, "tree")
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert names == ["tokens", "forwards", "tree", "plain", "ratio"] + ["busy"] * busy
    assert "10 of the target instead of 20" in lines[3] and "2.00 times fewer" in lines[3]
    assert f"lowest {min(2, 40 / seconds):.2f}x, highest {max(2, 40 / seconds):.2f}x" in "".join(lines)


def answers_of_a_fake(monkeypatch, compare):
    """(drafts in the order in which they were decoded, answers, plain answers); a first turn compiles for 4 s."""
    pair, turns = SimpleNamespace(tokenizer=None, programs=SimpleNamespace(compile_seconds=0.0)), []

    def fake(pair, prompt, *, tree, **options):
        pair.programs.compile_seconds += 4.0 * (tree not in turns)
        turns.append(tree)
        for result in (None, generation(3, 2, 3.0)):
            yield StreamChunk(0, "", prompt, [1], result)

    monkeypatch.setattr(decode_script, "stream", fake)
    args = build_parser().parse_args(["--compare-ar"] * compare)
    return turns, *answer_all(pair, ["7", "8", "9"], args, "tree", SamplingParams())


def test_both_ways_take_turns_after_a_warm_up(monkeypatch, capsys):
    """The first turn of each way comes twice and pays compilation; neither way always goes first; ours is streamed."""
    turns, answers, plain = answers_of_a_fake(monkeypatch, compare=True)
    assert turns == ["tree", "tree", None, None, None, "tree", "tree", None]
    assert [a.compile_seconds for a in answers] == [a.compile_seconds for a in plain] == [4.0, 0.0, 0.0]
    assert capsys.readouterr().out == "> 7\n\n 7 7\n\n> 8\n\n 8 8\n\n> 9\n\n 9 9\n"


def test_without_a_comparison_nothing_is_decoded_twice(monkeypatch):
    turns, answers, plain = answers_of_a_fake(monkeypatch, compare=False)
    assert (turns, len(answers), plain) == (["tree"] * 3, 3, [])


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


@pytest.mark.parametrize(("draft", "title"), [("lookup", "prompt lookup (last 3 tokens, budget 8)"),
                                              ("none", "plain decoding")])
def test_decoding_without_a_head(draft, title):
    """A target alone; the tokens are those of plain decoding."""
    case = json.loads((DATA / "dense" / "expected.json").read_text())["cases"][0]
    prompt = load_file(DATA / "dense" / "activations.safetensors")["0.prompt"].tolist()
    done = decode(*PAIR[:2], "--draft", draft, "--prompt", " ".join(map(str, prompt)), "--max-new-tokens", 12, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["token_ids"] == case["ar_token_ids"][:12]
    assert title in done.stdout
    assert draft == "lookup" or report["rounds"] == 11


def test_the_default_tree_is_the_pairs(monkeypatch):
    parse = build_parser().parse_args
    pair = random_pair(0, tiny_target(), tiny_head(tiny_target()))
    assert tree_from(parse([]), pair) == tree_from(parse([])) == TreeConfig("accum_logp", 7, 64)
    monkeypatch.setattr(tiles, "LEAST_BYTES", 0)  # a large one
    assert tree_from(parse([]), pair) == TreeConfig("best_first", 16, 4)
    assert tree_from(parse(["--budget", "64"]), pair) == TreeConfig("best_first", 16, 64)
    assert tree_from(parse(["--tree-builder", "accum_logp"]), pair) == TreeConfig("accum_logp", 7, 4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert tree_from(parse([]), pair) == TreeConfig("accum_logp", 7, 64)


@pytest.mark.parametrize(("arguments", "message"), [
    (("--budget", 0), "tree budget"), (("--tree-width", 17), "tree width"), (("--temperature", -1), "temperature"),
    (("--top-p", 2), "top_p"), (("--seed", -1), "--seed"),
    (("--max-new-tokens", 0), "--max-new-tokens"), ((*PAIR, "--prompt", " "), "no tokenizer"),
    (("--prompt-file", "absent.txt"), "cannot read absent.txt"),
    (("--model", "qwen3-4b"), "no draft head is known for qwen3-4b"), (PAIR[:2], "name one with --head"),
    (("--draft", "none", "--compare-ar"), "--compare-ar compares with plain decoding"),
    (("--draft", "lookup", "--tree-width", 8), "cannot go with --draft lookup"),
    (("--draft", "lookup", "--budget", 1), "a lookup has at least 2 nodes"),
    (("--model", "Qwen/Qwen3-4B"), "no draft head is known for Qwen/Qwen3-4B"),
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
    assert done.stderr == ""  # so soon that a bar would only flicker
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


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The default's tokenizer with a random target of two layers (the default has thirty to compile), and its heads."""
    folder, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    target = tiny_target(vocab_size=49152, qk_norm=False, dtype="float32")
    head = tiny_head(target, block_size=8)
    stepwise = AutoregressiveHeadConfig.like(head)
    for name, config, shapes in (("target", target, target_shapes(target)), ("head", head, head_shapes(head)),
                                 ("two-way", dataclasses.replace(head, causal=False), head_shapes(head)),
                                 ("stepwise", stepwise, autoregressive_shapes(stepwise))):
        checkpoint.save(folder / name, config, random_params(shapes, rng), "a test")
    load_pretrained("smollm2-135m").tokenizer.save_pretrained(folder / "target" / checkpoint.TOKENIZER)
    (folder / "mine.jsonl").write_text('{"prompt": "Count from one to ten."}\n')
    return folder


def benchmark(small, *arguments):
    return run("experiments/benchmark.py", "--model", small / "target", "--head", small / "head", "--suite",
               small / "mine.jsonl", "--limit", 1, "--repeats", 1, "--json", *arguments,
               flags="--xla_backend_optimization_level=0")  # many programs, each run for milliseconds


def test_benchmark_on_a_users_prompts(small, tmp_path):
    done = benchmark(small, "--methods", "jetspec,jetspec-chain,lookup", "--budgets", "8,4", "--max-new-tokens", 10,
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


def test_benchmark_beside_transformers(small):
    """Peers stand in a list of their own: they have no rounds. At temperature 1 they are refused."""
    pytest.importorskip("torch")
    common = ("--budgets", 4, "--max-new-tokens", 6)
    done = benchmark(small, *common, "--methods", "jetspec,transformers,transformers-lookup")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [row["method"] for row in report["rows"]] == ["plain", "jetspec"]
    assert [row["method"] for row in report["peers"]] == ["transformers", "transformers-lookup"]
    for row in report["peers"]:
        assert (row["tokens"], row["identical"], row["prompts"]) == (6, 1, 1)
        assert row["speedup"] == pytest.approx(row["tokens_per_second"] / report["rows"][0]["tokens_per_second"])
        assert "rounds" not in row
    done = benchmark(small, *common, "--methods", "jetspec,transformers", "--temperature", 1)
    assert done.returncode == 2
    assert "transformers draws other random numbers: compare with it at temperature 0" in done.stderr
    done = benchmark(small, *common, "--methods", "jetspec", "--temperature", 1)
    assert done.returncode == 0, done.stderr
    assert [row["identical"] for row in json.loads(done.stdout.splitlines()[-1])["rows"]] == [1, 1]


def test_peers_of_our_own(small, tmp_path):
    """The target's context is too short for the long prompt: no column says anything of it."""
    done = run("experiments/peers.py", "--model", small / "target", "--head", small / "head", "--prompt-file",
               small / "mine.jsonl", "--methods", "default,lookup", "--rounds", 1, "--max-new-tokens", 6, "--json",
               "--out", tmp_path / "o", flags="--xla_backend_optimization_level=0")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert [row["method"] for row in report["rows"]] == ["plain", "default", "lookup"]
    assert (report["rows"][0]["of_plain"], report["left_out"]) == (1, {})
    for row in report["rows"]:
        assert (row["identical"], row["prompts"], row["prompt_tokens_per_second"]) == (1, 1, {})
        assert row["tokens_per_second"] > 0
        assert row["first_token_seconds"] > 0
    assert report["cores"] >= 1
    assert json.loads((tmp_path / "o" / "results.json").read_text()) == report
    assert done.stdout.startswith((tmp_path / "o" / "results.md").read_text())
    done = run("experiments/peers.py", "--methods", "vllm")
    assert (done.returncode, done.stderr.strip().splitlines()[-1][:23]) == (2, "error: --methods 'vllm'")


def test_benchmark_with_heads_of_other_kinds(small):
    """dflash, ddtree and eagle3 decode losslessly with converted heads; a head of another kind is told."""
    common = ("--budgets", 4, "--max-new-tokens", 6, "--methods", "dflash,ddtree,eagle3", "--autoregressive-head",
              small / "stepwise")
    done = benchmark(small, *common, "--bidirectional-head", small / "two-way")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["method"], row["budget"], row["identical"]) for row in rows] == [
        ("plain", 1, 1), ("dflash", 8, 1), ("ddtree", 4, 1), ("eagle3", 4, 1)]
    assert all(sum(row["share"].values()) == pytest.approx(1) for row in rows)
    done = benchmark(small, *common, "--bidirectional-head", small / "stepwise")
    assert done.returncode == 2
    assert "needs a head that is bidirectional, and the given one is autoregressive" in done.stderr
