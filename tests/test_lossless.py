"""The product: tree decoding gives the tokens of plain decoding. In float64, everywhere but at exact ties."""

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
from tests.models import BUILDERS, random_pair, tiny_head, tiny_moe, tiny_target


def prompts_of(rng, count, vocab, longest=70):
    return [rng.integers(0, vocab, rng.integers(1, longest)).tolist() for _ in range(count)]


def random_experts(seed, layers):
    """The fields of a mixture of experts, from one expert to many; sometimes with dense layers between."""
    rng = np.random.default_rng(seed)
    count = int(rng.choice([1, 3, 8, 16]))
    return {"num_experts": count, "num_experts_per_tok": int(rng.integers(1, min(count, 4) + 1)),
            "moe_intermediate_size": int(rng.choice([5, 12])), "norm_topk_prob": bool(rng.integers(2)),
            "dense_layers": tuple(i for i in range(1, layers) if rng.integers(2))}


def random_case(seed, experts=False):
    """A random target, head, tree, batch, prompts and EOS: everything that can vary."""
    rng = np.random.default_rng(seed)
    kv_heads, group = int(rng.choice([1, 2, 3])), int(rng.choice([1, 2, 4]))
    target = tiny_target(vocab_size=int(rng.choice([5, 17, 40])), hidden_size=int(rng.choice([12, 16])),
                         num_layers=int(rng.integers(1, 3)), num_heads=kv_heads * group, num_kv_heads=kv_heads,
                         head_dim=int(rng.choice([4, 6, 8])), qk_norm=bool(rng.integers(2)),
                         qkv_bias=bool(rng.integers(2)), tie_embeddings=bool(rng.integers(2)))
    if experts:
        target = dataclasses.replace(target, **random_experts(seed, target.num_layers))
    taps = tuple(sorted(rng.choice(target.num_layers, rng.integers(1, target.num_layers + 1), replace=False).tolist()))
    head = tiny_head(target, block_size=int(rng.choice([2, 4, 9, 16])), causal=bool(rng.integers(2)),
                     num_layers=1 + seed % 2, target_layer_ids=taps)
    budget = int(rng.choice([1, 2, 3, 7, 16, 33, 64, 100, 256]))
    tree = TreeConfig(BUILDERS[seed % 3], int(rng.integers(1, 17)), budget)
    count = int(rng.integers(1, 6))
    return {"pair": random_pair(seed, target, head), "tree": tree, "prompts": prompts_of(rng, count, target.vocab_size),
            "batch": int(rng.integers(1, count + 1)), "max_new_tokens": int(rng.integers(2, 60)),
            "eos": tuple(rng.choice(target.vocab_size, rng.integers(0, 3), replace=False).tolist())}


@pytest.mark.parametrize(("seed", "experts"), [*((seed, False) for seed in range(22)),
                                               *((seed, True) for seed in range(30, 36))])
def test_random_models_trees_and_batches(seed, experts):
    case = random_case(seed, experts)
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


@pytest.mark.parametrize(("length", "target"), [(1, None), (31, None), (32, None), (33, None), (300, None),
                                                (33, tiny_moe())])
def test_plain_decoding_equals_full_forwards(length, target):
    """Across the edges of prompt chunks: 300 tokens are read in two."""
    pair = random_pair(length, target)
    prompt = np.random.default_rng(length).integers(0, 23, length).tolist()
    assert generate(pair, prompt, max_new_tokens=12, tree=None).token_ids == naive_greedy(pair, prompt, 12)


@pytest.mark.parametrize(("builder", "make"), [("accum_logp", tiny_target), ("best_first", tiny_target),
                                               ("accum_logp", tiny_moe)])
def test_float32_differs_only_at_near_ties(builder, make):
    """In float32 another token is allowed only where two logits are closer than 1e-4."""
    target = make(dtype="float32", vocab_size=200, hidden_size=32)
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


@pytest.fixture(scope="module")
def twins():
    """(half the vocabulary, answers of a tree and of plain decoding): every LM-head column is there twice."""
    half, width = 2499, 128
    target = tiny_target(vocab_size=2 * half + 1, hidden_size=width, num_layers=1, num_heads=1, num_kv_heads=1,
                         intermediate_size=16)
    pair = random_pair(0, target, tiny_head(target, target_layer_ids=(0,), num_heads=1, block_size=3))
    params = pair.params.target["params"]
    params["lm_head"] = params["lm_head"].at[:, half:2 * half].set(params["lm_head"][:, :half])
    prompts = [np.random.default_rng(i).integers(0, 2 * half, 10).tolist() for i in range(6)]
    tree, plain = ([a.token_ids for a in generate(pair, prompts, max_new_tokens=20, tree=tree, batch_size=1)]
                   for tree in (TreeConfig("accum_logp", 5, 16), None))
    return half, tree, plain


def test_exact_ties_differ_by_nothing_else(twins):
    """Until an answer differs from the plain one, it is the same; where it differs, by a twin."""
    half, trees, plains = twins
    for tree, plain in zip(trees, plains, strict=True):
        first = next(((a, b) for a, b in zip(tree, plain, strict=True) if a != b), None)
        assert first is None or abs(first[0] - first[1]) == half


@pytest.mark.xfail(strict=False, reason="a product rounds a column differently in a tree's rows than in the one row of "
                                        "plain decoding, so that two equal columns are told apart by rounding; which "
                                        "processors do it depends on the library of products")
def test_exact_ties_are_the_plain_tokens(twins):
    _, trees, plains = twins
    assert trees == plains
