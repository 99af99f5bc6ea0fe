"""`generate` and `stream`: batches, refilling, stopping, streaming, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jetspec_jax.generate
from jetspec_jax import JetSpecError, SamplingParams, TreeConfig, tiles
from jetspec_jax.decode import Decoder, create_state, decode_round, insert, prefill
from jetspec_jax.draft import HeadDrafter, NoDrafter
from jetspec_jax.generate import Request, Run, bucket, generate, stream
from jetspec_jax.sampling import Sampler
from jetspec_jax.sharding import make_mesh
from tests.models import random_pair, tiny_target

TREE = TreeConfig(width=3, budget=20)
HUGE = 10**5000  # more digits than Python writes


class SpellingTokenizer:
    """Token i is the i-th letter; tokens 20 and 21 are the two bytes of one character."""

    chat_template = None
    letters = "abcdefghijklmnopqrst"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [self.letters.index(c) for c in text]}

    def decode(self, ids, skip_special_tokens=True):
        data = b"".join(self.letters[i].encode() if i < 20 else bytes([[0xC3], [0xA9], []][i - 20]) for i in ids)
        return data.decode(errors="replace")


class WordTokenizer(SpellingTokenizer):
    """Like a SentencePiece tokenizer: a word brings its space, which the start of a text loses; 3, 4, 5 are special."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join(f" w{i}" for i in ids if i not in (3, 4, 5)).removeprefix(" ")


@pytest.fixture(scope="module")
def pair():
    return random_pair(0)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 23, size).tolist() for size in (3, 40, 1, 17, 70, 5, 2, 33, 9, 12, 64)]


def ids(outs):
    return [out.token_ids for out in outs]


def test_long_prompts_are_read_in_turns_of_their_own(pair, prompts, monkeypatch):
    """Prompts read together take the longest one's room: the product is bounded, and no token changes."""
    expected = ids(generate(pair, prompts, max_new_tokens=5, batch_size=8, tree=TREE))
    turns, read = [], Run._read

    def spy(self, state, started):
        turns.append([len(request.ids) for request in started.values()])
        return read(self, state, started)

    monkeypatch.setattr(Run, "_read", spy)
    monkeypatch.setattr(jetspec_jax.generate, "PROMPT_TOKENS", 130)
    assert ids(generate(pair, prompts, max_new_tokens=5, batch_size=8, tree=TREE)) == expected
    assert sorted(length for turn in turns for length in turn) == sorted(map(len, prompts))
    padded = [1 << (n - 1).bit_length() if n > 1 else 1 for n in map(len, turns)]
    assert all(rows * max(turn) <= 130 or rows == 1 for rows, turn in zip(padded, turns, strict=True))
    assert max(map(len, turns)) > 1


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(1.0)])
def test_refilled_rows_answer_as_alone(pair, prompts, sampling):
    """Eleven prompts through three rows, each row refilled as soon as it is free."""
    together = generate(pair, prompts, max_new_tokens=21, batch_size=3, tree=TREE, sampling=sampling,
                        eos_token_ids=(3, 8))
    wide = generate(pair, prompts, max_new_tokens=21, batch_size=11, tree=TREE, sampling=sampling, eos_token_ids=(3, 8))
    assert ids(together) == ids(wide)
    if sampling == SamplingParams():
        alone = [generate(pair, prompt, max_new_tokens=21, tree=TREE, eos_token_ids=(3, 8)) for prompt in prompts]
        assert ids(together) == ids(alone)
        assert [o.accept_lengths for o in together] == [o.accept_lengths for o in alone]
    assert len({len(o.token_ids) for o in together}) > 2  # rows really ended at different times


def test_finish_reasons_and_clipping(pair, prompts):
    plain = generate(pair, prompts[0], max_new_tokens=30, tree=None)
    assert (plain.finish_reason, len(plain.token_ids), plain.text) == ("length", 30, None)
    end = plain.token_ids[7]
    stopped = generate(pair, prompts[0], max_new_tokens=30, tree=TREE, eos_token_ids=(end,))
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == plain.token_ids[:plain.token_ids.index(end) + 1]
    by_config = dataclasses.replace(pair, target_config=dataclasses.replace(pair.target_config, eos_token_ids=(end,)))
    assert generate(by_config, prompts[0], max_new_tokens=30, tree=TREE).token_ids == stopped.token_ids
    assert generate(by_config, prompts[0], max_new_tokens=30, tree=TREE, eos_token_ids=()).token_ids == plain.token_ids


def test_one_new_token_needs_no_round(pair, prompts):
    out = generate(pair, prompts[3], max_new_tokens=1, tree=TREE)
    assert (len(out.token_ids), out.rounds, out.accept_lengths, out.finish_reason) == (1, 0, [], "length")


def test_the_first_token_can_end_an_answer(pair, prompts):
    first = generate(pair, prompts[3], max_new_tokens=1, tree=None).token_ids[0]
    outs = generate(pair, [prompts[3]] * 5, max_new_tokens=9, batch_size=2, tree=TREE, eos_token_ids=(first,))
    assert ids(outs) == [[first]] * 5
    assert {out.finish_reason for out in outs} == {"stop"}


def test_the_context_limit_ends_an_answer(prompts):
    pair = random_pair(0, tiny_target(max_positions=50))
    out = generate(pair, prompts[1], max_new_tokens=500, tree=TREE)
    assert (len(out.token_ids), out.finish_reason) == (10, "context")


@pytest.mark.parametrize("tokenizer", [SpellingTokenizer(), WordTokenizer()], ids=lambda t: type(t).__name__)
def test_streamed_chunks_add_up(pair, prompts, tokenizer):
    pair = dataclasses.replace(pair, tokenizer=tokenizer)
    whole = generate(pair, prompts[:4], max_new_tokens=40, batch_size=2, tree=TREE, seed=1,
                     sampling=SamplingParams(5.0))
    chunks = list(stream(pair, prompts[:4], max_new_tokens=40, batch_size=2, tree=TREE, seed=1,
                         sampling=SamplingParams(5.0), rounds_per_chunk=1))
    assert len(chunks) > 40
    for index, out in enumerate(whole):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert [i for chunk in mine for i in chunk.token_ids] == out.token_ids
        assert [n for chunk in mine for n in chunk.accept_lengths] == out.accept_lengths
        assert "".join(chunk.text for chunk in mine) == out.text
        assert [chunk.result is not None for chunk in mine] == [False] * (len(mine) - 1) + [True]
        assert mine[-1].result.token_ids == out.token_ids


def test_an_incomplete_character_waits(pair):
    run_pair = dataclasses.replace(pair, tokenizer=SpellingTokenizer())
    run = Run(run_pair, Decoder(pair.target_config, NoDrafter()), Sampler.create(SamplingParams()), (), 0, 9)
    request = Request(0, [1], 9)
    assert run._new_text(request, [0, 20], done=False) == ""
    assert run._new_text(request, [0, 20, 21], done=False) == "a\N{LATIN SMALL LETTER E WITH ACUTE}"
    assert run._new_text(request, [0, 20, 21, 1, 20], done=True) == "b\N{REPLACEMENT CHARACTER}"


def test_the_default_tree_is_the_machines(pair, prompts, monkeypatch):
    """Few nodes for a large target on a CPU, the published tree otherwise; the tokens are the same."""
    published = generate(pair, prompts[0], max_new_tokens=9)
    assert max(published.tree_sizes) > 4
    monkeypatch.setattr(tiles, "LEAST_BYTES", 0)
    small = generate(pair, prompts[0], max_new_tokens=9)
    assert max(small.tree_sizes) == 4
    assert small.token_ids == published.token_ids


def test_a_piece_without_text_is_no_neighbour(pair):
    """Special tokens, and reports without a new token, between two words: the space stays."""
    run = Run(dataclasses.replace(pair, tokenizer=WordTokenizer()), Decoder(pair.target_config, NoDrafter()),
              Sampler.create(SamplingParams()), (), 0, 9)
    request, answer = Request(0, [1], 9), [7, 3, 4, 8, 5, 9]
    texts = [run._new_text(request, answer[:n], done=n == 6) for n in (0, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 6)]
    assert texts == ["", "w7", "", "", "", "", "", "", " w8", "", "", " w9"]


def test_streaming_does_not_decode_the_answer_again(pair):
    """Each token is decoded at most three times, however long the answer: when new, and twice beside what follows."""
    lengths = []

    class Counting(SpellingTokenizer):
        def decode(self, ids, skip_special_tokens):
            lengths.append(len(ids))
            return super().decode(ids, skip_special_tokens)

    run = Run(dataclasses.replace(pair, tokenizer=Counting()), Decoder(pair.target_config, NoDrafter()),
              Sampler.create(SamplingParams()), (), 0, 9)
    request, answer = Request(0, [1], 9), [i % 20 for i in range(400)]
    text = "".join(run._new_text(request, answer[:n], done=n == 400) for n in range(2, 401, 2))
    assert text == SpellingTokenizer().decode(answer, skip_special_tokens=True)
    assert sum(lengths) <= 3 * len(answer)


def test_text_batches_and_arrays_as_prompts(pair):
    pair = dataclasses.replace(pair, tokenizer=SpellingTokenizer())
    one = generate(pair, "bad", max_new_tokens=4, tree=TREE)
    assert one.token_ids == generate(pair, [1, 0, 3], max_new_tokens=4, tree=TREE).token_ids
    assert one.token_ids == generate(pair, np.asarray([1, 0, 3]), max_new_tokens=4, tree=TREE).token_ids
    several = generate(pair, ["bad", [1, 0, 3]], max_new_tokens=4, tree=TREE)
    assert ids(several) == [one.token_ids] * 2
    assert generate(pair, [], max_new_tokens=4) == []


def test_a_second_call_compiles_nothing(pair, prompts):
    generate(pair, prompts[0], max_new_tokens=10, tree=TREE, sampling=SamplingParams(0.5, top_p=0.5))
    again = generate(pair, prompts[2], max_new_tokens=20, tree=TREE, sampling=SamplingParams(1.5, top_p=0.9), seed=4)
    assert again.compile_seconds == 0
    assert again.seconds > again.prompt_seconds > 0


@pytest.mark.parametrize(("arguments", "message"), [
    ({"prompt": []}, None), ({"prompt": [[]]}, "empty"), ({"prompt": "abc"}, "no tokenizer"),
    ({"prompt": [1, 23]}, "token id 23"), ({"prompt": [-1]}, "token id -1"), ({"prompt": [["a"]]}, "neither text"),
    ({"prompt": [[1], 2.5]}, "neither text"), ({"prompt": [[1.9, 2.2]]}, "neither text"),
    ({"prompt": [["12", True]]}, "neither text"), ({"prompt": b"Hello"}, "bytes"),
    ({"prompt": [b"Hello"]}, "neither text"), ({"prompt": [1] * 600}, "600 tokens"),
    ({"max_new_tokens": 0}, "max_new_tokens"), ({"max_new_tokens": 2.5}, "max_new_tokens"),
    ({"batch_size": 0}, "batch_size"), ({"eos_token_ids": (99,)}, "eos_token_ids"),
    ({"eos_token_ids": 2}, r"eos_token_ids .*, not 2: write \[2\]"),
    ({"prompt": None}, "prompt must be"), ({"prompt": 5}, "prompt must be"), ({"tree": "chain"}, "TreeConfig"),
    ({"sampling": None}, "SamplingParams"), ({"seed": -1}, "seed"),
    ({"seed": 2**32}, "seed"), ({"seed": HUGE}, "seed"), ({"prompt": [[1], [HUGE]]}, "prompt 1 holds token id"),
    ({"max_new_tokens": -HUGE}, "max_new_tokens"), ({"batch_size": -HUGE}, "batch_size"),
    ({"eos_token_ids": [HUGE]}, "eos_token_ids"), ({"tree": [HUGE]}, "TreeConfig"),
    ({"eos_token_ids": np.array(2)}, r"write \[2\]"), ({"seed": np.array([3])}, "seed"), ({"seed": True}, "seed"),
    ({"max_new_tokens": jnp.array(True)}, "max_new_tokens"), ({"prompt": [jnp.array(2.0)]}, "prompt 0 is neither"),
    ({"eos_token_ids": np.array([2.0])}, "eos_token_ids"),
    ({"eos_token_ids": np.array([[2]])}, "eos_token_ids"), ({"eos_token_ids": np.array([True])}, "eos_token_ids"),
    ({"eos_token_ids": ""}, "eos_token_ids"), ({"prompt": {1, 2}}, "prompt must be"),
    ({"prompt": (i for i in [1])}, "prompt must be"), ({"prompt": np.array(1)}, "prompt must be"),
    ({"prompt": memoryview(b"Hello")}, "bytes"), ({"prompt": [[1], {1: 2}]}, "prompt 1 is neither"),
    ({"prompt": [[1], np.ones((30, 30), int)]}, "prompt 1 is neither"),
    ({"prompt": np.array([True, False])}, "prompt 0 is neither"),
    ({"prompt": [[1], np.array([2.0])]}, "prompt 1 is neither"), ({"prompt": [[1], [2, "b"]]}, "prompt 1 is neither"),
    ({"prompt": [[1], [[2]]]}, "prompt 1 is neither"), ({"prompt": [[1], [2.5] * 1000]}, "prompt 1 is neither")])
def test_bad_arguments_are_named(pair, arguments, message):
    arguments = {"prompt": [1, 2], "max_new_tokens": 4, **arguments}
    if message is None:
        assert generate(pair, **arguments) == []
        return
    with pytest.raises(JetSpecError, match=message) as error:
        generate(pair, **arguments)
    assert len(str(error.value)) < 250 and "\n" not in str(error.value)
    with pytest.raises(JetSpecError, match=message):
        stream(pair, **arguments)  # at once, not when iterated


def test_integers_of_any_size_and_kind_are_taken(pair):
    """A context of 50 tokens leaves 40 to a prompt of ten; an int8 ends at 127, and 100 + 60 do not."""
    options, few = {"tree": None, "eos_token_ids": ()}, random_pair(0, tiny_target(max_positions=50))
    assert len(generate(few, [1] * 10, max_new_tokens=HUGE, batch_size=HUGE, **options).token_ids) == 40
    assert len(generate(pair, [1] * 100, max_new_tokens=np.int8(60), batch_size=np.int8(3), **options).token_ids) == 60
    (chunk,) = stream(few, [1] * 10, rounds_per_chunk=HUGE, **options)
    assert (len(chunk.token_ids), len(chunk.accept_lengths)) == (40, 39)  # the first comes from the prompt


def test_arrays_without_axes_are_integers(pair):
    options = {"tree": None, "sampling": SamplingParams(1.0)}
    plain = generate(pair, [4, 2], max_new_tokens=6, seed=3, eos_token_ids=(), **options).token_ids
    found = generate(pair, [jnp.int32(4), np.array(2)], max_new_tokens=jnp.int32(6), seed=jnp.uint32(3),
                     batch_size=jnp.int32(1), eos_token_ids=[], **options)
    assert (found.token_ids, found.finish_reason) == (plain, "length")
    (several,) = generate(pair, [[jnp.int32(4), 2]], max_new_tokens=6, seed=3, eos_token_ids=[jnp.int32(plain[2])],
                          **options)
    assert several.token_ids == plain[:plain.index(plain[2]) + 1]


@pytest.mark.parametrize("pair", [None, "smollm2-135m"])
def test_what_is_no_pair(pair):
    for run in (generate, stream):
        with pytest.raises(JetSpecError, match=f"^pair must come from load_pretrained, not {pair!r}$"):
            run(pair, "Hi")


def test_half_a_character_is_told_with_its_prompt(pair):
    pair = dataclasses.replace(pair, tokenizer=SpellingTokenizer())
    with pytest.raises(JetSpecError, match=r"^prompt 1: .* at character 2 of a text is no Unicode"):
        generate(pair, ["bad", "ab\udcff"])


@pytest.mark.parametrize("kind", [tuple, np.array, jnp.array, lambda ids: np.array(ids, np.uint8)])
def test_end_tokens_as_lists_and_arrays(pair, kind):
    answer = generate(pair, [1, 2], max_new_tokens=20, tree=None, eos_token_ids=()).token_ids
    end = answer[7]
    found = generate(pair, [1, 2], max_new_tokens=20, tree=None, eos_token_ids=kind([end]))
    assert (found.token_ids, found.finish_reason) == (answer[:answer.index(end) + 1], "stop")


def test_a_pair_is_told_in_one_line():
    """From shapes alone: the buffers may be gone."""
    pair = random_pair(0)
    layer = 2 * 8 + 32 * 16 + 16 * 64 + 2 * 16 + 24 * 16 + 16 * 48  # norms of heads, o, qkv, norms, down, gate and up
    target = 2 * layer + 2 * 23 * 16 + 16
    head = 2 * 8 + 16 * 16 + 16 * 32 + 2 * 16 + 20 * 16 + 16 * 40 + 32 * 16 + 2 * 16  # its layer, fc, two norms
    for leaf in jax.tree.leaves(pair.params):
        leaf.delete()
    told = f"target: 2 layers of 16, {target:,} parameters, float64"
    assert repr(pair) == f"Pair({told}; head: 1 layer of 16, {head:,} parameters, float64; tokenizer: no)"
    assert repr(pair.params) == f"Params(target: {target:,} parameters, head: {head:,} parameters)"
    other = dataclasses.replace(pair, head_config=None, tokenizer=SpellingTokenizer(), mesh=make_mesh(4, 2))
    assert repr(other) == f"Pair({told}; head: none; tokenizer: yes; mesh: 2 x 4 devices)"


def test_a_target_without_head_decodes_plainly(pair):
    alone = dataclasses.replace(pair, head_config=None)
    assert len(generate(alone, [1, 2], max_new_tokens=4, tree=None).token_ids) == 4
    with pytest.raises(JetSpecError, match="no draft head"):
        generate(alone, [1, 2], max_new_tokens=4)


@pytest.mark.parametrize(("size", "smallest", "expected"), [(1, 256, 256), (257, 256, 384), (385, 256, 512),
                                                            (513, 256, 768), (40960, 256, 49152)])
def test_buckets(size, smallest, expected):
    assert bucket(size, smallest) == expected


def test_a_finished_sequence_keeps_every_bit_of_its_state(pair):
    """Rounds that only serve the other rows of a batch change nothing of a row that is done."""
    decoder = Decoder(pair.target_config, HeadDrafter(pair.target_config, pair.head_config, TREE))
    sampler, keys = Sampler.create(SamplingParams()), jax.random.split(jax.random.key(0), 2)
    tokens, count = jnp.ones((2, 32), jnp.int32), jnp.asarray([5, 9], jnp.int32)
    prefix = prefill(decoder, 32, pair.params, sampler, tokens, count, keys)
    state = create_state(decoder, 2, 64, sampler, jnp.asarray([-1], jnp.int32))
    state = insert(decoder, state, prefix, jnp.asarray([0, 1], jnp.int32), tokens, count,
                   jnp.asarray([8, 50], jnp.int32), keys)
    step = jax.jit(decode_round, static_argnums=0)

    def row_zero(state):
        caches = [side[:, 0] for cache in (state.cache, state.drafter.cache) for side in (cache.k, cache.v)]
        rest = (state.tokens, state.length, state.done, state.rounds, state.accept_lengths, state.tree_sizes,
                state.drafter.pending, state.drafter.pending_count)
        return [np.asarray(array) for array in (*caches, *(array[0] for array in rest))]

    while not state.done[0]:
        state = step(decoder, pair.params, state)
    before = row_zero(state)
    for _ in range(3):
        state = step(decoder, pair.params, state)
    assert not state.done[1]
    for a, b in zip(before, row_zero(state), strict=True):
        np.testing.assert_array_equal(a, b)
