"""Peers: the files that they load hold our weights, everyone is timed alike, and what is missing is told."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest

from converters.convert import read_target
from converters.gguf_file import GGUFFile
from experiments import first_token, llama_peer, peers
from experiments.peers import Peer, PeerAnswer
from jetspec_jax import JetSpecError
from jetspec_jax.config import RopeScaling
from jetspec_jax.generate import generate
from tests.models import random_pair, tiny_head, tiny_moe, tiny_target

PROMPT = [3, 1, 4, 1, 5]


def float32_pair(**changes):
    target = tiny_target(dtype="float32", **changes)
    return random_pair(0, target, tiny_head(target))


@pytest.mark.parametrize("changes", [{"qk_norm": False, "tie_embeddings": True}, {"qk_norm": True}])
def test_the_gguf_file_holds_the_weights(tmp_path, changes):
    pair = float32_pair(**changes)
    llama_peer.write_gguf(pair, tmp_path / "target.gguf")
    config, params = read_target(tmp_path / "target.gguf", progress=False)
    assert jax.tree.structure(params) == jax.tree.structure(pair.params.target)
    jax.tree.map(np.testing.assert_array_equal, params, pair.params.target)
    for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "rope_theta", "rms_norm_eps", "qk_norm",
                 "tie_embeddings", "max_positions", "vocab_size"):
        assert getattr(config, name) == pytest.approx(getattr(pair.target_config, name))


def test_rotary_pairs_lie_beside_each_other_in_a_llama_file(tmp_path):
    """One head of four: our halves (0, 2) and (1, 3) turn together, llama.cpp's neighbours do."""
    pair = float32_pair(qk_norm=False, tie_embeddings=True, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4)
    llama_peer.write_gguf(pair, tmp_path / "target.gguf")
    from gguf import GGUFReader

    stored = {tensor.name: tensor.data for tensor in GGUFReader(tmp_path / "target.gguf").tensors}
    ours = np.asarray(pair.params.target["params"]["layers_0"]["attention"]["qkv_proj"]["kernel"]).T
    np.testing.assert_array_equal(stored["blk.0.attn_q.weight"], ours[:4][[0, 2, 1, 3]])
    np.testing.assert_array_equal(stored["blk.0.attn_k.weight"], ours[4:8][[0, 2, 1, 3]])
    np.testing.assert_array_equal(stored["blk.0.attn_v.weight"], ours[8:])


@pytest.mark.parametrize("target", [
    tiny_moe(dtype="float32"), tiny_target(dtype="float32", qkv_bias=True),
    tiny_target(dtype="float32", rope_scaling=RopeScaling(kind="linear", factor=2.0))])
def test_targets_that_are_not_written_for_llama(tmp_path, target):
    with pytest.raises(JetSpecError, match=r"are not written for llama.cpp"):
        llama_peer.write_gguf(random_pair(0, target), tmp_path / "target.gguf")
    assert not (tmp_path / "target.gguf").exists()


def test_the_4bit_file_is_the_default_targets_alone():
    with pytest.raises(JetSpecError, match="only the default target has a 4-bit file"):
        llama_peer.packed_default(float32_pair())


def fake_llama(monkeypatch, answer):
    """A module llama_cpp, whose model remembers what it was asked."""
    seen = []

    class Llama:
        def __init__(self, file, **options):
            seen.append(("load", GGUFFile(Path(file)).config.num_layers, options))

        def reset(self):
            seen.append("reset")

        def generate(self, ids, **options):
            seen.append((ids, options))
            return iter(answer)

    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama))
    return seen


def test_llama_decodes_greedily_from_a_clean_cache_with_all_cores(monkeypatch):
    seen = fake_llama(monkeypatch, [7, 8, 9])
    monkeypatch.setattr(llama_peer, "cores", lambda: 3)
    run = llama_peer.llama_float32(float32_pair())
    assert run(PROMPT, 2) == [7, 8]
    float32 = llama_peer.FLOAT32
    assert seen == [("load", 2, {"n_ctx": 600, "n_threads": 3, "n_threads_batch": 3, "verbose": False,
                                 "type_k": float32, "type_v": float32}),
                    "reset", (PROMPT, {"temp": 0.0, "repeat_penalty": 1.0})]
    with pytest.raises(JetSpecError, match="within 600 tokens, not with a prompt of 5 and 596 new ones"):
        run(PROMPT, 596)


@pytest.mark.parametrize(("name", "module", "remedy"), [
    ("llama.cpp", "llama_cpp", "pip install -e '.[peers]'"), ("llama.cpp-4bit", "llama_cpp", "-e '.[peers]'"),
    ("transformers", "torch", "pip install -e '.[parity]'"), ("jetspec-torch", "jetspec", "pip install git+https://")])
def test_who_is_not_installed_says_how(monkeypatch, name, module, remedy):
    monkeypatch.setitem(sys.modules, module, None)
    found, left_out = peers.ready_or_told(["plain", name], float32_pair())
    assert [peer.name for peer in found] == ["plain"]
    assert left_out.keys() == {name}
    assert remedy in left_out[name]
    table = peers.markdown({**peers.machine(), "rows": [row("plain")], "left_out": left_out})
    assert f"| {name} | {left_out[name]} | - | - | - |" in table.splitlines()


def test_a_pair_without_a_head_leaves_the_default_out():
    pair = float32_pair()
    found, left_out = peers.ready_or_told(["plain", "default"], replace(pair, head_config=None))
    assert [peer.name for peer in found] == ["plain"]
    assert "no draft head" in left_out["default"]


def test_ours_are_what_generate_gives():
    pair = float32_pair()
    plain = generate(pair, PROMPT, max_new_tokens=6, tree=None).token_ids
    for name in peers.OURS:
        assert peers.ready(name, pair).run(PROMPT, 6) == plain


def test_all_answer_in_every_round_and_take_turns():
    """The first peer stops after two tokens of the first prompt; the others are asked for as many."""
    asked = []
    pair = SimpleNamespace(encode=lambda text: [len(text)])

    def peer(name, most):
        def run(ids, tokens):
            asked.append((name, ids[0], tokens))
            return list(range(min(tokens, most[ids[0]])))

        return Peer(name, run, pair)

    rounds = peers.compare([peer("plain", {1: 2, 2: 9}), peer("other", {1: 9, 2: 9})], ["a", "bb"], 4, rounds=2)
    assert asked[:2] == [("plain", 1, 4), ("plain", 2, 4)]
    both = [("other", "plain"), ("plain", "other"), ("other", "plain")]  # the first round warms up
    assert asked[2:] == [(name, prompt, tokens) for order in both for prompt, length in ((1, 2), (2, 4))
                         for name in order for tokens in (1, length)]
    assert [[len(answer.token_ids) for answer in answers["other"]] for answers in rounds] == [[2, 4]] * 2


def test_a_row_is_the_median_of_its_rounds():
    """Five tokens after the first in 1, 2 and 5 seconds; plain decoding takes 2, 2 and 20."""
    def answers(seconds, ids=(1, 2, 3, 4, 5, 6)):
        return [PeerAnswer(list(ids), seconds + 0.5, 0.5)]

    rounds = [{"plain": answers(b), "other": answers(a)} for a, b in ((1, 2), (2, 2), (5, 20))]
    found = peers.summary("other", rounds, {1024: 300.0})
    assert found == {"method": "other", "tokens_per_second": 2.5, "of_plain": 2.0, "first_token_seconds": 0.5,
                     "identical": 1, "prompts": 1, "prompt_tokens_per_second": {1024: 300.0}}
    rounds[-1]["other"] = answers(5, (1, 2, 3, 4, 5, 7))
    assert peers.summary("other", rounds, {})["identical"] == 0


def row(name, **changes):
    return {"method": name, "tokens_per_second": 12.34, "of_plain": 1.0, "first_token_seconds": 0.25, "identical": 3,
            "prompts": 3, "prompt_tokens_per_second": {}, **changes}


def test_the_table():
    rows = [row("plain", prompt_tokens_per_second={1024: 301.4}), row("transformers-lookup")]
    table = peers.markdown({"processor": "A 1", "cores": 2, "versions": {"jax": "0.9", "torch": "2"}, "rows": rows,
                            "left_out": {}, "start_seconds": {"default": 4.56, "llama.cpp": 0.5}})
    assert table.splitlines() == [
        "A 1, 2 cores; jax 0.9, torch 2", "",
        "| who | tokens/s | of plain | first token | identical | prompt of 1,024 |", "|---|---|---|---|---|---|",
        "| ours, plain | 12.3 | 1.00 | 0.25 s | 3/3 | 301 tokens/s |",
        "| transformers-lookup | 12.3 | 1.00 | 0.25 s | 3/3 | - |", "",
        "| who | from the start of the process to its first token |", "|---|---|",
        "| ours, default | 4.6 s |", "| llama.cpp | 0.5 s |"]


def test_prompts_are_read_by_all_but_lookups(monkeypatch):
    """A second for every hundred tokens; the prompt is repeated up to the length."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(peers, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def run(ids, tokens):
        assert (ids[:4], tokens) == ([5, 6, 5, 6], 1)
        clock.now += len(ids) / 100
        return [0]

    found = peers.read_speeds([Peer(name, run, None) for name in ("plain", "transformers-lookup")], [5, 6], [10, 50])
    assert found == {"plain": {10: pytest.approx(100), 50: pytest.approx(100)}}


def test_the_first_output_after_a_heading_counts():
    heading = "> Hi\n\n"
    assert first_token._first_output(["-c", f"print({heading!r}, end='x')"], heading) > 0
    with pytest.raises(JetSpecError, match="ended without a token"):
        first_token._first_output(["-c", f"print({heading!r}, end='')"], heading)


def test_starts_are_timed_in_turn_and_the_first_ones_warm_up(monkeypatch):
    pair, asked = float32_pair(), []
    monkeypatch.setattr(type(pair), "chat", lambda _, message: message)
    monkeypatch.setattr(type(pair), "encode", lambda *_: PROMPT)
    seconds = iter([9, 90, 1, 10, 2, 20, 3, 30])

    def fake(arguments, before):
        asked.append((arguments[1:], before))
        if "llama.cpp" in arguments:
            assert GGUFFile(Path(arguments[2])).config.num_layers == 2
        return next(seconds)

    monkeypatch.setattr(first_token, "_first_output", fake)
    args = SimpleNamespace(model="m", head=None, dtype="float32", no_verify=True)
    assert first_token.start_seconds(args, pair, "Hi", ["plain", "llama.cpp"]) == {"default": 2, "llama.cpp": 20}
    assert asked[0] == (["--model", "m", "--prompt=Hi", "--max-new-tokens", "32", "--dtype", "float32", "--no-verify"],
                        "> Hi\n\n")
    assert (asked[1][0][0], asked[1][0][2], asked[1][1]) == ("llama.cpp", "3 1 4 1 5", "")


@pytest.mark.parity
def test_the_published_implementation_gets_the_pair(monkeypatch):
    """A module of its names and signatures; what it loads from the folders is the pair."""
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from converters.convert import read_head

    pair = float32_pair(qk_norm=False, tie_embeddings=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    pair = replace(pair, tokenizer=tokenizer)

    class LLM:
        def __init__(self, folder, device, dtype):
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

        def generate_tree(self, prompt, drafter, block_size, tree_width, budget, target_layer_ids, sampling_params):
            assert (drafter.target, block_size, tree_width, budget) == (self.model, 6, 7, 63)
            assert (drafter.target_layer_ids, sampling_params.temperature) == (target_layer_ids, 0.0)
            answer = self.model.generate(prompt, max_new_tokens=sampling_params.max_new_tokens, do_sample=False,
                                         eos_token_id=None, pad_token_id=0)
            return {"token_ids": answer[0, prompt.shape[1]:].tolist()}

    def load_draft_head(folder, device, dtype):
        config, params = read_head(Path(folder), progress=False)
        jax.tree.map(np.testing.assert_array_equal, params, pair.params.head)
        assert (device, dtype) == ("cpu", torch.float32)
        return SimpleNamespace(block_size=config.block_size, target_layer_ids=list(config.target_layer_ids))

    module = ModuleType("jetspec")
    module.LLM, module.load_draft_head = LLM, load_draft_head
    module.DraftHeadTreeDrafter = lambda head, target, **taps: SimpleNamespace(head=head, target=target, **taps)
    module.SamplingParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "jetspec", module)
    run = peers.PEERS["jetspec-torch"](pair)
    assert run(PROMPT, 6) == generate(pair, PROMPT, max_new_tokens=6, tree=None).token_ids


def test_methods_are_known():
    assert peers.parse_methods("lookup, plain,lookup") == ["plain", "lookup"]
    with pytest.raises(JetSpecError, match=r"--methods 'vllm': choose from plain, default, lookup, transformers"):
        peers.parse_methods("vllm")
