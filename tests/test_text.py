"""The text of an answer while its tokens arrive: exactly the whole answer's, early, and at a cost that is linear."""

import logging
import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from jetspec_jax.text import TextStream, _CleanUp, without_advice

BYTES = [f"<0x{i:02X}>" for i in range(256)]
WORDS = ["▁", "▁▁", "▁a", "b", "▁the", ".", "▁,", "n't", "\n", "é", "你好", "\N{REPLACEMENT CHARACTER}", "x▁"]
PIECES = ["[UNK]", "a", "##b", "the", "##", ".", "!", ",", "'", "s", "t", "n", "n't", "ve", "re", "##n", "m", "you"]


def fast(model, decoder, added=(), **options):
    """A tokenizer with two special tokens, <s> and <|turn|>, of which transformers knows one by name."""
    tokenizer = Tokenizer(model)
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("<|turn|>", special=True)])
    tokenizer.add_tokens([AddedToken(token) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", **options)


def bpe(tokens, **options):
    return models.BPE(vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges=[], **options)


def byte_level(*tokens, **options):
    """Every byte, and tokens of some bytes, which need not begin or end where a character does."""
    names = bytes_to_unicode()
    spelled = ["".join(names[byte] for byte in token) for token in ([bytes([byte]) for byte in range(256)] + [*tokens])]
    return fast(bpe(spelled), decoders.ByteLevel(), ("\N{REPLACEMENT CHARACTER}", "你", "a ."), **options)


def byte_fallback(*more):
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more]
    return fast(bpe(["<unk>", *BYTES, *WORDS], byte_fallback=True, unk_token="<unk>"), decoders.Sequence(steps))


def wordpiece(**options):
    return fast(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"),
                decoders.WordPiece(cleanup=False), **options)


class Slow:
    """A tokenizer of which nothing is known but what it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.all_special_ids = tokenizer, tokenizer.all_special_ids

    def __len__(self):
        return len(self.tokenizer)

    def get_vocab(self):
        return self.tokenizer.get_vocab()

    def decode(self, ids, skip_special_tokens):
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


class Counting:
    """Another tokenizer, and how many tokens it decoded."""

    def __init__(self, tokenizer):
        self.tokenizer, self.decoded = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, ids, **options):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, **options)


SPLIT = (b"\xe4\xbd", b"\xa0\xe5", b"\xa0\xe4\xbd", b"\xa5\xbd", b"a\xf0\x9f", b"\x98\x80", b"\xf0\x9f\x98", b" b",
         b"\xef\xbf\xbd")
TOKENIZERS = {
    "byte level": byte_level(*SPLIT),
    "byte level, cleaned up in name only": byte_level(*SPLIT, clean_up_tokenization_spaces=True),
    "byte level, cleaned up": byte_level(
        *SPLIT, clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True),
    "byte level, and a strip": fast(bpe(bytes_to_unicode().values()), decoders.Sequence([
        decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])),
    "byte fallback": byte_fallback(),
    "byte fallback, a space stripped": byte_fallback(decoders.Strip(" ", 1, 0)),
    "byte fallback, spaces stripped": byte_fallback(decoders.Strip(" ", 2, 0)),
    "metaspace": fast(bpe(WORDS), decoders.Metaspace()),
    "metaspace, never prepended": fast(bpe(WORDS), decoders.Metaspace(prepend_scheme="never")),
    "word pieces": wordpiece(),
    "word pieces, cleaned up": wordpiece(clean_up_tokenization_spaces=True),
    "word pieces, cleaned up one by one": fast(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}),
                                               decoders.WordPiece(cleanup=True)),
    "ends of words": fast(bpe(["a</w>", "b", "c</w>", "</w>", "d"]), decoders.BPEDecoder("</w>")),
    "no decoder": fast(bpe(WORDS), None),
    "byte level, alone in a sequence": fast(bpe([*bytes_to_unicode().values(), "".join(
        bytes_to_unicode()[byte] for byte in b"\xa0\xe4\xbd")]), decoders.Sequence([decoders.ByteLevel()])),
    "joined bytes are rewritten": fast(bpe([*bytes_to_unicode().values(), "Ġ."]), decoders.Sequence([
        decoders.ByteLevel(), decoders.Replace(" .", ".")])),
    "byte tokens are joined before they are bytes": fast(bpe([f"<0x{byte:02X}>" for byte in range(256)]),
                                                         decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()])),
    "joined text is rewritten": fast(bpe(["a", " ", ". ", "b.", "  "]), decoders.Sequence([
        decoders.Fuse(), decoders.Replace(". ", "!"), decoders.Replace("  ", " ")])),
}
TOKENIZERS |= {f"{name}, slow": Slow(TOKENIZERS[name]) for name in ("byte level", "metaspace", "ends of words")}


def answers(tokenizer, count, rng):
    """Random ids: of the whole vocabulary and some beyond, of a few tokens again and again, of bytes."""
    size = len(tokenizer)
    for i in range(count):
        few = rng.sample(range(size), 3)
        among = [range(size + 2), few, range(1, min(size, 257)), [*few, *range(max(0, size - 16), size)]][i % 4]
        yield [rng.choice(among) for _ in range(rng.randrange(1, 60))]


def pieces(tokenizer, ids, sizes):
    """What a stream tells when the tokens come in steps of these sizes."""
    stream, end, told = TextStream(tokenizer), 0, []
    while end < len(ids):
        end = min(end + next(sizes), len(ids))
        told.append(stream.add(ids[:end], done=end == len(ids)))
    return told


def every(size):
    while True:
        yield size


def at_random(rng):
    while True:
        yield rng.choice((0, 1, 1, 1, 2, 3, 5, 9))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_join_to_the_whole(name):
    """Whatever the tokens are, and wherever the answer is cut."""
    tokenizer, rng = TOKENIZERS[name], random.Random(name)
    for ids in answers(tokenizer, 240, rng):
        whole = tokenizer.decode(ids, skip_special_tokens=True)
        for sizes in (every(1), every(4), at_random(rng)):
            assert "".join(pieces(tokenizer, ids, sizes)) == whole, ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_cost_is_linear_in_the_length(name):
    """Also of answers that repeat what makes text wait, or makes none."""
    tokenizer, rng = TOKENIZERS[name], random.Random(name)
    hard = ["<s>", "<|turn|>", "[UNK]", "▁", "<0x41>", "<0x80>", "\N{REPLACEMENT CHARACTER}", "</w>", "'", "n", "\xef",
            "##"]
    known = [tokenizer.get_vocab()[token] for token in hard if token in tokenizer.get_vocab()]
    word = next(i for i in range(len(tokenizer)) if tokenizer.decode([i], skip_special_tokens=True).strip())
    for again in known + rng.choices(range(len(tokenizer)), k=5):
        for step in (1, 4):
            counted = Counting(tokenizer)
            pieces(counted, [word] + [again] * 100, every(step))
            short, counted.decoded = counted.decoded, 0
            pieces(counted, [word] + [again] * 1000, every(step))
            assert counted.decoded <= max(12 * short, 3000), (again, step)


@pytest.mark.parametrize(("name", "tokens", "expected"), [
    # A character is told with its last byte, a literal U+FFFD and bytes that cannot become a character at once.
    ("byte level", [0x41, 0xE4, 0xBD, 0xA0, 0x42], ["A", "", "", "你", "B"]),
    ("byte level", ["\N{REPLACEMENT CHARACTER}"] * 3, ["\N{REPLACEMENT CHARACTER}"] * 3),
    ("byte level", [0x80, 0xFF, 0xC0], ["\N{REPLACEMENT CHARACTER}"] * 3),
    ("byte level", [0xE4, 0xBD, 0x41, 0xE4], ["", "", "\N{REPLACEMENT CHARACTER}A", "\N{REPLACEMENT CHARACTER}"]),
    ("byte level", [0xC3, "<|turn|>", 0xA9, "<s>"], ["", "", "é", ""]),
    # A run of byte tokens waits until it ends, or is no UTF-8.
    ("byte fallback", ["<0x41>", "<0xC3>", "<0xA9>", "b", "b"], ["", "", "", "Aéb", "b"]),
    ("byte fallback", ["b", "<0x0A>", "<0x80>", "<0x41>", "b"],
     ["b", "", "\N{REPLACEMENT CHARACTER}" * 2, "\N{REPLACEMENT CHARACTER}", "b"]),
    ("byte fallback", ["<0x0A>", "<0xF0>", "<0x9F>"], ["", "", "\N{REPLACEMENT CHARACTER}" * 3]),
    ("byte fallback", ["\N{REPLACEMENT CHARACTER}", "▁a"], ["\N{REPLACEMENT CHARACTER}", " a"]),
    ("byte fallback, a space stripped", ["▁", "▁a", "<s>", "▁a"], ["", " a", "", " a"]),
    ("word pieces, cleaned up", ["you", "'", "re", "the", "."], ["you", "", "'re", " the", "."]),
    ("word pieces, cleaned up", ["a", "n", "n't"], ["a", "", " nn't"]),
])
def test_text_is_told_as_early_as_it_can_be(name, tokens, expected):
    tokenizer = TOKENIZERS[name]
    ids = [token if isinstance(token, int) else tokenizer.convert_tokens_to_ids(token) for token in tokens]
    assert pieces(tokenizer, ids, every(1)) == expected


def test_tokens_that_never_end_with_a_character():
    """Every token holds the end of one and the beginning of the next: each still tells the one that it ends."""
    tokenizer = TOKENIZERS["byte level"]
    ids = [256 + SPLIT.index(token) for token in (b"\xe4\xbd", *[b"\xa0\xe4\xbd"] * 3)]
    assert pieces(tokenizer, ids, every(1)) == ["", "你", "你", "你\N{REPLACEMENT CHARACTER}"]
    again = pieces(TOKENIZERS["byte level, alone in a sequence"], [256] * 4, every(1))
    assert again == ["\N{REPLACEMENT CHARACTER}", "你", "你", "你\N{REPLACEMENT CHARACTER}"]


def test_clean_up_of_text_that_comes_by_letters():
    """All ways in which its patterns touch, overlap and make each other."""
    tokenizer, rng = TOKENIZERS["word pieces, cleaned up"], random.Random(0)
    for _ in range(5000):
        text = "".join(rng.choices("  '' nntvrems.a", k=rng.randrange(1, 14)))
        stream = _CleanUp(tokenizer)
        told = [stream.add(letter, done=False) for letter in text]
        assert "".join(told) + stream.add("", done=True) == tokenizer.clean_up_tokenization(text), text


def test_that_pytorch_is_missing_is_nothing_to_say(caplog):
    """But everything else that transformers has to say is."""
    with without_advice():
        logging.getLogger("transformers").warning("PyTorch was not found. Models won't be available.")
        logging.getLogger("transformers").warning("Something else.")
    logging.getLogger("transformers").warning("PyTorch was not found.")
    assert [record.getMessage() for record in caplog.records] == ["Something else.", "PyTorch was not found."]
