"""The product: tree decoding gives the tokens of plain decoding. In float64, exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jetspec_jax import SamplingParams, TreeConfig
from jetspec_jax.attention import causal_bits
from jetspec_jax.cache import KVCache
from jetspec_jax.generate import generate
from jetspec_jax.target import target_forward, target_logits
from tests.models import random_pair, run_with_table, tiny_head, tiny_target

BUILDERS = ("accum_logp", "best_first", "chain")


def prompts_of(rng, count, vocab, longest=70):
    return [rng.integers(0, vocab, rng.integers(1, longest)).tolist() for _ in range(count)]


def random_case(seed):
    """A random target, head, tree, batch, prompts and EOS: everything that can vary."""
    rng = np.random.default_rng(seed)
    kv_heads, group = int(rng.choice([1, 2, 3])), int(rng.choice([1, 2, 4]))
    target = tiny_target(vocab_size=int(rng.choice([5, 17, 40])), hidden_size=int(rng.choice([12, 16])),
                         num_layers=int(rng.integers(1, 4)), num_heads=kv_heads * group, num_kv_heads=kv_heads,
                         head_dim=int(rng.choice([4, 6, 8])), qk_norm=bool(rng.integers(2)),
                         qkv_bias=bool(rng.integers(2)), tie_embeddings=bool(rng.integers(2)))
    taps = tuple(sorted(rng.choice(target.num_layers, rng.integers(1, target.num_layers + 1), replace=False).tolist()))
    head = tiny_head(target, block_size=int(rng.choice([2, 4, 9, 16])), causal=bool(rng.integers(2)),
                     num_layers=int(rng.integers(1, 3)), target_layer_ids=taps)
    budget = int(rng.choice([1, 2, 3, 7, 16, 33, 64, 100, 256]))
    tree = TreeConfig(BUILDERS[seed % 3], int(rng.integers(1, 17)), budget)
    count = int(rng.integers(1, 6))
    return {"pair": random_pair(seed, target, head), "tree": tree, "prompts": prompts_of(rng, count, target.vocab_size),
            "batch": int(rng.integers(1, count + 1)), "max_new_tokens": int(rng.integers(2, 60)),
            "eos": tuple(rng.choice(target.vocab_size, rng.integers(0, 3), replace=False).tolist())}


@pytest.mark.parametrize("seed", range(30))
def test_random_models_trees_and_batches(seed):
    case = random_case(seed)
    sampling = SamplingParams() if seed % 4 else SamplingParams(0.9, top_k=None if seed % 8 else 4,
                                                                top_p=0.9 if seed % 12 else None)
    outs = [generate(case["pair"], case["prompts"], max_new_tokens=case["max_new_tokens"], tree=tree,
                     batch_size=batch, eos_token_ids=case["eos"], sampling=sampling, seed=seed)
            for tree, batch in ((case["tree"], case["batch"]), (None, len(case["prompts"])))]
    for tree, plain in zip(*outs, strict=True):
        assert tree.token_ids == plain.token_ids
        assert tree.finish_reason == plain.finish_reason
        assert plain.accept_lengths == [1] * (len(plain.token_ids) - 1)
        assert sum(tree.accept_lengths) >= len(tree.token_ids) - 1
        assert len(tree.accept_lengths) == len(tree.tree_sizes) == tree.rounds


def naive_greedy(pair, prompt, tokens):
    """One full forward per token, no cache at all: plain decoding checked against its meaning."""
    config, ids = pair.target_config, list(prompt)
    size = len(prompt) + tokens

    @jax.jit
    def last_logits(padded, count):
        out = target_forward(config, pair.params.target, padded[None], jnp.arange(size, dtype=jnp.int32)[None],
                             causal_bits(1, size), KVCache.create(config, 1, 1), jnp.zeros((1,), jnp.int32))
        return target_logits(config, pair.params.target, out.hidden[0, count - 1])

    for _ in range(tokens):
        padded = jnp.asarray(ids + [0] * (size - len(ids)), jnp.int32)
        ids.append(int(jnp.argmax(last_logits(padded, len(ids)))))
    return ids[len(prompt):]


@pytest.mark.parametrize("length", [1, 31, 32, 33, 300])
def test_plain_decoding_equals_full_forwards(length):
    """Across the edges of prompt chunks: 300 tokens are read in two."""
    pair = random_pair(length)
    prompt = np.random.default_rng(length).integers(0, 23, length).tolist()
    assert generate(pair, prompt, max_new_tokens=12, tree=None).token_ids == naive_greedy(pair, prompt, 12)


def one_hot_table(tokens, positions, vocab, spread=0.0, seed=0):
    """Position-wise logits that favour tokens[p] at position p, with noise of size `spread`."""
    table = spread * np.random.default_rng(seed).standard_normal((positions, vocab))
    table[np.arange(len(tokens)), tokens] += 3.0
    return table


@pytest.fixture(scope="module")
def known():
    """A model, a prompt, and what plain decoding says."""
    pair = random_pair(3)
    prompt = [4, 1, 7, 7, 2]
    plain = generate(pair, prompt, max_new_tokens=60, tree=None)
    assert len(set(plain.token_ids)) > 4  # not a degenerate text
    return pair, prompt, plain.token_ids


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("width", [1, 3])
def test_a_perfect_head_is_accepted_whole(known, builder, width):
    pair, prompt, plain = known
    table = one_hot_table(prompt + plain, 80, 23)
    out, = run_with_table(pair, table, [prompt], TreeConfig(builder, width, 256))
    block = pair.head_config.block_size
    assert out.token_ids == plain[:40]
    assert out.accept_lengths == [block] * (-(-39 // block))


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("budget", [1, 2, 5, 16, 64, 256])
def test_a_head_that_is_sometimes_right(known, builder, budget):
    pair, prompt, plain = known
    table = one_hot_table(prompt + plain, 80, 23, spread=2.0, seed=budget)
    out, = run_with_table(pair, table, [prompt], TreeConfig(builder, 4, budget))
    assert out.token_ids == plain[:40]
    if budget >= 16:
        assert len(set(out.accept_lengths)) > 2  # paths of many lengths were taken


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_head_that_always_says_the_same(known, builder):
    pair, prompt, plain = known
    table = np.full((80, 23), -np.inf)
    table[:, plain[3]] = 0.0
    out, = run_with_table(pair, table, [prompt], TreeConfig(builder, 2, 9))
    assert out.token_ids == plain[:40]


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf])
def test_scores_that_all_tie_or_mean_nothing(known, builder, value):
    pair, prompt, plain = known
    out, = run_with_table(pair, np.full((80, 23), value), [prompt], TreeConfig(builder, 16, 64))
    assert out.token_ids == plain[:40]


@pytest.mark.parametrize("at", [1, 2, 5, 6, 7, 20])
def test_an_end_token_anywhere_in_an_accepted_path(known, at):
    """With a perfect head every round accepts six: the end token falls on each place of a path."""
    pair, prompt, plain = known
    table = one_hot_table(prompt + plain, 80, 23)
    eos = plain[at]
    first = plain.index(eos)
    out, = run_with_table(pair, table, [prompt], TreeConfig(width=2), eos=(eos, 22))
    expected = generate(pair, prompt, max_new_tokens=40, tree=None, eos_token_ids=(eos, 22))
    assert out.token_ids == expected.token_ids == plain[:first + 1]
    assert out.finish_reason == expected.finish_reason == "stop"


def test_a_cache_filled_to_its_last_slot(known):
    """Prompt, answer and the overhang of the last path end exactly at the last slot, and at the context limit."""
    pair, prompt, plain = known
    block = pair.head_config.block_size
    limit = 256 - block  # `generate` then allocates exactly 256 slots
    config = dataclasses.replace(pair.target_config, max_positions=limit)
    pair = dataclasses.replace(pair, target_config=config)
    long_prompt = (prompt + plain) * 3
    reference = generate(pair, long_prompt, max_new_tokens=1000, tree=None)
    assert len(reference.token_ids) + len(long_prompt) == limit
    assert reference.finish_reason == "context"
    table = one_hot_table(long_prompt + reference.token_ids, limit + 20, 23)
    for shift in range(block):  # the last round starts at each possible distance from the end
        start = long_prompt + reference.token_ids[:shift]
        out, = run_with_table(pair, table, [start], TreeConfig(width=2, budget=40), max_new_tokens=1000)
        assert out.token_ids == reference.token_ids[shift:]
        assert out.finish_reason == "context"
        assert out.accept_lengths[0] == block


@pytest.mark.parametrize("builder", BUILDERS)
def test_float32_differs_only_at_near_ties(builder):
    """In float32 another token is allowed only where two logits are closer than 1e-4."""
    target = tiny_target(dtype="float32", vocab_size=200, hidden_size=32, num_layers=4)
    pair = random_pair(11, target, tiny_head(target))
    rng = np.random.default_rng(0)
    for prompt in prompts_of(rng, 6, 200):
        tree = generate(pair, prompt, max_new_tokens=50, tree=TreeConfig(builder, 5, 48)).token_ids
        plain = generate(pair, prompt, max_new_tokens=50, tree=None).token_ids
        if tree != plain:
            at = next(i for i, (a, b) in enumerate(zip(tree, plain, strict=True)) if a != b)
            ids = jnp.asarray(prompt + plain[:at], jnp.int32)[None]
            out = target_forward(target, pair.params.target, ids, jnp.arange(ids.shape[1], dtype=jnp.int32)[None],
                                 causal_bits(1, ids.shape[1]), KVCache.create(target, 1, 1),
                                 jnp.zeros((1,), jnp.int32))
            logits = np.asarray(target_logits(target, pair.params.target, out.hidden[0, -1]))
            assert abs(logits[tree[at]] - logits[plain[at]]) < 1e-4


@pytest.mark.parametrize("sampling", [SamplingParams(1.0), SamplingParams(0.7, top_k=5), SamplingParams(1.3, top_p=0.8),
                                      SamplingParams(2.0, top_k=12, top_p=0.95)])
@pytest.mark.parametrize("builder", BUILDERS)
def test_sampled_trees_draw_the_tokens_of_plain_sampling(known, builder, sampling):
    pair, prompt, _ = known
    prompts = [prompt, prompt, prompt[:2]]
    for seed in (0, 1, 2**32 - 1):
        plain = generate(pair, prompts, max_new_tokens=30, tree=None, sampling=sampling, seed=seed)
        tree = generate(pair, prompts, max_new_tokens=30, tree=TreeConfig(builder, 6, 60), sampling=sampling,
                        seed=seed, batch_size=2)
        assert [o.token_ids for o in tree] == [o.token_ids for o in plain]
        assert plain[0].token_ids != plain[1].token_ids  # two sequences of one call have their own noise
    assert sum(o.rounds for o in tree) < sum(o.rounds for o in plain)
