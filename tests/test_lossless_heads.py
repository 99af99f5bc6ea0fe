"""Losslessness with heads whose proposals are known: perfect, sometimes right, constant, meaningless."""

import dataclasses

import numpy as np
import pytest

from jetspec_jax import SamplingParams, TreeConfig
from jetspec_jax.generate import generate
from tests.models import BUILDERS, random_pair, run_with_table


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
    for shift in (0, 1, block - 2, block - 1):  # the last round starts at each possible distance from the end
        start = long_prompt + reference.token_ids[:shift]
        out, = run_with_table(pair, table, [start], TreeConfig(width=2, budget=40), max_new_tokens=1000)
        assert out.token_ids == reference.token_ids[shift:]
        assert out.finish_reason == "context"
        assert out.accept_lengths[0] == block


@pytest.mark.parametrize(("sampling", "builder"), [
    (SamplingParams(1.0), "accum_logp"), (SamplingParams(0.7, top_k=5), "best_first"),
    (SamplingParams(1.3, top_p=0.8), "best_first"), (SamplingParams(2.0, top_k=12, top_p=0.95), "chain")])
def test_sampled_trees_draw_the_tokens_of_plain_sampling(known, builder, sampling):
    pair, prompt, _ = known
    prompts, drafted = [prompt, prompt, prompt[:2]], 0
    for seed in (0, 1, 2**32 - 1):
        plain = generate(pair, prompts, max_new_tokens=30, tree=None, sampling=sampling, seed=seed)
        tree = generate(pair, prompts, max_new_tokens=30, tree=TreeConfig(builder, 6, 60), sampling=sampling,
                        seed=seed, batch_size=2)
        assert [o.token_ids for o in tree] == [o.token_ids for o in plain]
        assert plain[0].token_ids != plain[1].token_ids  # two sequences of one call have their own noise
        drafted += sum(o.rounds for o in plain) - sum(o.rounds for o in tree)
    assert drafted > 0 or builder == "chain"  # some drafts were accepted, so their path was taken
