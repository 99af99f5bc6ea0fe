"""The recorded vectors of the published PyTorch implementation: logits, tapped states, drafts, whole runs."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jetspec_jax import SamplingParams, TreeConfig, load_pretrained
from jetspec_jax.attention import causal_bits
from jetspec_jax.cache import KVCache
from jetspec_jax.decode import Decoder, create_state, insert, prefill
from jetspec_jax.draft import HeadDrafter
from jetspec_jax.generate import generate
from jetspec_jax.sampling import Sampler
from jetspec_jax.target import target_forward, target_logits
from tests.models import DATA

TOLERANCE = 1e-4
CASES = [("dense", 0), ("dense", 1), ("dense", 2), ("tied_bidirectional", 0), ("tied_bidirectional", 1)]


@pytest.fixture(scope="module")
def pairs():
    return {name: load_pretrained(DATA / name / "target", DATA / name / "head")
            for name in ("dense", "tied_bidirectional")}


def recorded(name, case):
    activations = load_file(DATA / name / "activations.safetensors")
    expected = json.loads((DATA / name / "expected.json").read_text())
    return {key.split(".")[1]: value for key, value in activations.items() if key.startswith(f"{case}.")}, \
        expected["cases"][case]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_target_logits_and_tapped_states(pairs, name, case):
    pair, (activations, _) = pairs[name], recorded(name, case)
    prompt = jnp.asarray(activations["prompt"], jnp.int32)[None]
    size = prompt.shape[1]
    out = target_forward(pair.target_config, pair.params.target, prompt, jnp.arange(size, dtype=jnp.int32)[None],
                         causal_bits(1, size), KVCache.create(pair.target_config, 1, 1), jnp.zeros((1,), jnp.int32),
                         pair.head_config.target_layer_ids)
    logits = target_logits(pair.target_config, pair.params.target, out.hidden)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[0], activations["target_logits"], atol=TOLERANCE)
    np.testing.assert_allclose(out.tapped[0], activations["target_hidden"], atol=TOLERANCE)


@pytest.mark.parametrize("case", range(3))
def test_mixture_of_experts(case):
    """A Qwen3-MoE target alone: logits of the prompt, greedy tokens."""
    pair, (activations, expected) = load_pretrained(DATA / "moe" / "target"), recorded("moe", case)
    assert pair.target_config.has_experts(0)
    prompt = jnp.asarray(activations["prompt"], jnp.int32)[None]
    size = prompt.shape[1]

    @jax.jit
    def logits(params):
        out = target_forward(pair.target_config, params, prompt, jnp.arange(size, dtype=jnp.int32)[None],
                             causal_bits(1, size), KVCache.create(pair.target_config, 1, 1), jnp.zeros((1,), jnp.int32))
        return target_logits(pair.target_config, params, out.hidden[0])

    np.testing.assert_allclose(logits(pair.params.target), activations["target_logits"], atol=TOLERANCE)
    out = generate(pair, prompt[0].tolist(), max_new_tokens=expected["max_new"], tree=None, eos_token_ids=())
    assert out.token_ids == expected["ar_token_ids"]


def first_draft(pair, prompt, chunk):
    """The whole way: prompt in chunks, both caches filled, then the first draft's logits."""
    drafter = HeadDrafter(pair.target_config, pair.head_config, TreeConfig())
    decoder = Decoder(pair.target_config, drafter)
    tokens = jnp.zeros((1, 128), jnp.int32).at[0, :len(prompt)].set(jnp.asarray(prompt, jnp.int32))
    count, keys = jnp.asarray([len(prompt)], jnp.int32), jax.random.key(0)[None]
    sampler = Sampler.create(SamplingParams())
    prefix = jax.jit(prefill, static_argnums=(0, 1))(decoder, chunk, pair.params, sampler, tokens, count, keys)
    state = create_state(decoder, 1, 256, sampler, jnp.asarray([-1], jnp.int32))
    state = insert(decoder, state, prefix, jnp.zeros((1,), jnp.int32), tokens, count,
                   jnp.asarray([200], jnp.int32), keys)
    return drafter.draft_logits(pair.params, state.drafter, prefix.first_token, count)[0][0, 1:]


@pytest.mark.parametrize("chunk", [32, 128])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_draft_logits_after_the_prompt(pairs, name, case, chunk):
    activations, _ = recorded(name, case)
    logits = first_draft(pairs[name], activations["prompt"], chunk)
    np.testing.assert_allclose(logits, activations["draft_logits"], atol=TOLERANCE)


@pytest.mark.parametrize(("name", "changes"), [
    ("dense", {"causal": False}), ("dense", {"target_layer_ids": (2, 4, 6)}), ("tied_bidirectional", {"causal": True})])
def test_the_known_traps_show_as_large_errors(pairs, name, changes):
    """A lost causal flag or a tap off by one is far outside the tolerance above."""
    activations, _ = recorded(name, 0)
    wrong = dataclasses.replace(pairs[name], head_config=dataclasses.replace(pairs[name].head_config, **changes))
    error = np.abs(first_draft(wrong, activations["prompt"], 128) - activations["draft_logits"]).max()
    assert error > 1


@pytest.mark.parametrize(("name", "case"), CASES)
def test_whole_runs(pairs, name, case):
    pair, (activations, expected) = pairs[name], recorded(name, case)
    prompt = activations["prompt"].tolist()
    plain = generate(pair, prompt, max_new_tokens=expected["max_new"], tree=None, eos_token_ids=())
    assert plain.token_ids == expected["ar_token_ids"]
    assert plain.accept_lengths == [1] * (expected["max_new"] - 1)
    for run in expected["runs"]:
        out = generate(pair, prompt, max_new_tokens=expected["max_new"], eos_token_ids=(),
                       tree=TreeConfig("accum_logp", run["width"], run["budget"]))
        assert out.token_ids == run["token_ids"]
        assert out.accept_lengths == run["accept_lengths"]
        assert out.tree_sizes == run["tree_sizes"]


@pytest.mark.parametrize(("name", "kernels", "tokens"), [
    ("dense", "pallas_interpret", 24), ("tied_bidirectional", "pallas_interpret", 24),
    ("dense", "triton_interpret", 8)])
def test_whole_runs_with_the_kernels_interpreted(pairs, name, kernels, tokens):
    """Prompt, drafts and trees through the GPU kernels give the reference's tokens and accepted lengths."""
    if kernels == "triton_interpret":
        pytest.importorskip("torch")
        pytest.importorskip("triton", minversion="3.7")
    prompt = recorded(name, 0)[0]["prompt"].tolist()
    runs = []
    for backend in ("reference", kernels):
        pair = dataclasses.replace(
            pairs[name], target_config=dataclasses.replace(pairs[name].target_config, kernels=backend),
            head_config=dataclasses.replace(pairs[name].head_config, kernels=backend))
        run = generate(pair, prompt, max_new_tokens=tokens, tree=TreeConfig(budget=20))
        runs.append((run.token_ids, run.accept_lengths))
    assert runs[0] == runs[1]
    assert max(runs[0][1]) > 1


def test_a_mixture_of_experts_with_the_kernels_interpreted():
    pair = load_pretrained(DATA / "moe" / "target")
    pair = dataclasses.replace(pair, target_config=dataclasses.replace(pair.target_config, kernels="pallas_interpret"))
    activations, expected = recorded("moe", 0)
    run = generate(pair, activations["prompt"].tolist(), max_new_tokens=12, tree=None, eos_token_ids=())
    assert run.token_ids == expected["ar_token_ids"][:12]
