"""What is masked contributes nothing, whatever it holds; any score gives a valid tree; an answer without finite logits
ends in an error."""

import importlib
import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jetspec_jax import JetSpecError, SamplingParams, TreeConfig
from jetspec_jax import autoregressive as autoregressive_module
from jetspec_jax.attention import pack_bits
from jetspec_jax.autoregressive import autoregressive_shapes
from jetspec_jax.config import AutoregressiveHeadConfig
from jetspec_jax.draft import Params
from jetspec_jax.generate import generate, stream
from jetspec_jax.sampling import Sampler, choose, sequence_keys, sound
from jetspec_jax.tree import build_tree
from pallas_kernels import grouped_matmul, router, top_w, tree_build
from pallas_kernels.tree_attention import pallas, reference
from tests.models import Pair, random_pair, random_params, tiny_head, tiny_moe, tiny_target

NAN, INF = np.nan, np.inf
TREE = TreeConfig("accum_logp", 16, 40)


def dense_attention(q, new_k, new_v, mask, cache_k, cache_v, cached):
    """Each query over what it sees, one by one, in float64."""
    out = np.zeros(q.shape)
    group = q.shape[2] // new_k.shape[2]
    for b, n, h in np.ndindex(q.shape[:3]):
        kv, seen = h // group, mask[b, n]
        keys = np.concatenate([cache_k[b, kv, :cached[b]], new_k[b, seen, kv]]).astype(np.float64)
        values = np.concatenate([cache_v[b, kv, :cached[b]], new_v[b, seen, kv]]).astype(np.float64)
        weights = np.exp(keys @ q[b, n, h].astype(np.float64) / np.sqrt(q.shape[-1]))
        out[b, n, h] = weights @ values / weights.sum()
    return out


@pytest.fixture(params=["reference", "pallas", "triton"])
def attention(request):
    """The definition, and the GPU kernel of each lowering, interpreted."""
    if request.param == "reference":
        return reference.tree_attention
    if request.param == "pallas":
        kernel = pallas.tree_attention
    else:
        pytest.importorskip("torch")
        pytest.importorskip("triton", minversion="3.7")
        kernel = importlib.import_module("pallas_kernels.tree_attention.triton").tree_attention

    def interpreted(*arguments):
        with jax.numpy_rank_promotion("allow"):
            return kernel(*arguments, interpret=True)

    return interpreted


@pytest.mark.parametrize("poison", [(1.0, INF), (1.0, -INF), (1.0, NAN), (NAN, 1.0), (INF, INF), (-INF, NAN)])
@pytest.mark.parametrize("queries", [1, 9])
def test_attention_to_a_poisoned_token(attention, queries, poison):
    """Key and value of one tree node, and of all slots beyond the prefixes, hold `poison`."""
    rng = np.random.default_rng(0)
    batch, heads, kv_heads, width, slots, cached, bad = 2, 4, 2, 16, 64, np.asarray([21, 0]), 3
    mask = np.tril(rng.random((batch, queries, queries)) < 0.6) | np.eye(queries, dtype=bool)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    q, k, v = draw(batch, queries, heads, width), *(draw(batch, queries, kv_heads, width) for _ in range(2))
    caches = [draw(1, batch, kv_heads, slots, width) for _ in range(2)]
    expected = dense_attention(q, k, v, mask, *(side[0] for side in caches), cached)
    for new, side, value in zip((k, v), caches, poison, strict=True):
        for b in range(batch):
            side[0, b, :, cached[b]:] = value
        if queries > 1:
            new[:, bad, :, 5] = value  # one component of each head
    found = np.asarray(attention(*map(jnp.asarray, (q, k, v)), pack_bits(jnp.asarray(mask)),
                                 *map(jnp.asarray, caches), jnp.int32(0), jnp.asarray(cached, jnp.int32)))
    poisoned = mask[:, :, bad] if queries > 1 else np.zeros((batch, 1), bool)
    assert queries == 1 or 3 < poisoned.sum() < batch * queries - 3
    np.testing.assert_allclose(found[~poisoned], expected[~poisoned], atol=1e-5)
    if poison != (INF, INF) and not np.isinf(poison[0]):  # an infinite key may be an infinitely unlikely one
        assert not np.isfinite(found[poisoned]).all(axis=(1, 2)).any()  # who sees it does not get away with it


def test_a_poisoned_token_in_the_prefix_is_not_hidden(attention):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    cache_v = draw(1, 2, 1, 32, 16).at[0, 0, 0, 7, 2].set(INF)
    found = attention(draw(2, 1, 2, 16), draw(2, 1, 1, 16), draw(2, 1, 1, 16), jnp.ones((2, 1, 1), jnp.uint32),
                      draw(1, 2, 1, 32, 16), cache_v, jnp.int32(0), jnp.asarray([8, 20], jnp.int32))
    assert not np.isfinite(found[0]).all()
    assert np.isfinite(found[1]).all()


@pytest.mark.parametrize("interpret", [False, True])
def test_an_expert_that_overflows_for_others(interpret):
    """Expert 1 is infinite for everyone; tokens 0 and 2 did not choose it."""
    rng = np.random.default_rng(0)
    x, gate_up, down = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 16), (3, 16, 32), (3, 16, 16)))
    gate_up[1], gate_up[1, 0, :] = 0, 1e30
    down[1] = 1e30
    x[:, 0] = np.abs(x[:, 0]) + 1
    experts, weights = np.asarray([[0, 2], [1, 0], [2, 0], [2, 1]], np.int32), np.full((4, 2), 0.5, np.float32)

    def expert(e, row):
        gate, up = np.split(row.astype(np.float64) @ gate_up[e], 2)
        return (gate / (1 + np.exp(-gate)) * up) @ down[e]

    kernel = grouped_matmul.pallas if interpret else grouped_matmul.reference
    with jax.numpy_rank_promotion("allow"):
        found = kernel.grouped_mlp(*map(jnp.asarray, (x, experts, weights, gate_up, down)),
                                   **({"interpret": True} if interpret else {}))
    for n in (0, 2):
        np.testing.assert_allclose(found[n], sum(0.5 * expert(e, x[n]) for e in experts[n]), rtol=2e-4, atol=1e-4)
    assert not np.isfinite(found[1]).all()
    assert not np.isfinite(found[3]).all()


def edit(params, path, change):
    """Changes a parameter's values in place of it."""
    *folders, name = path.split("/")
    for folder in folders:
        params = params[folder]
    values = np.array(params[name])
    change(values)
    params[name] = jnp.asarray(values)


@pytest.mark.parametrize(("dtype", "large"), [("float16", 300.0), ("float32", 1e20)])
def test_a_rejected_node_that_overflows(dtype, large):
    """Token 5 overflows the MLPs and is never the target's choice; a bad head drafts it all the time."""
    target = tiny_target(dtype=dtype, num_layers=3, num_kv_heads=2, num_heads=2, vocab_size=17)
    pair = random_pair(3, target, tiny_head(target, block_size=4))
    params = pair.params.target["params"]

    def only_token_5_has_component_0(embedding):
        embedding[:, 0] = 0
        embedding[5] = np.eye(16)[0]

    edit(params, "embedding", only_token_5_has_component_0)
    edit(params, "lm_head", lambda w: w[:, 5].fill(0))
    for i in range(3):
        edit(params, f"layers_{i}/attention/o_proj/kernel", lambda w: w[:, 0].fill(0))
        edit(params, f"layers_{i}/mlp/down_proj/kernel", lambda w: w[:, 0].fill(0))
        edit(params, f"layers_{i}/mlp/gate_up_proj/kernel", lambda w: w[0].fill(large))
    rng = np.random.default_rng(0)
    prompts = [[int(x) for x in rng.integers(0, 17, 12) if x != 5] for _ in range(4)]
    plain = [generate(pair, prompt, max_new_tokens=12, tree=None) for prompt in prompts]
    tree = generate(pair, prompts, max_new_tokens=12, tree=TREE, batch_size=2)
    assert [a.token_ids for a in tree] == [a.token_ids for a in plain]
    assert max(max(a.tree_sizes) for a in tree) > 17  # so the trees hold every token
    for draft in (None, TREE):
        with pytest.warns(RuntimeWarning, match=rf"prompt 0.*not finite after 0 tokens.*{dtype}"):
            poisoned, healthy = generate(pair, [[1, 5, 2, 5, 3] * 14, prompts[0]], max_new_tokens=12, tree=draft,
                                         batch_size=1)
        assert (poisoned.token_ids, poisoned.finish_reason) == ([], "error")
        assert healthy.token_ids == plain[0].token_ids  # refilled into the row of the poisoned one


@pytest.mark.parametrize(("dtype", "large"), [("float16", 300.0), ("float32", 1e20)])
def test_an_expert_that_a_token_did_not_choose(dtype, large):
    """The sign of component 0 chooses the expert; expert 1 overflows for tokens that never choose it."""
    target = tiny_moe(dtype=dtype, num_layers=1, num_heads=2, num_kv_heads=2, num_experts=2, num_experts_per_tok=1,
                      vocab_size=17)
    pair = random_pair(3, target, tiny_head(target, block_size=4, target_layer_ids=(0,)))
    params = pair.params.target["params"]

    def choose_by_sign(embedding):
        embedding[:, 0] = 3
        embedding[:8, 0] = -3

    def route(router):
        router.fill(0)
        router[0] = 1, -1

    def overflow(gate_up):
        gate_up *= np.asarray(.1, gate_up.dtype)
        gate_up[1, 0] = large

    edit(params, "embedding", choose_by_sign)
    edit(params, "layers_0/attention/o_proj/kernel", lambda w: w.fill(0))
    edit(params, "layers_0/mlp/router", route)
    edit(params, "layers_0/post_attention_layernorm/scale", lambda w: w.fill(1))
    edit(params, "layers_0/mlp/gate_up_proj", overflow)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 17, 12).tolist() for _ in range(6)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prompt whose last token chose expert 1 ends in an error, alone as well
        alone = [generate(pair, [prompt], max_new_tokens=10, tree=None)[0] for prompt in prompts]
        for tree in (None, TREE):
            together = generate(pair, prompts, max_new_tokens=10, tree=tree, batch_size=6)
            assert [(a.token_ids, a.error) for a in together] == [(a.token_ids, a.error) for a in alone]
    assert sum(a.error is None for a in alone) >= 3


def check_tree(tree):
    """Parents before children, siblings of different tokens, each node one deeper, ancestors that follow parents."""
    for b in range(tree.size.shape[0]):
        size = int(tree.size[b])
        parent, depth, token, score = (np.asarray(x[b])[:size] for x in (tree.parent, tree.depth, tree.token,
                                                                         tree.score))
        bits = np.asarray(tree.ancestors[b])
        assert parent[0] == -1
        assert np.isfinite(score).all()
        assert len({(parent[n], token[n]) for n in range(size)}) == size
        for n in range(size):
            mine = {m for m in range(size) if bits[n, m // 32] >> (m % 32) & 1}
            if n:
                assert 0 <= parent[n] < n
                assert depth[n] == depth[parent[n]] + 1
                assert score[n] <= score[parent[n]]
                above = {m for m in range(size) if bits[parent[n], m // 32] >> (m % 32) & 1}
                assert mine == above | {n}
            else:
                assert mine == {0}


@pytest.mark.parametrize("backend", ["reference", "pallas_interpret"])
@pytest.mark.parametrize("builder", ["accum_logp", "best_first", "chain"])
def test_any_score_gives_a_valid_tree(builder, backend):
    rng = np.random.default_rng(0)
    special = np.asarray([NAN, -NAN, INF, -INF, -1e38, 1e38, 3.0, 0.0, -0.5, -2.0], np.float32)
    scores = [rng.choice(special, (4, 5, 3)), np.full((4, 5, 3), NAN), -np.full((4, 5, 3), NAN),
              np.full((4, 5, 3), -INF), np.full((4, 5, 3), INF)]
    tokens = jnp.asarray(np.stack([rng.permutation(9)[:3] for _ in range(20)]).reshape(4, 5, 3), jnp.int32)
    with jax.numpy_rank_promotion("allow"):
        for logp in scores:
            tree = build_tree(TreeConfig(builder, 3, 40), jnp.zeros((4,), jnp.int32), tokens,
                              jnp.asarray(logp, jnp.float32), backend)
            check_tree(tree)
            assert (np.asarray(tree.size) == (6 if builder == "chain" else 40)).all()


def test_kernel_and_reference_agree_on_any_score():
    rng = np.random.default_rng(1)
    special = np.asarray([0.0, -0.5, -2.0, -INF, NAN], np.float32)
    logp = rng.choice(special, (8, 6, 4))
    logp = -np.sort(-np.where(np.isnan(logp), -1e35, logp), axis=-1)  # most likely first
    logp = np.where(logp == np.float32(-1e35), NAN, logp).astype(np.float32)
    tokens = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), logp.shape)
    anchor = jnp.zeros((8,), jnp.int32)
    for best_first in (False, True):
        with jax.numpy_rank_promotion("allow"):
            found = tree_build.pallas.tree_build(anchor, tokens, jnp.asarray(logp), 33, best_first, interpret=True)
        expected = tree_build.reference.tree_build(anchor, tokens, jnp.asarray(logp), 33, best_first)
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("interpret", [False, True])
@pytest.mark.parametrize("size", [7, 4100])
def test_any_logits_give_different_tokens(size, interpret):
    rng = np.random.default_rng(size)
    rows = [np.full(size, value) for value in (NAN, -NAN, INF, -INF)]
    rows += [rng.choice([NAN, INF, -INF, 1.0, 2.0], size) for _ in range(4)]
    logits = jnp.asarray(np.stack(rows)[None], jnp.float32)
    kernel = top_w.pallas if interpret else top_w.reference
    with jax.numpy_rank_promotion("allow"):
        tokens, _ = kernel.top_w(logits, 5, **({"interpret": True} if interpret else {}))
    for row in np.asarray(tokens)[0].tolist():
        assert len(set(row)) == 5
        assert min(row) >= 0
        assert max(row) < size


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("budget", [9, 5])
def test_an_autoregressive_head_that_overflows(budget, sign, monkeypatch):
    """Below the depth where it met token 5 all scores are NaN, of either sign (they differ between CPU and GPU)."""
    original = autoregressive_module.top_logp

    def with_sign(*arguments, **options):
        tokens, logp = original(*arguments, **options)
        return tokens, jnp.where(jnp.isnan(logp), jnp.asarray(np.copysign(NAN, sign), logp.dtype), logp)

    monkeypatch.setattr(autoregressive_module, "top_logp", with_sign)
    target = tiny_target(dtype="float32", num_layers=1, vocab_size=11)
    like = tiny_head(target, target_layer_ids=(0,), block_size=4)
    head = AutoregressiveHeadConfig.like(like)
    pair, rng = random_pair(0, target, like), np.random.default_rng(0)

    def only_token_5_has_component_0(embedding):
        embedding[:, 0] = 0
        embedding[5] = np.eye(16)[0]

    edit(pair.params.target["params"], "embedding", only_token_5_has_component_0)
    params = random_params(autoregressive_shapes(head), rng)

    def keep_component_0(join):
        join[:, 0] = 0
        join[0, 0] = 1

    edit(params["params"], "join/kernel", keep_component_0)
    edit(params["params"], "layers_0/attention/o_proj/kernel", lambda w: w[:, 0].fill(0))
    edit(params["params"], "layers_0/mlp/gate_up_proj/kernel", lambda w: w[0].fill(1e20))
    prompts = [[int(x) for x in rng.integers(0, 11, 12) if x != 5] for _ in range(8)]
    drafting = Pair(target, head, Params(pair.params.target, params))
    plain = generate(pair, prompts, max_new_tokens=25, tree=None)
    tree = generate(drafting, prompts, max_new_tokens=25, tree=TreeConfig("accum_logp", 8, budget))
    assert [a.token_ids for a in tree] == [a.token_ids for a in plain]
    assert any(n > 1 for a in tree for n in a.accept_lengths)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [5, 130, 256, 4160, 49152])
def test_logits_from_which_no_token_can_be_chosen(size, dtype):
    """One NaN among many finite logits too, of either sign and anywhere: a CPU's maximum over many drops it."""
    rng = np.random.default_rng(size)
    logits = rng.standard_normal((60, 1, size)).astype(dtype)
    broken = {0: (0, NAN), 1: (size - 1, NAN), 2: (size // 2, -NAN), 3: (size - 1, INF), 4: (slice(None), -INF),
              5: (slice(None), NAN), 6: (slice(None), INF),
              **{row: (int(rng.integers(size)), NAN if row % 2 else -NAN) for row in range(7, 30)}}
    for row, (at, value) in broken.items():
        logits[row, 0, at] = value
    logits[30, 0, :-1] = -INF  # one token is left
    logits[31, 0, 0] = -INF
    logits[32, 0] = np.finfo(dtype).max
    logits[33, 0] = -np.finfo(dtype).max
    for function in (sound, jax.jit(sound, static_argnums=1)):
        assert np.asarray(function(jnp.asarray(logits), 1))[:, 0].tolist() == [False] * 30 + [True] * 30


@pytest.mark.parametrize("tree", [None, TREE])
@pytest.mark.parametrize("column", [7, 4158])
def test_one_damaged_column_of_the_lm_head(column, tree):
    """Its logit alone is NaN, among thousands."""
    target = tiny_target(dtype="float32", vocab_size=4160)
    pair = random_pair(3, target, tiny_head(target))
    edit(pair.params.target["params"], "lm_head", lambda w: w[0, column:column + 1].fill(NAN))
    with pytest.raises(JetSpecError, match="not finite after 0 tokens"):
        generate(pair, [1, 2, 3], max_new_tokens=5, tree=tree)


@pytest.mark.parametrize("interpret", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("normalised", [False, True])
def test_a_router_does_not_swallow_a_nan(normalised, sign, interpret):
    rng = np.random.default_rng(0)
    x, matrix = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((6, 16), (16, 5)))
    nan = jnp.float32(np.copysign(NAN, sign))
    x = x.at[2, 3].set(nan)
    kernel = router.pallas if interpret else router.reference
    with jax.numpy_rank_promotion("allow"):
        experts, weights = kernel.router(x, matrix, 2, normalised, **({"interpret": True} if interpret else {}))
    assert np.isnan(weights).tolist() == [[row == 2] * 2 for row in range(6)]
    assert all(0 <= a < 5 and 0 <= b < 5 and a != b for a, b in np.asarray(experts).tolist())
    _, damaged_weights = router.reference.router(x, matrix.at[0, 4].set(nan), 2, normalised)
    assert np.isnan(damaged_weights).all()


def test_scores_far_below_zero_are_scores(attention):
    """All keys are equal, so every value counts the same, however unlikely the keys are."""
    values = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 1, 16)), jnp.float32)
    empty = jnp.zeros((1, 1, 1, 16, 16), jnp.float32)
    found = attention(jnp.full((1, 3, 1, 16), 1e16, jnp.float32), jnp.full((1, 3, 1, 16), -1e16, jnp.float32), values,
                      jnp.full((1, 3, 1), 7, jnp.uint32), empty, empty, jnp.int32(0), jnp.zeros((1,), jnp.int32))
    np.testing.assert_allclose(found, np.broadcast_to(np.asarray(values).mean(axis=1, keepdims=True), found.shape),
                               atol=1e-6)


def test_zero_has_no_sign_among_scores():
    """lax.top_k orders -0.0 below 0.0, and a child must not come before its parent."""
    found = np.asarray(tree_build.reference.bounded(jnp.asarray([-0.0, 0.0, -NAN, 5.0, -1.0], jnp.float32)))
    assert np.signbit(found).tolist() == [False, False, True, False, True]
    assert found.tolist() == [0.0, 0.0, np.float32(-1e30), 0.0, -1.0]


def damaged(pair, token):
    """The same pair with a NaN in the embedding of one token."""
    params = pair.params.target["params"]
    embedding = params["embedding"].at[token, 0].set(NAN)
    return replace(pair, params=Params({"params": {**params, "embedding": embedding}}, pair.params.head))


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.9, top_k=12, top_p=0.95)])
@pytest.mark.parametrize("tree", [None, TreeConfig("best_first", 8, 24)])
def test_an_answer_that_meets_a_damaged_weight_ends_there(tree, sampling):
    """It keeps what came before, the damaged token included, and the others go on."""
    pair, prompts = random_pair(5), [[1, 2, 3], [4, 5], [6], [7, 8]]
    options = {"max_new_tokens": 20, "tree": tree, "sampling": sampling, "eos_token_ids": ()}
    healthy = [a.token_ids for a in generate(pair, prompts, **options)]
    token = next(t for t in healthy[1][3:] if t not in healthy[1][:3] and not any(t in prompt for prompt in prompts)
                 and sum(t in answer for answer in healthy) < 4)
    expected = [answer[:answer.index(token) + 1] if token in answer[:-1] else answer for answer in healthy]
    failed = [len(e) < len(h) for e, h in zip(expected, healthy, strict=True)]
    assert failed[1]
    assert not all(failed)
    broken = damaged(pair, token)
    with pytest.warns(RuntimeWarning) as caught:
        answers = generate(broken, prompts, **options, batch_size=2)
    assert [a.token_ids for a in answers] == expected
    for i, answer in enumerate(answers):
        assert answer.finish_reason == ("error" if failed[i] else "length")
        assert sum(answer.accept_lengths) >= len(answer.token_ids) - 1
        if failed[i]:
            assert f"prompt {i}: " in answer.error
            assert f"not finite after {len(expected[i])} tokens" in answer.error
            assert "float64" in answer.error
            assert sum(answer.accept_lengths) == len(answer.token_ids) - 1
        else:
            assert answer.error is None
    assert sorted(str(w.message) for w in caught) == sorted(a.error for a in answers if a.error)

    with pytest.raises(JetSpecError, match=r"prompt 0: .*not finite"):
        generate(broken, broken_prompt := prompts[1] + expected[1], **options)
    seen = []
    with pytest.raises(JetSpecError, match=r"prompt 0: .*not finite after 0 tokens"):
        for chunk in stream(broken, broken_prompt, **options):
            seen.append(chunk)
    assert seen[-1].result.token_ids == []


EDGES = [1e-300, 1e-45, 1.1e-38, 1.2e-38, 1e-30, 5e-324]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("top_p", EDGES)
def test_a_tiny_top_p_means_the_best_token(top_p, dtype):
    logits = np.random.default_rng(0).standard_normal((50, 300)).astype(dtype)
    keys = sequence_keys(np.uint32(1), jnp.arange(50, dtype=jnp.uint32))
    for temperature, top_k in ((1.0, None), (100.0, None), (100.0, 40)):
        sampler = Sampler.create(SamplingParams(temperature, top_k, top_p))
        found = choose(sampler, jnp.asarray(logits)[:, None], keys, jnp.zeros((50,), jnp.int32),
                       jnp.zeros((50, 1), jnp.int32), depths=1)
        np.testing.assert_array_equal(found[:, 0], logits.argmax(axis=-1))


@pytest.mark.parametrize(("sampling", "logits", "expected"), [
    (SamplingParams(1e-3), [3e38, 2e38, -3e38], {0}),  # a division alone would overflow
    (SamplingParams(1e-3), [-3e38, -2.9e38, -3.3e38], {1}),
    (SamplingParams(100.0), [1e-45, 0.0, -1e-45], {0, 1, 2}),
    (SamplingParams(1.0, top_p=float(np.nextafter(1, 0))), [0.0, 0.0, 0.0], {0, 1, 2}),
    (SamplingParams(1.0, top_p=1.0), [0.0, 0.0, -200.0], {0, 1}),
    (SamplingParams(1.0, top_k=2**62), [0.0, 0.0, 0.0], {0, 1, 2}),
    (SamplingParams(1.0, top_k=1), [0.0, 1e-3, 0.0], {1}),
    (SamplingParams(100.0, top_k=1, top_p=1e-45), [1.0, 1.0, 0.0], {0, 1}),  # ties are kept
])
def test_sampling_at_the_ends_of_float32(sampling, logits, expected):
    """Which tokens are ever drawn, in 300 draws."""
    keys = sequence_keys(np.uint32(2**32 - 1), jnp.arange(300, dtype=jnp.uint32))
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (300, 1, 3))
    found = choose(Sampler.create(sampling), rows, keys, jnp.zeros((300,), jnp.int32), jnp.zeros((300, 1), jnp.int32),
                   depths=1)
    assert set(np.asarray(found)[:, 0].tolist()) == expected


def test_numbers_that_nobody_could_print():
    for field in ("temperature", "top_k", "top_p"):
        with pytest.raises(JetSpecError, match=f"{field} must fit into 64 bits"):
            SamplingParams(**{"temperature": 1.0, field: 10**5000})
