"""What a user calls: `generate` and `stream`. Everything between two fetches by the host is one device program."""

from __future__ import annotations

import operator
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import numpy as np

from jetspec_jax.autoregressive import AutoregressiveDrafter
from jetspec_jax.config import (
    TREE_WIDTHS,
    AutoregressiveHeadConfig,
    HeadConfig,
    PromptLookup,
    SamplingParams,
    TreeConfig,
)
from jetspec_jax.costs import fastest_nodes, known_lengths
from jetspec_jax.decode import Decoder, DecodeState, create_state, insert, prefill, run_rounds
from jetspec_jax.draft import Drafter, HeadDrafter, NoDrafter, plain_nodes
from jetspec_jax.errors import JetSpecError, shown
from jetspec_jax.lookup import LookupDrafter
from jetspec_jax.memory import enough_memory
from jetspec_jax.pair import Pair
from jetspec_jax.programs import Clock, Pace
from jetspec_jax.sampling import NO_TOKEN, Sampler, sequence_keys
from jetspec_jax.sharding import fetch, over_mesh, put, shards_of
from jetspec_jax.text import CANNOT_DECODE, TextStream, tokenizer_errors
from jetspec_jax.tiles import is_large

DEFAULT_TREE = TreeConfig()
CPU_TREE = TreeConfig("best_first", TREE_WIDTHS["best_first"], 4)  # where nothing was timed
DEFAULT_SAMPLING = SamplingParams()
DEFAULT_BATCH = 8
PROMPT_CHUNK = 256  # prompt tokens per forward
PROMPT_ROWS = 8  # prompts read together
PROMPT_TOKENS = 16384  # that they may take together, padding included
STREAM_ROUNDS = 4  # rounds between two fetches of a stream

Prompt = str | Sequence[int]
Draft = TreeConfig | PromptLookup | Literal["auto"]


@dataclass(frozen=True)
class Generation:
    """One answer.

    Attributes:
        text: the answer without special tokens; None without a tokenizer.
        token_ids: the answer, an end token included.
        accept_lengths: per round, how many tokens it added (the free token included; not clipped at the end).
        tree_sizes: per round, how many nodes were verified.
        rounds: how many rounds it took; the first token comes from the prompt and belongs to none.
        finish_reason: "stop" (an end token), "length" (max_new_tokens), "context" (the target's context limit) or
            "error" (then the tokens are those before it).
        seconds: wall-clock time from its prompt until it was handed out, compilation excluded. Where nothing waits to
            refill a row, all rows of a batch are handed out together.
        prompt_seconds: the part of `seconds` that went into the prompts it was read with.
        compile_seconds: how long the whole call waited for programs to be compiled, up to this answer.
        error: what went wrong and what may help, where the target's logits are not finite; None otherwise.
    """

    text: str | None
    token_ids: list[int]
    accept_lengths: list[int]
    tree_sizes: list[int]
    rounds: int
    finish_reason: str
    seconds: float
    prompt_seconds: float
    compile_seconds: float
    error: str | None = None


@dataclass(frozen=True)
class StreamChunk:
    """What a few rounds added to one answer.

    Attributes:
        index: which prompt.
        text: new text ("" without a tokenizer, or while a character is incomplete).
        token_ids: new tokens.
        accept_lengths: of the rounds that made them.
        result: the whole answer, with its last chunk; None before.
    """

    index: int
    text: str
    token_ids: list[int]
    accept_lengths: list[int]
    result: Generation | None


def generate(pair: Pair, prompt: Prompt | Sequence[Prompt], *, max_new_tokens: int = 256,
             batch_size: int | None = None, tree: Draft | None = "auto",
             sampling: SamplingParams = DEFAULT_SAMPLING, eos_token_ids: Sequence[int] | None = None,
             seed: int = 0) -> Any:
    """Answers one prompt or many; losslessly: the tokens are those of plain decoding, wherever two logits differ by
    more than rounding.

    Args:
        pair: from `load_pretrained`.
        prompt: text (taken as it is; see `Pair.chat`), a list of token ids, or a list of either.
        max_new_tokens: the longest answer, in tokens, at least 1.
        batch_size: sequences decoded together; further prompts refill finished rows. None: all, 8 at most (on every
            group of devices, where a mesh has several).
        tree: how trees are drafted: by the head (`TreeConfig`), or from the text so far (`PromptLookup`, which needs
            no head); None is plain decoding through the same forward. "auto" takes `default_tree(pair)`.
        sampling: greedy, or temperature with top-k and top-p. Noise depends on the seed, the prompt's index and the
            position alone, so neither tree nor batch size changes it.
        eos_token_ids: tokens that end an answer; None takes the target's, () never stops early.
        seed: of the noise.

    Returns:
        A `Generation`, or a list of them for a list of prompts. An answer in which the target's logits are not finite
        ends there, with the `error` in its `Generation` and a warning; the others go on.

    Raises:
        JetSpecError: an argument that makes no sense, a prompt that is empty or too long, or the error of a single
            prompt's answer.

    Example:
        pair = load_pretrained("smollm2-135m")
        print(generate(pair, pair.chat("Name three rivers."), max_new_tokens=64).text)
    """
    single, prompts = _as_list(prompt)
    results: list[Any] = [None] * len(prompts)
    chunks = _run(pair, prompts, max_new_tokens, batch_size, tree, sampling, eos_token_ids, seed, None)
    for chunk in _with_errors(chunks, single):
        if chunk.result is not None:
            results[chunk.index] = chunk.result
    return results[0] if single else results


def stream(pair: Pair, prompt: Prompt | Sequence[Prompt], *, max_new_tokens: int = 256,
           batch_size: int | None = None, tree: Draft | None = "auto",
           sampling: SamplingParams = DEFAULT_SAMPLING, eos_token_ids: Sequence[int] | None = None, seed: int = 0,
           rounds_per_chunk: int = STREAM_ROUNDS) -> Iterator[StreamChunk]:
    """The same as `generate`, telling what has been accepted every `rounds_per_chunk` rounds.

    Yields:
        `StreamChunk`s; the last one of each prompt carries its `Generation`.

    Raises:
        JetSpecError: as `generate`; the error of a single prompt's answer comes after its last chunk.
    """
    rounds_per_chunk = _at_least_one("rounds_per_chunk", rounds_per_chunk)
    single, prompts = _as_list(prompt)
    chunks = _run(pair, prompts, max_new_tokens, batch_size, tree, sampling, eos_token_ids, seed, rounds_per_chunk)
    return _with_errors(chunks, single)


def _with_errors(chunks: Iterator[StreamChunk], single: bool) -> Iterator[StreamChunk]:
    """Passes chunks on, and makes sure that nobody overlooks an answer that ended in an error."""
    for chunk in chunks:
        yield chunk
        if chunk.result is not None and chunk.result.error is not None:
            if single:
                raise JetSpecError(chunk.result.error)
            warnings.warn(chunk.result.error, RuntimeWarning, stacklevel=2)


def bucket(size: int, smallest: int) -> int:
    """The next of smallest, 1.5 smallest, 2 smallest, 3 smallest, 4 smallest, ...: few sizes, few compilations."""
    while smallest < size:
        if smallest + smallest // 2 >= size:
            return smallest + smallest // 2
        smallest *= 2
    return smallest


@dataclass
class Request:
    """One prompt on its way."""

    index: int
    ids: list[int]
    limit: int  # length at which it ends
    started: float = 0.0  # by the run's clock
    prompt_seconds: float = 0.0
    told: int = 0  # answer tokens streamed
    told_rounds: int = 0
    text: TextStream | None = None  # of the answer, where somebody streams it


def _run(pair: Pair, prompts: list[Prompt], max_new_tokens: int, batch_size: int | None, tree: Draft | None,
         sampling: SamplingParams, eos_token_ids: Sequence[int] | None, seed: int,
         rounds_per_chunk: int | None) -> Iterator[StreamChunk]:
    """Checks the arguments now, decodes when iterated."""
    if not isinstance(pair, Pair):
        raise JetSpecError(f"pair must come from load_pretrained, not {shown(pair)}")
    groups, shards = shards_of(pair.mesh)
    share = pair.share()
    requests = read_requests(pair, prompts, max_new_tokens)
    vocab = pair.target_config.vocab_size
    eos = pair.target_config.eos_token_ids
    if eos_token_ids is not None:
        ids = _token_ids(eos_token_ids)
        if ids is None or not all(0 <= i < vocab for i in ids):
            single = as_integer(eos_token_ids)
            raise JetSpecError(f"eos_token_ids must be a list of token ids from 0 to {vocab - 1}, not "
                               f"{shown(eos_token_ids)}" + ("" if single is None else f": write {shown([single])}"))
        eos = tuple(ids)
    if not isinstance(sampling, SamplingParams):
        raise JetSpecError(f"sampling must be a SamplingParams, not {shown(sampling)}")
    noise = as_integer(seed)
    if noise is None or not 0 <= noise < 2**32:
        raise JetSpecError(f"seed must be an integer from 0 to 2**32 - 1, not {shown(seed)}")
    batch_size = DEFAULT_BATCH * groups if batch_size is None else _at_least_one("batch_size", batch_size)
    if batch_size % groups:
        raise JetSpecError(f"batch_size {shown(batch_size)} is not a multiple of the mesh's {groups} groups of "
                           "devices: choose one that is")
    rows = min(batch_size, len(requests))
    rows = -(-rows // groups) * groups
    decoder = Decoder(share.target_config, drafter_of(share, tree, rows // groups), groups)
    run = Run(pair, decoder, Sampler.create(sampling, shards), eos, noise, max_new_tokens)
    return run.steps(requests, rows, rounds_per_chunk)


class Run:
    """One call of `generate` or `stream`: keeps the rows full and reports what they produce."""

    def __init__(self, pair: Pair, decoder: Decoder, sampler: Sampler, eos: tuple[int, ...], seed: int,
                 max_new_tokens: int) -> None:
        self.pair, self.decoder, self.eos = pair, decoder, eos
        self.max_new_tokens = int(max_new_tokens)
        self.sampler, self.seed = put(pair.mesh, sampler=sampler, seed=np.uint32(seed))
        self.clock = Clock()

    def steps(self, requests: list[Request], batch: int, rounds_per_chunk: int | None) -> Iterator[StreamChunk]:
        """Decodes all requests in `batch` rows; reports after so many rounds, or (None) when a row can be refilled."""
        if not requests:
            return
        slots = bucket(max(r.limit for r in requests) + self.decoder.drafter.max_path, 256)
        eos = np.full((-(-max(len(self.eos), 1) // 4) * 4,), -1, np.int32)  # few sizes, few compilations
        eos[:len(self.eos)] = self.eos
        share, pace = batch // self.decoder.data_shards, Pace()
        with enough_memory(self.decoder, share, slots, self.pair.mesh):
            state = self._call(create_state, (self.decoder, share, slots), self.sampler, *put(self.pair.mesh, eos=eos))
            self._prepare_rounds(state)
            waiting, rows = deque(requests), [None] * batch  # type: deque[Request], list[Request | None]
            while waiting or any(rows):
                state = self._refill(state, waiting, rows)
                occupied = sum(request is not None for request in rows)
                # With prompts waiting, stop at the first row that can be refilled; else finish them all.
                state = self._rounds(state, rounds_per_chunk or slots, occupied if waiting else 1, pace)
                yield from self._report(state, rows, rounds_per_chunk is not None)

    def _prepare_rounds(self, state: DecodeState) -> None:
        """Their program is loaded, where it is stored, while prompts are read."""
        if self.pair.mesh is None:
            limits = put(None, max_rounds=np.int32(1), min_active=np.int32(1))
            self.pair.programs.prepare(run_rounds, (self.decoder,), self.pair.params, state, *limits, donate=1)

    def _rounds(self, state: DecodeState, most: int, min_active: int, pace: Pace) -> DecodeState:
        """So many rounds, or fewer once fewer than `min_active` sequences are unfinished, in dispatches that are short
        enough for Ctrl-C. In between the host asks for nothing but who is done."""
        while most > 0:
            start, rounds = self.clock.now(), min(most, pace.rounds)
            limits = put(self.pair.mesh, max_rounds=np.int32(rounds), min_active=np.int32(min_active))
            state = self._call(run_rounds, (self.decoder,), self.pair.params, state, *limits, donate=1)
            if np.sum(~fetch(state.done)) < min_active:
                break  # perhaps after a few rounds, which say nothing about the pace
            pace.took(rounds, self.clock.now() - start)
            most -= rounds
        return state

    def _call(self, function: Callable[..., Any], static: tuple, *args: Any, donate: int | None = None) -> Any:
        """Runs a compiled program, on one device or on all of the mesh."""
        if self.pair.mesh is None:
            return self.pair.programs(self.clock, function, static, *args, donate=donate)
        return self.pair.programs(self.clock, over_mesh, (self.pair.mesh, function, static), *args, donate=donate)

    def _refill(self, state: DecodeState, waiting: deque[Request], rows: list[Request | None]) -> DecodeState:
        """Reads waiting prompts into free rows, a few at a time on every group of devices.

        All that are read together take the room and the arithmetic of the longest: a long one waits for the next turn.
        """
        groups = self.decoder.data_shards
        share = len(rows) // groups  # rows of a group
        free = deque(sorted((b for b, request in enumerate(rows) if request is None), key=lambda b: b % share))
        while waiting and free:
            started: dict[int, Request] = {}
            while waiting and free and len(started) < PROMPT_ROWS * groups:
                wider = {**started, free[0]: waiting[0]}
                size, _, width = self._room(wider, share)
                if started and size * width > PROMPT_TOKENS:
                    break
                started = wider
                free.popleft(), waiting.popleft()
            state = self._read(state, started)
            for b, request in started.items():
                rows[b] = request
        return state

    def _room(self, started: dict[int, Request], share: int) -> tuple[int, int, int]:
        """What prompts take on every group of devices: (sequences, tokens a forward, tokens of each), in few sizes."""
        members = Counter(b // share for b in started)
        longest = max(len(request.ids) for request in started.values())
        chunk = min(PROMPT_CHUNK, 1 << max(5, (longest - 1).bit_length()))
        width = bucket(longest, chunk) if chunk == PROMPT_CHUNK else chunk
        return 1 << (max(members.values()) - 1).bit_length(), chunk, -(-width // chunk) * chunk

    def _read(self, state: DecodeState, started: dict[int, Request]) -> DecodeState:
        """Runs prompts through target and drafter and puts them into their rows."""
        groups, start = self.decoder.data_shards, self.clock.now()
        share = state.length.shape[0] // groups  # rows of a group
        by_group = [[b for b in started if b // share == group] for group in range(groups)]
        size, chunk, width = self._room(started, share)  # padded with one-token prompts that are dropped
        tokens, count = np.zeros((groups * size, width), np.int32), np.ones((groups * size,), np.int32)
        limit, row, index = count.copy(), np.full_like(count, share), np.zeros(count.shape, np.uint32)
        for group, members in enumerate(by_group):
            for i, b in enumerate(members, group * size):
                request = started[b]
                tokens[i, :len(request.ids)], count[i], limit[i] = request.ids, len(request.ids), request.limit
                row[i], index[i] = b % share, request.index
        rows, texts, counts, limits, indices = put(self.pair.mesh, rows=row, tokens=tokens, count=count, limit=limit,
                                                   index=index)
        keys = self._call(sequence_keys, (), self.seed, indices)
        prefix = self._call(prefill, (self.decoder, chunk), self.pair.params, self.sampler, texts, counts, keys)
        state = self._call(insert, (self.decoder,), state, prefix, rows, texts, counts, limits, keys, donate=0)
        jax.block_until_ready(state.length)
        for request in started.values():
            request.started, request.prompt_seconds = start, self.clock.now() - start
        return state

    def _report(self, state: DecodeState, rows: list[Request | None], with_text: bool) -> Iterator[StreamChunk]:
        """One fetch for all rows; frees the rows that are done. Text is made where somebody streams it."""
        host = fetch((state.tokens, state.length, state.done, state.rounds, state.accept_lengths, state.tree_sizes))
        for b, request in enumerate(rows):
            if request is None:
                continue
            tokens, length, done, rounds, accepted, sizes = (array[b] for array in host)
            answer = tokens[len(request.ids):length].tolist()
            result = None
            accepted, sizes = accepted[:rounds].tolist(), sizes[:rounds].tolist()
            if done:
                rows[b] = None
                result = self._result(request, answer, accepted, sizes)
                answer, accepted = result.token_ids, result.accept_lengths
            text = self._new_text(request, answer, bool(done)) if with_text else ""
            chunk = StreamChunk(request.index, text, answer[request.told:], accepted[request.told_rounds:], result)
            request.told, request.told_rounds = len(answer), int(rounds)
            yield chunk

    def _result(self, request: Request, answer: list[int], accepted: list[int], sizes: list[int]) -> Generation:
        reason, error = "length", None
        if answer[-1] == NO_TOKEN:
            answer = answer[:-1]
            accepted = [*accepted[:-1], len(answer) - 1 - sum(accepted[:-1])] if accepted else []
            reason, error = "error", not_finite(request.index, len(answer), self.pair.target_config.dtype)
        elif answer[-1] in self.eos:
            reason = "stop"
        elif len(answer) < self.max_new_tokens:
            reason = "context"
        return Generation(
            text=self._decode(answer), token_ids=answer, accept_lengths=accepted, tree_sizes=sizes,
            rounds=len(accepted), finish_reason=reason,
            seconds=self.clock.now() - request.started, prompt_seconds=request.prompt_seconds,
            compile_seconds=self.clock.waited, error=error)

    def _decode(self, ids: list[int]) -> str | None:
        if self.pair.tokenizer is None:
            return None
        with tokenizer_errors(CANNOT_DECODE):
            return self.pair.tokenizer.decode(ids, skip_special_tokens=True)

    def _new_text(self, request: Request, answer: list[int], done: bool) -> str:
        """Text that was not streamed yet; what later tokens may change waits for them."""
        if self.pair.tokenizer is None:
            return ""
        if request.text is None:
            request.text = TextStream(self.pair.tokenizer)
        return request.text.add(answer, done)


def not_finite(index: int, tokens: int, dtype: str) -> str:
    """The error of an answer that ends after so many tokens, because the target's logits there are not finite."""
    wider = {"float16": "bfloat16 or float32 (dtype=, --dtype)"}.get(dtype, "float64, or check the weights")
    return (f"prompt {index}: the target's logits are not finite after {tokens} tokens of the answer; probably its "
            f"values overflow {dtype}: load it in {wider}")


def default_tree(pair: Pair, batch: int = 1) -> TreeConfig | None:
    """What drafts where nothing else is asked for: the published tree.

    On a CPU, whose forward pays for every node of a large target, the best nodes, so many that `batch` sequences decode
    fastest by what was timed (`jetspec_jax.costs`), or None where plain decoding does; few where nothing was timed, or
    the head does not know how much it accepts.
    """
    if jax.default_backend() != "cpu" or not is_large(pair.params.target):
        return DEFAULT_TREE
    if not pair.costs or not known_lengths(pair.head_config):
        return CPU_TREE
    nodes = fastest_nodes(expected_speeds(pair, batch))
    return None if nodes == 1 else replace(CPU_TREE, budget=nodes)


def best_tree(pair: Pair) -> TreeConfig:
    """The default tree, or the best of those that do not beat plain decoding."""
    speeds = {nodes: speed for nodes, speed in expected_speeds(pair).items() if nodes > 1}
    return default_tree(pair) or replace(CPU_TREE, budget=fastest_nodes(speeds))


def expected_speeds(pair: Pair, batch: int = 1) -> dict[int, float]:
    """Tokens per second to expect of a large target on a CPU, by nodes a tree (see `Costs.speeds`); empty where nothing
    was timed."""
    mine = [costs for costs in pair.costs if costs.tile == pair.target_config.weight_tile]
    return mine[0].speeds(pair.head_config, batch) if mine else {}


def drafter_of(pair: Pair, tree: Draft | None, rows: int = 1) -> Drafter:
    """What drafts for `tree` with this pair, for so many sequences on every group of devices."""
    if tree == "auto":
        tree = default_tree(pair, rows)
    if tree is None:
        return NoDrafter(nodes=plain_nodes(rows, jax.default_backend() == "gpu"))
    if isinstance(tree, PromptLookup):
        return LookupDrafter(tree)
    if not isinstance(tree, TreeConfig):
        raise JetSpecError('tree must be a TreeConfig, a PromptLookup, "auto", or None for plain decoding, not '
                           f"{shown(tree)}")
    if pair.head_config is None:
        raise JetSpecError("this pair has no draft head: load one (load_pretrained(target, head=...), decode.py: "
                           "--head), or decode without: tree=PromptLookup() or None (decode.py: --draft)")
    if isinstance(pair.head_config, AutoregressiveHeadConfig):
        return AutoregressiveDrafter(pair.target_config, pair.head_config, tree)
    assert isinstance(pair.head_config, HeadConfig)
    return HeadDrafter(pair.target_config, pair.head_config, tree)


def _as_list(prompt: Prompt | Sequence[Prompt]) -> tuple[bool, list[Prompt]]:
    """(whether it was a single prompt, the prompts)."""
    if isinstance(prompt, str):
        return True, [prompt]
    if isinstance(prompt, bytes | bytearray | memoryview):
        raise JetSpecError("prompt is bytes: decode it to text first")
    if isinstance(prompt, np.ndarray | jax.Array):
        prompt = np.asarray(prompt).tolist()
    if not isinstance(prompt, Sequence):
        raise JetSpecError(f"prompt must be text, a list of token ids, or a list of either, not {shown(prompt)}")
    items = list(prompt)
    if items and all(as_integer(item) is not None for item in items):
        return True, [items]  # type: ignore[list-item]
    return False, items  # type: ignore[return-value]


def read_requests(pair: Pair, prompts: list[Prompt], max_new_tokens: int) -> list[Request]:
    """Encodes and checks all prompts before anything runs."""
    limit, most = pair.target_config.max_positions, _at_least_one("max_new_tokens", max_new_tokens)
    requests = []
    for index, prompt in enumerate(prompts):
        ids = _encode(pair, prompt, index)
        if len(ids) >= limit:
            raise JetSpecError(f"prompt {index} has {len(ids)} tokens and the target's context limit is {limit}, the "
                               "answer included: shorten it")
        requests.append(Request(index, ids, min(len(ids) + most, limit)))
    return requests


def _encode(pair: Pair, prompt: Prompt, index: int) -> list[int]:
    if isinstance(prompt, str):
        try:
            ids = pair.encode(prompt)
        except JetSpecError as error:
            raise JetSpecError(f"prompt {index}: {error}") from error
    elif (found := _token_ids(prompt)) is None:
        raise JetSpecError(f"prompt {index} is neither text nor a list of token ids: {shown(prompt)}")
    else:
        ids = found
    if not ids:
        raise JetSpecError(f"prompt {index} is empty: there is nothing to continue")
    wrong = [i for i in ids if not 0 <= i < pair.target_config.vocab_size]
    if wrong:
        raise JetSpecError(f"prompt {index} holds token id {shown(wrong[0])}, outside the vocabulary of "
                           f"{pair.target_config.vocab_size}")
    return ids


def _token_ids(value: Any) -> list[int] | None:
    """A list, or an array with one axis, of integers; None of anything else."""
    items = value.tolist() if isinstance(value, np.ndarray | jax.Array) else value
    if not isinstance(items, list | tuple | range):
        return None
    ids = [i for item in items if (i := as_integer(item)) is not None]
    return ids if len(ids) == len(items) else None


def as_integer(value: Any) -> int | None:
    """An integer of any kind, an array without axes too, as Python's; None of anything else, a bool included."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _at_least_one(name: str, value: int) -> int:
    number = as_integer(value)
    if number is None or number < 1:
        raise JetSpecError(f"{name} must be an integer of at least 1, not {shown(value)}")
    return number
