"""Sampled tree decoding follows the target's distribution over whole sequences, by chi-square on a model small enough
to enumerate; two deliberately wrong samplers fail the same test."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jetspec_jax import SamplingParams, TreeConfig, decode
from jetspec_jax.attention import causal_bits
from jetspec_jax.cache import KVCache
from jetspec_jax.generate import generate
from jetspec_jax.pair import Pair
from jetspec_jax.target import target_forward, target_logits
from tests.models import random_pair, tiny_head, tiny_target
from tests.test_sampling import sorted_warp

VOCAB, LENGTH, PROMPT, DRAWS = 4, 3, [1, 3, 0], 3000


@pytest.fixture(scope="module")
def pair():
    target = tiny_target(vocab_size=VOCAB)
    return random_pair(2, target, tiny_head(target))


def exact_distribution(pair, sampling):
    """Probability of every sequence of LENGTH tokens, by one full forward over each of them."""
    sequences = np.asarray(list(itertools.product(range(VOCAB), repeat=LENGTH)), np.int32)
    ids = np.concatenate([np.broadcast_to(np.asarray(PROMPT, np.int32), (len(sequences), len(PROMPT))), sequences], 1)
    batch, size = ids.shape
    positions = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[None], ids.shape)
    out = target_forward(pair.target_config, pair.params.target, jnp.asarray(ids), positions, causal_bits(batch, size),
                         KVCache.create(pair.target_config, batch, 1), jnp.zeros((batch,), jnp.int32))
    logits = np.asarray(target_logits(pair.target_config, pair.params.target, out.hidden))
    logp = np.zeros(batch)
    for row, sequence in enumerate(sequences):
        for i, token in enumerate(sequence):
            warped = sorted_warp(logits[row, len(PROMPT) + i - 1], sampling.temperature, sampling.top_k, sampling.top_p)
            logp[row] += warped[token]
    return np.exp(logp)


def p_value(pair, sampling, seed):
    outs = generate(pair, [PROMPT] * DRAWS, max_new_tokens=LENGTH, batch_size=250, tree=TreeConfig(width=3, budget=12),
                    sampling=sampling, seed=seed)
    codes = [int(np.ravel_multi_index(out.token_ids, (VOCAB,) * LENGTH)) for out in outs]
    observed = np.bincount(codes, minlength=VOCAB**LENGTH)
    expected = exact_distribution(pair, sampling) * DRAWS
    assert not observed[expected == 0].any()
    common = expected >= 5  # rare sequences are counted together
    lump = lambda counts: np.append(counts[common], max(counts[~common].sum(), 1e-9))  # noqa: E731
    return stats.chisquare(lump(observed), lump(expected), sum_check=False).pvalue


@pytest.mark.parametrize("sampling", [SamplingParams(1.5), SamplingParams(2.0, top_k=3, top_p=0.9)])
def test_sequences_follow_the_targets_distribution(pair, sampling):
    assert p_value(pair, sampling, seed=0) > 1e-3


def same_noise_everywhere(sampler, logits, keys, position, offset, depths):
    """Wrong: noise is not keyed by position, so that tokens depend on each other."""
    return REAL(sampler, logits, keys, jnp.zeros_like(position), jnp.zeros_like(offset), depths)


def greedy_inside_the_tree(sampler, logits, keys, position, offset, depths):
    """Wrong: nodes below the root take the argmax."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(offset > 0, best, REAL(sampler, logits, keys, position, offset, depths))


REAL = decode.choose


@pytest.mark.parametrize("wrong", [same_noise_everywhere, greedy_inside_the_tree])
def test_a_wrong_sampler_fails_the_same_test(monkeypatch, pair, wrong):
    monkeypatch.setattr(decode, "choose", wrong)
    jax.clear_caches()
    fresh = Pair(pair.target_config, pair.head_config, pair.params)  # with programs of its own
    assert p_value(fresh, SamplingParams(1.5), seed=0) < 1e-6
