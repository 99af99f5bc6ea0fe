"""Drafters other than the parallel head: what they propose, told independently, and that no token is lost to it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jetspec_jax import JetSpecError, PromptLookup, SamplingParams, TreeConfig
from jetspec_jax.autoregressive import AutoregressiveDrafter, autoregressive_shapes
from jetspec_jax.config import AutoregressiveHeadConfig
from jetspec_jax.decode import Decoder
from jetspec_jax.draft import HeadDrafter, NoDrafter, Params, plain_nodes
from jetspec_jax.generate import Run, generate, read_requests
from jetspec_jax.lookup import LookupDrafter
from jetspec_jax.sampling import Sampler
from jetspec_jax.training.batches import Batches
from jetspec_jax.training.evaluate import accepted_on
from tests.models import PROGRAMS, random_pair, random_params, tiny_head, tiny_target
from tests.test_training import LAYERS, PROMPTS, config_of, losses, record, trainer_of

SAMPLING = [SamplingParams(), SamplingParams(0.9, top_p=0.8)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tree", [TreeConfig("best_first", 3, 4), TreeConfig("accum_logp", 2, 3),
                                  TreeConfig("chain", budget=2), TreeConfig(budget=1)], ids=str)
def test_a_small_tree_drafts_what_it_can_use(causal, tree, monkeypatch):
    """Fewer slots where a causal head allows it, and then the very trees of all slots."""
    target = tiny_target()
    pair = random_pair(5, target, tiny_head(target, block_size=6, causal=causal))
    drafter = HeadDrafter(target, pair.head_config, tree)
    assert drafter.slots == (max(2, tree.budget) if causal else 6)
    state = drafter.create(2, 40)
    state = dataclasses.replace(state, pending=state.pending + 0.3, pending_count=jnp.asarray([1, 1], jnp.int32))
    at = (jnp.asarray([[3, 1, 4], [9, 2, 6]], jnp.int32), jnp.asarray([2, 1], jnp.int32))
    found = drafter.propose(pair.params, state, *at)[0]
    monkeypatch.setattr(HeadDrafter, "slots", 6)
    jax.tree.map(np.testing.assert_array_equal, found, drafter.propose(pair.params, state, *at)[0])


@pytest.mark.parametrize("tree", [TreeConfig("best_first", 3, 4), TreeConfig("best_first", 3, 3),
                                  TreeConfig("best_first", 5, 2), TreeConfig("chain", budget=3)], ids=str)
def test_a_small_autoregressive_tree_takes_the_passes_that_it_can_use(tree, monkeypatch):
    """As many levels, and rows a level, as there are nodes below the root; and then the very trees of all of them."""
    pair = autoregressive_pair(block_size=6)
    drafter = AutoregressiveDrafter(pair.target_config, pair.head_config, tree)
    state = drafter.create(2, 40)
    state = dataclasses.replace(state, pending=state.pending + 0.3, pending_count=jnp.asarray([1, 1], jnp.int32))
    at = (jnp.asarray([[3, 1, 4], [9, 2, 6]], jnp.int32), jnp.asarray([2, 1], jnp.int32))
    passes = []
    run = AutoregressiveDrafter._run
    monkeypatch.setattr(AutoregressiveDrafter, "_run", lambda self, *args: passes.append(args[1].shape) or
                        run(self, *args))
    found = drafter.propose(pair.params, state, *at)[0]
    below = tree.budget - 1
    rows = 1 if tree.builder == "chain" else min(below, tree.width)
    assert passes == [(2, drafter.max_path)] + [(2, rows)] * (below - 1)
    monkeypatch.setattr(AutoregressiveDrafter, "_most_below", 100)
    passes.clear()
    full = drafter.propose(pair.params, state, *at)[0]
    assert len(passes) == 5
    jax.tree.map(np.testing.assert_array_equal, found, full)


def naive_lookup(tokens, lookup):
    """The longest run of last tokens that occurred before, at its latest place; what followed it."""
    for size in range(min(lookup.ngram, len(tokens)), 0, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size:end] == tokens[-size:]:
                return tokens[end:end + lookup.length]
    return []


@pytest.mark.parametrize("lookup", [PromptLookup(), PromptLookup(1, 3), PromptLookup(4, 20)])
def test_lookup_finds_the_latest_longest_run(lookup):
    rng = np.random.default_rng(0)
    drafter = LookupDrafter(lookup)
    propose = jax.jit(lambda tokens, position: drafter.propose(Params({}, {}), None, tokens, position)[0])
    sequences = [rng.integers(0, vocab, size).tolist() for vocab in (2, 4, 30) for size in (1, 2, 3, 9, 20, 24)]
    tokens = np.zeros((len(sequences), 24), np.int32)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[:len(sequence)] = sequence
    tree = propose(jnp.asarray(tokens), jnp.asarray([len(s) - 1 for s in sequences], jnp.int32))
    found = 0
    for b, sequence in enumerate(sequences):
        expected = naive_lookup(sequence, lookup)
        size = int(tree.size[b])
        assert tree.token[b, :size].tolist() == [sequence[-1], *expected]
        assert tree.parent[b, :size].tolist() == list(range(-1, size - 1))
        found += bool(expected)
    assert 0 < found < len(sequences)


@pytest.mark.parametrize("sampling", SAMPLING)
def test_lookup_is_lossless(sampling):
    pair = random_pair(2, tiny_target(vocab_size=7))
    options = {"max_new_tokens": 40, "sampling": sampling, "batch_size": 2}
    prompts = [[1, 2, 3, 1, 2], [4], [5, 5, 5]]
    drafted = generate(pair, prompts, tree=PromptLookup(), **options)
    plain = generate(pair, prompts, tree=None, **options)
    assert [a.token_ids for a in drafted] == [a.token_ids for a in plain]
    assert sum(a.rounds for a in drafted) < sum(a.rounds for a in plain)


@pytest.mark.parametrize(("ngram", "length"), [(0, 3), (3, 0), (17, 3), (2.5, 3)])
def test_lookups_that_make_no_sense(ngram, length):
    with pytest.raises(JetSpecError, match=r"ngram|length"):
        PromptLookup(ngram, length)


def autoregressive_pair(seed=0, dtype="float64", **changes):
    target = tiny_target(dtype=dtype)
    fields = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 20, "num_layers": 1, "num_heads": 2,
              "num_kv_heads": 1, "head_dim": 8, "dtype": dtype, "block_size": 5, "target_layer_ids": (0, 1),
              "num_target_layers": 2}
    head = AutoregressiveHeadConfig(**{**fields, **changes})
    pair = random_pair(seed, target)
    params = random_params(autoregressive_shapes(head), np.random.default_rng(seed))
    return dataclasses.replace(pair, head_config=head, params=Params(pair.params.target, params), programs=PROGRAMS)


@pytest.mark.parametrize("tree", [TreeConfig(width=3, budget=9), TreeConfig("chain", 1, 5), TreeConfig(width=2)])
@pytest.mark.parametrize("sampling", SAMPLING)
def test_autoregressive_drafts_are_lossless(tree, sampling):
    pair = autoregressive_pair(4, num_layers=2)
    options = {"max_new_tokens": 25, "sampling": sampling, "batch_size": 2}
    drafted = generate(pair, PROMPTS, tree=tree, **options)
    plain = generate(pair, PROMPTS, tree=None, **options)
    assert [a.token_ids for a in drafted] == [a.token_ids for a in plain]


@pytest.mark.parametrize("tree", [TreeConfig("chain"), TreeConfig(width=3, budget=12)])
def test_autoregressive_training_sees_what_drafting_sees(tmp_path, tree):
    """Real rounds of a chain accept exactly what the unrolled passes of training foretell."""
    pair = autoregressive_pair(1, dtype="float32", block_size=5)
    dataset = record(pair, tmp_path / "d", tokens=30)
    # A few steps, so that something is accepted.
    trainer = trainer_of(pair, config_of(steps=60, anchors=40, learning_rate=1e-2))
    found, state = losses(trainer, trainer.create_state(pair.params.head), Batches(dataset, trainer.config))
    assert found[-1] < found[0] / 2
    pair = dataclasses.replace(pair, params=Params(pair.params.target, state.params))
    prompt = PROMPTS[1]
    run = generate(pair, prompt, tree=tree, max_new_tokens=30, eos_token_ids=())
    assert max(run.accept_lengths) > 2
    if tree.builder != "chain":
        return
    i = next(i for i in range(len(dataset)) if dataset.tokens(i)[:len(prompt)].tolist() == prompt)
    places = len(prompt) + np.cumsum([0, *run.accept_lengths])[:-1]
    inside = [k for k, place in enumerate(places) if place + 5 <= len(dataset.tokens(i)) - 1]
    batch = Batches(dataset, config_of(anchors=len(inside))).assemble([[i]], np.random.default_rng(0))
    batch = batch.replace(anchor=places[inside][None].astype(np.int32), anchor_real=np.ones((1, len(inside)), bool))
    foretold = accepted_on(pair.target_config, pair.head_config, (tree,), LAYERS, pair.params.head,
                           pair.params.target, jax.device_put(batch))
    assert foretold.tolist() == [[[run.accept_lengths[k] for k in inside]]]


def test_a_trained_autoregressive_head_is_saved_and_loaded(tmp_path):
    from jetspec_jax import checkpoint

    pair = autoregressive_pair(1, dtype="float32")
    with checkpoint.written_beside(tmp_path / "head") as folder:
        checkpoint.save(folder, pair.head_config, pair.params.head, source="test")
    config, params = checkpoint.load(tmp_path / "head")
    assert config == pair.head_config
    jax.tree.map(np.testing.assert_array_equal, params, pair.params.head)


@pytest.mark.parametrize(("batch", "slots"), [(0, 8), (1, 8), (2, 4), (3, 3), (5, 2), (8, 1), (32, 1)])
def test_plain_decoding_has_eight_rows_on_a_gpu(batch, slots):
    assert plain_nodes(batch, on_gpu=True) == slots
    assert plain_nodes(batch, on_gpu=False) == 1


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.9, top_k=5)])
@pytest.mark.parametrize("batch", [1, 2])
def test_unused_node_slots_of_plain_decoding_change_nothing(batch, sampling):
    pair, prompts = random_pair(3), [[1, 2, 3], [4, 5], [6]]
    found = []
    for nodes in (1, 8):
        decoder = Decoder(pair.target_config, NoDrafter(nodes=nodes))
        run = Run(pair, decoder, Sampler.create(sampling), (), 0, 9)
        chunks = run.steps(read_requests(pair, prompts, 9), batch, None)
        results = {chunk.index: chunk.result for chunk in chunks if chunk.result}
        found.append([(results[i].token_ids, results[i].accept_lengths, results[i].tree_sizes) for i in range(3)])
    assert found[0] == found[1]
    assert all(sizes == [1] * 8 for _, _, sizes in found[1])
