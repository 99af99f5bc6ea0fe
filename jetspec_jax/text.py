"""Text on its way to tokens, as a chat template wrote it, and on its way back, while an answer arrives."""

from __future__ import annotations

import codecs
import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from jetspec_jax.errors import JetSpecError, first_line

LAG = slice(-9, -3)  # where text is cut whose last character may be incomplete: that is in the last three tokens
SHORT = 8  # how many tokens before new ones are tried as what tells where their spaces belong

CANNOT_DECODE = "the tokenizer of this target is damaged and cannot decode its tokens"

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
# What may still become one of " .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're", which lose spaces.
# The fifth may make one of the later ones, and may hold the space with which another seems to begin.
_UNFINISHED = re.compile("(?: ')* {1,2}(?:n ?)?(?:'(?: ')*(?: ?[vr])?)? ?$")
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# GPT-2's alphabet: bytes that can be printed stand for themselves, the others for the characters from 256 on.
_BYTE_OF = {chr(byte): byte for byte in _PRINTED} | {
    chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in _PRINTED)}


class ChatText(str):
    """Text that a chat template wrote: it holds all its special tokens, and none is added when it is encoded.

    A begun answer can be added to it (`pair.chat("Hi") + "Well,"`). What else is made of it is plain text.
    """

    __slots__ = ()

    def __add__(self, other: str) -> ChatText:
        return ChatText(super().__add__(other))


class TextStream:
    """The text of one answer while its tokens arrive.

    All pieces joined are exactly what the tokenizer makes of the whole answer, special tokens left out. Text is told as
    soon as no later token can change it (of a tokenizer that rewrites what it has joined, at the end), at a cost that
    grows as the answer does.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.seen = 0
        with tokenizer_errors(CANNOT_DECODE):
            self.decoder: _Decoder = (_ByteLevel if _steps(tokenizer) == ["ByteLevel"] else _InContext)(tokenizer)
            self.clean_up = _CleanUp(tokenizer) if _cleans_up(tokenizer) else None

    def add(self, answer: Sequence[int], done: bool) -> str:
        """The text that was not told yet.

        Args:
            answer: all token ids so far.
            done: whether they are all there will be; else what later ones might change waits for them.

        Raises:
            JetSpecError: a damaged tokenizer.
        """
        new, self.seen = answer[self.seen:], len(answer)
        with tokenizer_errors(CANNOT_DECODE):
            text = self.decoder.add(new, done)
            return self.clean_up.add(text, done) if self.clean_up else text


@contextlib.contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Raises JetSpecError, which begins with `what`, where a tokenizer fails: its Rust library may panic too."""
    try:
        yield
    except JetSpecError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # which is no Exception
            raise
        raise JetSpecError(f"{what}: {first_line(error)}") from error


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """For the first import of transformers, which tells those without PyTorch that it is missing: no tokenizer needs
    it, and a user of ours would take it for an error."""
    logger = logging.getLogger("transformers")

    def is_other(record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


class _Decoder(Protocol):
    def add(self, ids: Sequence[int], done: bool) -> str:
        """The text that new tokens settle."""


class _ByteLevel:
    """Byte-level tokenizers (GPT-2, Llama 3, Qwen): every token is bytes, whatever stands beside it."""

    def __init__(self, tokenizer: Any) -> None:
        self.token = _token_reader(tokenizer)
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids: Sequence[int], done: bool) -> str:
        return self.utf8.decode(b"".join(_bytes(token) for token in map(self.token, ids) if token is not None), done)


class _InContext:
    """All others: new tokens are decoded beside the ones before them, which tells where their spaces belong.

    Attributes:
        window: tokens that were told last (see `_context`).
        told: how many characters they make.
        only_whole: nothing can be told before the answer ends.
        waiting: tokens that are not told yet.
        cuts: after how many of them no run of byte tokens is open.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.token = tokenizer, _token_reader(tokenizer)
        self.options = {"clean_up_tokenization_spaces": False} if _cleans_up(tokenizer) else {}
        steps = _steps(tokenizer)
        self.joins_bytes = getattr(tokenizer, "backend_tokenizer", None) is None or "ByteLevel" in steps
        # What rewrites text that has been joined may do so across any two tokens.
        joined = next((i for i, step in enumerate(steps) if step in ("Fuse", "ByteLevel")), len(steps))
        self.byte_fallback = "ByteFallback" in steps[:joined]
        self.only_whole = bool({"Replace", "ByteFallback"} & set(steps[joined:]))
        self.window: list[int] = []
        self.told = 0
        self.waiting: list[int] = []
        self.cuts: list[int] = []
        self.utf8 = codecs.getincrementaldecoder("utf-8")()
        self.broken = False  # the run of byte tokens at the end is no UTF-8
        self.lead = 0  # the token that began its last character

    def add(self, ids: Sequence[int], done: bool) -> str:
        for i in ids:
            token = self.token(i)
            if token is not None:
                self._wait(i, token)
        if done:
            self.cuts = [len(self.waiting)]
        elif self.only_whole:
            return ""
        if not self.cuts:
            return ""
        tokens = self.window + self.waiting[:self.cuts[-1]]
        text = self._decode(tokens)
        count, settled = (len(tokens), text) if done else self._settled(tokens, text)
        piece, new = settled[self.told:], count - len(self.window)
        if new:
            self.window, self.told = self._context(tokens, count, text, settled)
            self.waiting = self.waiting[new:]
            self.cuts = [cut - new for cut in self.cuts if cut > new]
        return piece

    def _wait(self, i: int, token: str) -> None:
        """Queues a token.

        A run of byte tokens is decoded as a whole: into its characters, or, if it is no UTF-8, into one U+FFFD a byte.
        It waits until it ends, or cannot be UTF-8 any more; from there on every byte of it becomes U+FFFD, whichever
        it is, and a character's first byte again and again is no UTF-8 without the rest of the run either.
        """
        byte = _BYTE_TOKEN.fullmatch(token) if self.byte_fallback else None
        if byte is None:
            self.utf8.reset()
            self.broken = False
        elif not self.broken:
            if not self.utf8.getstate()[0]:
                self.lead = i
            try:
                self.utf8.decode(bytes.fromhex(byte[1]))
            except UnicodeDecodeError:
                self.broken = True
        self.waiting.append(self.lead if self.broken else i)
        if byte is None or self.broken:
            self.cuts.append(len(self.waiting))

    def _settled(self, tokens: list[int], text: str) -> tuple[int, str]:
        """(how many tokens, from the window's first on, have text that nothing changes any more; that text)."""
        if not self.joins_bytes or not text.endswith(_REPLACEMENT):
            return len(tokens), text
        for cut in reversed(self.cuts[LAG]):
            before = self._decode(tokens[:len(self.window) + cut])
            if text[:-1].startswith(before):
                return len(self.window) + cut, before
        return len(self.window), ""

    def _context(self, tokens: list[int], count: int, text: str, settled: str) -> tuple[list[int], int]:
        """(the next window, of the `count` tokens that are told then; the length of its text).

        The new ones, or a few more: the window must have text (spaces at the start may have none), and what follows
        must read as it does now. Else all, without new ones that nobody would miss between others.
        """
        known = len(self.window)
        for start in range(known, max(known - SHORT, 0), -1):
            alone = self._decode(tokens[start:count])
            whole = alone if count == len(tokens) else self._decode(tokens[start:])
            if alone and whole[len(alone):] == text[len(settled):]:
                return tokens[start:count], len(alone)
        window = tokens[:known]
        if self.told and self._decode(tokens[:count] + window) == self._decode(window + window):
            return window, len(settled)
        return tokens[:count], len(settled)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, **self.options)


class _CleanUp:
    """What transformers does to decoded text where `clean_up_tokenization_spaces` is set: it takes spaces away."""

    def __init__(self, tokenizer: Any) -> None:
        self.clean, self.waiting = tokenizer.clean_up_tokenization, ""

    def add(self, text: str, done: bool) -> str:
        text = self.waiting + text
        unfinished = None if done else _UNFINISHED.search(text)
        end = unfinished.start() if unfinished else len(text)
        self.waiting = text[end:]
        return self.clean(text[:end])


def _steps(tokenizer: Any) -> list[str]:
    """The kinds of decoders that turn tokens into text, one after another."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return []
    described = json.loads(decoder.__getstate__())
    return [step["type"] for step in described.get("decoders", [described])]


def _cleans_up(tokenizer: Any) -> bool:
    """Whether `decode` cleans up: newer versions of transformers do so with BPE only where they are urged to."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    urged = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", True)
    return type(model).__name__ != "BPE" or urged


def _token_reader(tokenizer: Any) -> Callable[[int], str | None]:
    """A function from a token id to the token ("" where that is unknown), or None for one that no text shows."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        hidden = set(getattr(tokenizer, "all_special_ids", ()))
        return lambda i: None if i in hidden else ""
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    return lambda i: None if i in special else backend.id_to_token(i)


def _bytes(token: str) -> bytes:
    """What a token of a byte-level tokenizer stands for: an added one may be plain text."""
    known = [_BYTE_OF.get(character) for character in token]
    return token.encode() if None in known else bytes(known)  # type: ignore[arg-type]
