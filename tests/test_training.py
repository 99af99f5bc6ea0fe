"""Training math against loops written out, against decoding, and against itself after a kill."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jetspec_jax import JetSpecError, SamplingParams, TreeConfig
from jetspec_jax.autoregressive import autoregressive_shapes
from jetspec_jax.cache import KVCache
from jetspec_jax.config import AutoregressiveHeadConfig
from jetspec_jax.draft import HeadDrafter, Params
from jetspec_jax.generate import generate
from jetspec_jax.head import head_context, head_forward, head_shapes, init_head
from jetspec_jax.target import target_embed, target_logits
from jetspec_jax.training.batches import Batch, Batches, pack
from jetspec_jax.training.checkpoints import TrainCheckpoints
from jetspec_jax.training.config import TrainConfig
from jetspec_jax.training.dataset import Dataset, DatasetInfo, DatasetWriter
from jetspec_jax.training.evaluate import accepted_on
from jetspec_jax.training.initial import head_from_target
from jetspec_jax.training.loss import (
    accepted_lengths,
    batch_states,
    block_slots,
    loss_and_metrics,
    run_blocks,
    slot_losses,
)
from jetspec_jax.training.record import Recording, record_answers
from jetspec_jax.training.trainer import Trainer
from tests.models import random_pair, random_params, tiny_head, tiny_moe, tiny_target

LAYERS = (0, 1)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6], [5, 3], [5, 8, 9, 7, 9, 3], [2, 3, 8, 4]]


def pair_of(seed=0, **head):
    target = tiny_target(dtype="float32")
    return random_pair(seed, target, tiny_head(target, **{"num_layers": 2, **head}))


def record(pair, folder, prompts=PROMPTS, tokens=24, states=True, **options):
    """A dataset of the pair's own answers."""
    layers = LAYERS if states else ()
    writer = DatasetWriter(folder, DatasetInfo("tiny", layers, 16, 23, {}))
    options = {"max_new_tokens": tokens, "batch_size": 2, "sampling": SamplingParams(), "seed": 0, **options}
    found = sorted(record_answers(pair, prompts, layers, **options), key=lambda r: r.index)
    writer.add(found)
    return Dataset([folder])


@pytest.fixture(scope="module")
def pair():
    return pair_of()


@pytest.fixture(scope="module")
def dataset(pair, tmp_path_factory):
    return record(pair, tmp_path_factory.mktemp("data") / "d")


def config_of(**changes):
    return TrainConfig(**{"steps": 4, "row_tokens": 40, "anchors": 5, "warmup": 0.0, **changes})


def parts(pair, dataset, config, step=0):
    batch = jax.device_put(Batches(dataset, config).batch(step))
    return pair.target_config, pair.head_config, pair.params.target, pair.params.head, batch


# The head once more, with loops over slots and heads.

def numpy_norm(x, scale):
    return x / np.sqrt(np.mean(x**2) + 1e-6) * scale


def numpy_rotate(x, position, theta):
    half = len(x) // 2
    angle = position / theta ** (np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])


def numpy_block(config, params, embedding, tapped, anchor_token, anchor, slots):
    """Hidden states of one block: context rows 0..anchor-1, then `slots` slots."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"])
    group, width = config.num_heads // config.num_kv_heads, config.head_dim
    context = [numpy_norm(row @ p["fc"]["kernel"], p["hidden_norm"]["scale"]) for row in tapped[:anchor]]
    x = [embedding[token] for token in [anchor_token] + [config.mask_token_id] * (slots - 1)]
    for i in range(config.num_layers):
        layer = p[f"layers_{i}"]
        normed = [numpy_norm(row, layer["input_layernorm"]["scale"]) for row in x]
        rows = context + normed
        heads = [(row @ layer["attention"]["qkv_proj"]["kernel"]).reshape(-1, width) for row in rows]
        first_k, first_v = config.num_heads, config.num_heads + config.num_kv_heads
        new = []
        for s in range(slots):
            attended = []
            for h in range(config.num_heads):
                q = numpy_rotate(numpy_norm(heads[anchor + s][h], layer["attention"]["q_norm"]["scale"]), anchor + s,
                                 config.rope_theta)
                seen = [m for m in range(len(rows)) if m < anchor or not config.causal or m - anchor <= s]
                scores, values = [], []
                for m in seen:
                    k = numpy_norm(heads[m][first_k + h // group], layer["attention"]["k_norm"]["scale"])
                    scores.append(q @ numpy_rotate(k, m, config.rope_theta) / np.sqrt(width))
                    values.append(heads[m][first_v + h // group])
                weights = np.exp(scores - np.max(scores))
                attended.append(weights @ np.asarray(values) / weights.sum())
            y = x[s] + np.concatenate(attended) @ layer["attention"]["o_proj"]["kernel"]
            z = numpy_norm(y, layer["post_attention_layernorm"]["scale"]) @ layer["mlp"]["gate_up_proj"]["kernel"]
            gate, up = np.split(z, 2)
            new.append(y + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down_proj"]["kernel"])
        x = new
    return np.stack([numpy_norm(row, p["norm"]["scale"]) for row in x])


def widen(bits):
    return np.asarray(jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16), np.float64)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("loss", ["forward_kl", "hard_label"])
def test_loss_equals_loops(dataset, causal, loss):
    """Masks, teacher's place, labels, depth weights and ends of answers, one slot at a time."""
    pair = pair_of(causal=causal)
    config = config_of(loss=loss, gamma=2.0, anchors=50)  # more than there are: some are padding
    target, head, target_params, head_params, batch = parts(pair, dataset, config)
    embedding = np.asarray(target_params["params"]["embedding"], np.float64)
    matrix = np.asarray(target_params["params"]["lm_head"], np.float64)
    scale = np.asarray(target_params["params"]["norm"]["scale"], np.float64)
    total = weights = 0.0
    anchors = 0
    for b in range(batch.tokens.shape[0]):
        segment = np.asarray(batch.segment[b])
        for number in range(1, segment.max() + 1):
            start, end = np.flatnonzero(segment == number)[[0, -1]]
            tokens = np.asarray(batch.tokens[b, start:end + 1])
            states = widen(batch.states[b, start:end + 1])
            prompt = next(p for p in PROMPTS if tokens[:len(p)].tolist() == p)
            for anchor in range(len(prompt), len(tokens) - 1):
                anchors += 1
                hidden = numpy_block(head, head_params, embedding, states, tokens[anchor], anchor, head.block_size)
                for i in range(1, min(head.block_size, len(tokens) - anchor)):
                    q = hidden[i] @ matrix
                    log_q = q - np.log(np.sum(np.exp(q)))
                    p = numpy_norm(states[anchor + i - 1, 16:], scale) @ matrix
                    log_p = p - np.log(np.sum(np.exp(p)))
                    value = (np.sum(np.exp(log_p) * (log_p - log_q)) if loss == "forward_kl"
                             else -log_q[tokens[anchor + i]])
                    total += np.exp(-(i - 1) / 2) * value
                    weights += np.exp(-(i - 1) / 2)
    found, metrics = loss_and_metrics(target, head, config, LAYERS, head_params, target_params, batch)
    assert int(metrics["anchors"]) == anchors
    np.testing.assert_allclose(found, total / weights, rtol=2e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_training_blocks_are_decoding_blocks(dataset, causal):
    """The same anchors drafted as decoding drafts them, with some context cached and some pending."""
    pair = pair_of(3, causal=causal)
    config = config_of()
    target, head, target_params, head_params, batch = parts(pair, dataset, config)
    tapped = batch_states(target, target_params, batch, LAYERS)
    blocks = run_blocks(target, head, target_params, head_params, batch, tapped, head.block_size)
    for b in range(batch.tokens.shape[0]):
        for a in range(config.anchors):
            place = int(batch.anchor[b, a])
            anchor = int(batch.position[b, place])
            own = tapped[b:b + 1, place - anchor:place]
            pending = min(2, anchor)
            positions = jnp.arange(anchor - pending, dtype=jnp.int32)[None]
            cache = KVCache.create(head, 1, 40)
            if anchor > pending:
                cache = cache.write_chunk(*head_context(head, head_params, own[:, :anchor - pending], positions),
                                          jnp.int32(0))
            slots = jnp.full((1, head.block_size), head.mask_token_id, jnp.int32).at[0, 0].set(batch.tokens[b, place])
            out = head_forward(head, head_params, target_embed(target, target_params, slots),
                               jnp.full((1,), anchor, jnp.int32), own[:, anchor - pending:],
                               jnp.full((1,), pending, jnp.int32), cache)
            np.testing.assert_allclose(blocks[b, a], out.hidden[0], atol=2e-5)


def test_shorter_blocks_teach_a_causal_head_the_same(pair, dataset):
    target, head, target_params, head_params, batch = parts(pair, dataset, config_of())
    tapped = batch_states(target, target_params, batch, LAYERS)
    whole = run_blocks(target, head, target_params, head_params, batch, tapped, head.block_size)
    short = run_blocks(target, head, target_params, head_params, batch, tapped, 3)
    np.testing.assert_allclose(short, whole[:, :, :3], atol=1e-5)


def test_states_computed_are_states_stored(pair, dataset, tmp_path):
    """Without stored states the step runs the target over the packed row itself."""
    config = config_of()
    bare = record(pair, tmp_path / "bare", states=False)
    target, _, target_params, _, stored = parts(pair, dataset, config)
    without = jax.device_put(Batches(bare, config).batch(0))
    np.testing.assert_array_equal(without.tokens, stored.tokens)
    a = batch_states(target, target_params, stored, LAYERS)
    b = batch_states(target, target_params, without, LAYERS)
    # The last token of a sequence has no stored state.
    real = (np.asarray(stored.segment) > 0) & (np.roll(stored.segment, -1, 1) == stored.segment)
    np.testing.assert_allclose(np.asarray(a)[real], np.asarray(b)[real], atol=0.05)  # stored as bfloat16


def test_chunks_and_full_subsets_change_nothing(pair, dataset):
    target, head, target_params, head_params, batch = parts(pair, dataset, config_of())
    slots = block_slots(target, head, target_params, head_params, batch, LAYERS, head.block_size)
    whole = slot_losses(target, target_params, slots, batch.subset, config_of())
    chunked = slot_losses(target, target_params, slots, batch.subset, config_of(loss_chunk=7))
    subset = slot_losses(target, target_params, slots, jnp.arange(23, dtype=jnp.int32), config_of())
    for a, b, c in zip(whole, chunked, subset, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(a, c, rtol=1e-5, atol=1e-6)


def test_remat_gives_the_same_gradient(pair, dataset):
    config = config_of()
    target, head, target_params, head_params, batch = parts(pair, dataset, config)

    def gradient(config):
        return jax.grad(lambda p: loss_and_metrics(target, head, config, LAYERS, p, target_params, batch)[0])(
            head_params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(config),
                 gradient(dataclasses.replace(config, remat=True)))


def test_subset_holds_the_batch_and_has_its_size(dataset):
    batch = Batches(dataset, config_of(vocab_subset=20)).batch(0)
    assert batch.subset.shape == (20,)
    assert set(np.unique(batch.tokens)) <= set(batch.subset.tolist())
    assert (np.diff(batch.subset) > 0).all()
    with pytest.raises(JetSpecError, match="vocab_subset 2 is too small for batches"):
        Batches(dataset, config_of(vocab_subset=2))


def test_a_quarter_of_the_subset_is_random(tmp_path):
    """So that every token is pushed down now and then; of 400, 300 are the most frequent, the text's 3 among them."""
    writer = DatasetWriter(tmp_path / "d", DatasetInfo("none", (0,), 2, 4000, {}))
    for i in range(8):
        tokens = np.arange(40 * i, 40 * i + 40) if i else np.asarray([3990] * 38 + [3991, 3992])
        writer.add([Recording(i, tokens.astype(np.int32), 1, np.zeros((39, 2), np.uint16))])
    batches = Batches(Dataset([tmp_path / "d"]), TrainConfig(steps=1, row_tokens=40, anchors=8, vocab_subset=400))
    subsets = [set(batches.assemble([[0]], np.random.default_rng(seed)).subset.tolist()) for seed in range(3)]
    common = set.intersection(*subsets)
    assert {3990, 3991, 3992, *range(40, 320)} <= common
    assert 300 <= len(common) <= 310  # two draws of 100 out of 3,700 rarely meet


def test_other_answers_to_held_out_prompts_are_not_trained_on(pair, tmp_path):
    """The same prompts answered twice: of the held-out ones neither answer is trained on."""
    prompts = [[3, 1, 4 + i] for i in range(5)]
    for name, seed in (("a", 0), ("b", 1)):
        DatasetWriter(tmp_path / name, DatasetInfo("tiny", LAYERS, pair.target_config.hidden_size, 23, {})).add(
            list(record_answers(pair, prompts, LAYERS, max_new_tokens=8, batch_size=5,
                                sampling=SamplingParams(1.0), seed=seed)))
    dataset = Dataset([tmp_path / "a", tmp_path / "b"])
    batches = Batches(dataset, config_of(), held_out=2)
    kept = {tuple(dataset.tokens(i)[:3].tolist()) for i in batches.held_out}
    assert len(kept) == 2
    assert len(batches.train) == 6
    assert not kept & {tuple(dataset.tokens(i)[:3].tolist()) for i in batches.train}


def test_batches_follow_from_seed_and_step(dataset):
    first, second = (Batches(dataset, config_of(seed=1), held_out=1) for _ in range(2))
    for step in (0, 5, 17):
        jax.tree.map(np.testing.assert_array_equal, first.batch(step), second.batch(step))
    assert not np.array_equal(first.batch(0).anchor, Batches(dataset, config_of(seed=2)).batch(0).anchor)
    seen = {tuple(row[row > 0][:3]) for step in range(30) for row in first.batch(step).tokens}
    assert len(seen) > 1
    held_out = dataset.tokens(len(dataset) - 1)
    starts = {tuple(b.tokens[0, np.flatnonzero(b.segment[0] == s)][:len(held_out)].tolist())
              for b in (first.batch(step) for step in range(30)) for s in range(1, b.segment.max() + 1)}
    assert tuple(held_out.tolist()) not in starts
    assert {tuple(b.tokens[0][:len(held_out)].tolist()) for b in first.held_out_batches()} == {tuple(held_out.tolist())}


def test_anchors_are_answers_that_something_follows(dataset):
    config = config_of(anchors=500)
    batch = Batches(dataset, config).batch(0)
    chosen = batch.anchor[0][batch.anchor_real[0]]
    expected, start = [], 0
    for number in range(1, batch.segment[0].max() + 1):
        size = int((batch.segment[0] == number).sum())
        tokens = batch.tokens[0, start:start + size].tolist()
        prompt = next(p for p in PROMPTS if tokens[:len(p)] == p)
        expected += range(start + len(prompt), start + size - 1)
        start += size
    assert chosen.tolist() == expected


def test_packing_fills_rows():
    assert pack([(0, 5), (1, 6), (2, 5), (3, 4), (4, 10)], 10) == [[0, 2], [1, 3], [4]]


def test_accepted_lengths_by_hand():
    drafted = jnp.asarray([[[1, 2, 3], [1, 2, 9], [9, 2, 3], [1, 2, 3], [1, 2, 3]]], jnp.int32)
    taught = jnp.asarray([[[1, 2, 3]] * 5], jnp.int32)
    label = taught.at[0, 3, 0].set(7)  # sampled text left the arg-max after the first token
    real = jnp.ones_like(taught, bool).at[0, 4, 1:].set(False)
    assert accepted_lengths(drafted, taught, label, real).tolist() == [[4, 3, 1, 2, 2]]


@pytest.mark.parametrize("tree", [TreeConfig("chain"), TreeConfig(width=3, budget=12)])
def test_held_out_figure_is_what_decoding_accepts(pair, dataset, tree):
    """Each round of real decoding starts at an anchor; `accepted_on` tells its accepted length beforehand."""
    prompt = PROMPTS[1]
    run = generate(pair, prompt, tree=tree, max_new_tokens=24)
    i = next(i for i in range(len(dataset)) if dataset.tokens(i)[:len(prompt)].tolist() == prompt)
    assert dataset.tokens(i).tolist() == prompt + run.token_ids
    places = len(prompt) + np.cumsum([0, *run.accept_lengths])[:-1]
    inside = [k for k, place in enumerate(places) if place + pair.head_config.block_size <= len(dataset.tokens(i)) - 1]
    assert len(inside) > 3
    batches = Batches(dataset, config_of(anchors=len(inside)))
    batch = batches.assemble([[i]], np.random.default_rng(0))
    batch = batch.replace(anchor=places[inside][None].astype(np.int32), anchor_real=np.ones((1, len(inside)), bool))
    found = accepted_on(pair.target_config, pair.head_config, (tree,), LAYERS, pair.params.head, pair.params.target,
                        jax.device_put(batch))
    assert found.tolist() == [[[run.accept_lengths[k] for k in inside]]]


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.8)])
def test_recorded_answers_are_the_targets_with_its_states(pair, tmp_path, sampling):
    dataset = record(pair, tmp_path / "d", sampling=sampling, tokens=9)
    plain = generate(pair, PROMPTS, tree=None, max_new_tokens=9, sampling=sampling)
    for i, answer in enumerate(plain):
        assert dataset.tokens(i).tolist() == PROMPTS[i] + answer.token_ids
        assert dataset.prompt_lengths[i] == len(PROMPTS[i])
        # The recorded states of the last layer give the logits that chose each token.
        hidden = np.stack([numpy_norm(row, np.asarray(pair.params.target["params"]["norm"]["scale"], np.float64))
                           for row in widen(dataset.states(i))[:, 16:]])
        logits = np.asarray(target_logits(pair.target_config, pair.params.target, jnp.asarray(hidden, jnp.float32)))
        if sampling.temperature == 0:
            at = slice(len(PROMPTS[i]) - 1, len(dataset.tokens(i)) - 1)
            agree = np.argmax(logits[at], -1) == dataset.tokens(i)[len(PROMPTS[i]):]
            assert agree.mean() > 0.9  # bfloat16 may turn a near-tie


def trainer_of(pair, config, mesh=None, shard=False):
    return Trainer(pair.target_config, pair.head_config, pair.params.target, config, LAYERS, mesh, shard)


def losses(trainer, state, batches, stop=None):
    found = []
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
        for step, state, metrics in trainer.train(state, batches):  # noqa: B007, B020
            found.append(float(metrics["loss"]))
            if step == stop:
                break
    return found, state


def test_a_repeated_text_is_learnt_to_the_full_block(pair, tmp_path):
    dataset = record(pair, tmp_path / "one", prompts=[PROMPTS[0]])
    config = config_of(steps=400, anchors=30, learning_rate=1e-2, final_rate=0.02)
    trainer, batches = trainer_of(pair, config), Batches(dataset, config)
    start = init_head(pair.head_config, jax.random.key(0))
    _, state = losses(trainer, trainer.create_state(start), batches)
    answer = generate(dataclasses.replace(pair, params=Params(pair.params.target, state.params)), PROMPTS[0],
                      max_new_tokens=24, tree=TreeConfig("chain"), eos_token_ids=())
    block = pair.head_config.block_size
    assert answer.accept_lengths[:-1] == [block] * (len(answer.accept_lengths) - 1)


def test_a_head_learns_from_a_mixture_of_experts(tmp_path):
    target = tiny_moe(dtype="float32")
    pair = random_pair(2, target, tiny_head(target))
    config = config_of(steps=60, anchors=20, learning_rate=1e-2)
    batches = Batches(record(pair, tmp_path / "d", prompts=PROMPTS[:2]), config)
    start = trainer_of(pair, config).create_state(init_head(pair.head_config, jax.random.key(0)))
    curve, _ = losses(trainer_of(pair, config), start, batches)
    assert np.mean(curve[-5:]) < 0.5 * np.mean(curve[:5])
    with pytest.raises(JetSpecError, match="mixtures of experts; start it at random"):
        head_from_target(target, tiny_head(target, intermediate_size=24, num_heads=4, num_kv_heads=2),
                         pair.params.target, jax.random.key(0))


def test_killed_and_resumed_gives_the_same_curve(pair, dataset, tmp_path):
    config = config_of(steps=6, accumulate=2, learning_rate=1e-2)
    trainer, batches = trainer_of(pair, config), Batches(dataset, config)
    whole, final = losses(trainer, trainer.create_state(pair.params.head), batches)
    first, state = losses(trainer, trainer.create_state(pair.params.head), batches, stop=3)
    TrainCheckpoints(tmp_path / "run", pair.head_config, config, {"n": 5}).save(state)

    again = trainer_of(pair, config)  # another process
    restored = TrainCheckpoints(tmp_path / "run", pair.head_config, config, {"n": 5}).restore(
        again.create_state(init_head(pair.head_config, jax.random.key(9))))
    second, resumed = losses(again, restored, Batches(dataset, config))
    assert first + second == whole
    jax.tree.map(np.testing.assert_array_equal, resumed.params, final.params)


def test_a_checkpoint_of_other_settings_is_refused(pair, dataset, tmp_path):
    config = config_of(steps=6)
    state = trainer_of(pair, config).create_state(pair.params.head)
    TrainCheckpoints(tmp_path / "run", pair.head_config, config, {"n": 5}).save(state)
    other = TrainCheckpoints(tmp_path / "run", pair.head_config, dataclasses.replace(config, gamma=1.0), {"n": 5})
    with pytest.raises(JetSpecError, match=r"gamma 0\.0, not 1\.0"):
        other.restore(state)


@pytest.mark.parametrize("shard", [False, True])
def test_eight_devices_train_as_one(pair, dataset, shard):
    config = config_of(steps=3, rows=8, learning_rate=1e-2)
    batches = Batches(dataset, config)
    alone, _ = losses(trainer_of(pair, config), trainer_of(pair, config).create_state(pair.params.head), batches)
    # As `load_pretrained` puts it.
    pair = dataclasses.replace(pair, params=jax.device_put(pair.params, jax.devices()[0]))
    trainer = trainer_of(pair, config, Mesh(np.asarray(jax.devices()), ("data",)), shard)
    assert trainer.mesh.devices.size == 8
    together, state = losses(trainer, trainer.create_state(pair.params.head), batches)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    kernel = state.params["params"]["fc"]["kernel"]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == (8 if shard else 1)


def test_accumulated_micro_batches_are_one_large_batch(pair, dataset):
    """With every anchor of every row taken, two micro-batches of one row are one batch of two rows."""
    big, small = config_of(steps=1, rows=2, anchors=60), config_of(steps=1, accumulate=2, anchors=60)
    results = []
    for config in (big, small):
        trainer = trainer_of(pair, config)
        _, state = losses(trainer, trainer.create_state(pair.params.head), Batches(dataset, config))
        results.append(state.optimiser)
    flat = [jax.tree.leaves(result) for result in results]
    # Rows differ in their number of slots, so the two means differ a little; the direction must not.
    for a, b in zip(*flat, strict=True):
        a, b = np.ravel(a).astype(float), np.ravel(b).astype(float)
        if a.size > 50 and a.any():
            assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.97
            assert 0.8 < np.linalg.norm(a) / np.linalg.norm(b) < 1.25  # a mean, not a sum


def test_a_head_starts_as_the_targets_last_layers():
    target = tiny_target(dtype="float32", num_layers=4, qk_norm=False)
    head = tiny_head(target, intermediate_size=24, num_heads=4, num_kv_heads=2, num_layers=2, num_target_layers=4,
                     target_layer_ids=(0, 3))
    pair = random_pair(1, target, head)
    made = head_from_target(target, head, pair.params.target, jax.random.key(0))["params"]
    source = pair.params.target["params"]
    np.testing.assert_array_equal(made["layers_0"]["mlp"]["down_proj"]["kernel"],
                                  source["layers_2"]["mlp"]["down_proj"]["kernel"])
    np.testing.assert_array_equal(made["layers_1"]["attention"]["qkv_proj"]["kernel"],
                                  source["layers_3"]["attention"]["qkv_proj"]["kernel"])
    assert (np.asarray(made["layers_0"]["attention"]["q_norm"]["scale"]) == 1).all()
    np.testing.assert_allclose(made["fc"]["kernel"][16:], np.eye(16), atol=0.08)
    np.testing.assert_array_equal(made["hidden_norm"]["scale"], source["layers_2"]["input_layernorm"]["scale"])
    with pytest.raises(JetSpecError, match=r"num_heads is 2, the target's 4"):
        head_from_target(target, tiny_head(target, intermediate_size=24), pair.params.target, jax.random.key(0))


@pytest.mark.parametrize(("changes", "message"), [
    ({"steps": 0}, "steps must be"), ({"slots": 1}, "slots must be"), ({"loss": "mse"}, "not one of"),
    ({"learning_rate": -1}, "learning_rate must be"), ({"vocab_subset": 1}, "vocab_subset must be"),
    ({"clip": 0}, "clip"), ({"product_dtype": "int8"}, "product_dtype")])
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(JetSpecError, match=message):
        config_of(**changes)


def test_heads_and_data_that_do_not_fit(pair, dataset):
    with pytest.raises(JetSpecError, match=r"slots 7 exceed the head's block of 6"):
        trainer_of(pair, config_of(slots=7))
    with pytest.raises(JetSpecError, match="bidirectional head sees its whole block"):
        trainer_of(pair_of(causal=False), config_of(slots=3))
    with pytest.raises(JetSpecError, match=r"no states of layers \[1\]"):
        Trainer(pair.target_config, pair.head_config, pair.params.target, config_of(), (0,))
    with pytest.raises(JetSpecError, match="rows 3 are not a multiple"):
        trainer_of(pair, config_of(rows=3), Mesh(np.asarray(jax.devices()), ("data",)))
    with pytest.raises(JetSpecError, match="5 are held out"):
        Batches(dataset, config_of(), held_out=5)
    with pytest.raises(JetSpecError, match="raise row_tokens"):
        Batches(dataset, config_of(row_tokens=3))


def test_drafter_reads_what_training_tapped(pair):
    assert HeadDrafter(pair.target_config, pair.head_config, TreeConfig()).taps == LAYERS


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("autoregressive", [False, True])
def test_padding_poisons_nothing(states, autoregressive):
    """Places of the padding token, whatever the target makes of it, and anchors that are none."""
    pair = pair_of()
    head = AutoregressiveHeadConfig.like(pair.head_config) if autoregressive else pair.head_config
    shapes = autoregressive_shapes(head) if autoregressive else head_shapes(head)
    params, rng = random_params(shapes, np.random.default_rng(1)), np.random.default_rng(0)
    width = pair.target_config.num_layers * pair.target_config.hidden_size if states else 0
    tokens = rng.integers(1, pair.target_config.vocab_size - 1, (1, 20)).astype(np.int32)
    segment = np.asarray([[1] * 9 + [2] * 7 + [0] * 4], np.int32)
    position = np.asarray([[*range(9), *range(7), 0, 0, 0, 0]], np.int32)
    stored = np.asarray(jnp.asarray(rng.standard_normal((1, 20, width)), jnp.bfloat16)).view(np.uint16)
    tokens[segment == 0] = 0
    batch = Batch(tokens, segment, position, stored, np.asarray([[2, 5, 11, 17]], np.int32),
                  np.asarray([[True, True, True, False]]), np.zeros((0,), np.int32))
    damaged = {"params": {**pair.params.target["params"],
                          "embedding": pair.params.target["params"]["embedding"].at[0].set(np.nan)}}
    poisoned = batch.replace(states=np.where(segment[..., None] > 0, stored, np.uint16(0x7F80)))
    layers = tuple(range(pair.target_config.num_layers))

    def loss(params, target, batch):
        return loss_and_metrics(pair.target_config, head, config_of(), layers, params, target, batch)[0]

    found = [jax.value_and_grad(loss)(params, target, batch)
             for target, batch in ((pair.params.target, batch), (damaged, poisoned))]
    for theirs, mine in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.isfinite(mine).all()
        np.testing.assert_array_equal(mine, theirs)
