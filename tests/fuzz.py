"""Damages files of strangers by the thousand: each is refused in one line, or what is read from it is sound.

    python -m tests.fuzz KIND --count 1000 --seed 0

A mutation follows from the kind, the seed and its number: `--first I --count 1` makes one again. They run in a process
of their own, watched from outside: what hangs, eats memory or crashes takes only that process with it, and a new one
goes on behind it. Failures are printed as they are found, and counts at the end; the exit status is 1 if anything
failed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from converters import convert
from converters.assemble import take_apart
from converters.names import gguf_name, head_slots, target_slots
from converters.safetensors_folder import INDEX, SINGLE, write_safetensors
from converters.tokenizer import MORE_TEMPLATES, load_tokenizer
from jetspec_jax import JetSpecError, Pair, checkpoint, load_pretrained
from jetspec_jax.config import MAX_INT, HeadConfig
from jetspec_jax.draft import Params
from jetspec_jax.generate import read_requests
from jetspec_jax.head import head_shapes
from jetspec_jax.pretrained import load_head
from jetspec_jax.target import target_shapes
from jetspec_jax.text import TextStream
from tests.models import random_params, tiny_target
from tests.test_gguf import TOKENS as GGUF_TOKENS
from tests.test_gguf import write as write_gguf

PACKAGES = (Path(convert.__file__).parent, Path(checkpoint.__file__).parent)
LONGEST_MESSAGE = 2000
START_SECONDS = 600  # of a process, on a slow machine
GGUF = "model.gguf"
TEXT = "ab c 12 <s>é\n"
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
HUGE = 2**32
READY = ("ready",)  # says a process that has made its sources
MARK, TWIN = "@mark@", "@twin@"
SIZES = (0, 1, 2, 3, 7, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**61, 2**63, 2**64 - 1)
# Values as JSON writes them, or as it does not.
NASTY = ("null", "true", "false", "-1", "-0.0", "0.5", "1e-320", "1e30", "1e400", "-1e400", "NaN", "1" + "0" * 400,
         "9" * 5000, *map(str, SIZES), '""', '"\\ud800"', '"\\u0000"', '"a\\nb\\u001b[2J"', '"../x"', '"x{0}%s"',
         f'"{"x" * 10**5}"', "[]", "{}", "[null]", '{"a": 1}', "[" * 10**5 + "]" * 10**5, "[" * 500 + "]" * 500,
         "[" + "0, " * 10**5 + "0]", "")
SNIPPETS = ("{{ missing.field }}", "{{ raise_exception('a\nb') }}", "{% if %}", "{{ 1 / 0 }}", "{{ messages[9] }}",
            "{% include 'x' %}", "{{ ''.__class__.__mro__ }}", "{{ strftime_now(5) }}", "{% for x in 7 %}{% endfor %}",
            "{# a note #}", "{{ bos_token }}", "\ufeff", "\r\n")


@dataclass(frozen=True)
class Kind:
    """Files of one kind.

    Attributes:
        make: makes sound sources, in folders of a new folder.
        files: patterns of what is damaged in them.
        use: does with a source what a user does, who has an output in mind; raises where what comes of it is unsound.
    """

    make: Callable[[Path], None]
    files: tuple[str, ...]
    use: Callable[[Path, Path, random.Random], None]


@dataclass
class Report:
    """What came of the mutations of a kind.

    Attributes:
        outcomes: how many were "refused", "accepted" or "failed".
        ways: the same for every way of damaging.
        places: where in the code they were refused, how often.
        failures: a line each.
        megabytes: in memory at most.
        slowest: (seconds, number) of the mutation that took longest.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    ways: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    places: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    megabytes: float = 0
    slowest: tuple[float, int] = (0, 0)


def run(kind: str, seed: int, count: int, first: int = 0, seconds: float = 20, megabytes: float = 2000,
        kinds: Mapping[str, Kind] | None = None, told: Callable[[str], object] = lambda line: None) -> Report:
    """Makes mutations and watches what comes of them.

    Args:
        kind: of files, a name of `KINDS`.
        first, count: the numbers of the mutations.
        seconds: what a mutation may take.
        megabytes: what its process may have in memory.
        kinds: others than `KINDS`.
        told: called with each failure at once.
    """
    report, end = Report(), first + count
    while first < end:
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(
                target=_work, args=(theirs, Path(folder), (kinds or KINDS)[kind], f"{seed}-{kind}", range(first, end)))
            process.start()
            theirs.close()
            try:
                first = _watch(process, ours, report, seconds, megabytes, told) + 1
            finally:
                process.kill()
                process.join()
    return report


def _watch(process: Any, channel: Any, report: Report, seconds: float, megabytes: float,
           told: Callable[[str], object]) -> int:
    """Follows a process until it ends or must be ended; returns the number of its last mutation."""
    number, what, began, patience = -1, "", time.monotonic(), START_SECONDS
    ways: list[str] = []  # none: no mutation is in progress

    def note(outcome: str, detail: str) -> int:
        report.outcomes[outcome] += 1
        for way in ways:
            report.ways[way][outcome] += 1
        if outcome == "failed":
            report.failures.append(f"{number}: {what}: {detail}")
            told(report.failures[-1])
        elif outcome == "refused":
            report.places[detail] += 1
        report.slowest = max(report.slowest, (time.monotonic() - began, number))
        return number

    while True:
        try:
            message: Any = channel.recv() if channel.poll(0.02) else ()
        except EOFError:
            process.join()
            assert ways or process.exitcode == 0, f"status {process.exitcode} outside of all mutations"
            return note("failed", f"the process ended with status {process.exitcode}") if ways else number
        if message == READY:
            began, patience = time.monotonic(), 10 * seconds
        elif len(message) == 3:
            (number, ways, what), began = message, time.monotonic()
        elif message:
            note(*message)
            ways = []
        resident = 0.0
        with contextlib.suppress(psutil.Error):  # it has just ended
            resident = psutil.Process(process.pid).memory_info().rss / 1e6
        report.megabytes = max(report.megabytes, resident)
        if ways and resident > megabytes:
            return note("failed", f"takes more than {megabytes:g} MB")
        if ways and time.monotonic() - began > seconds:
            return note("failed", f"takes more than {seconds:g} seconds")
        assert time.monotonic() - began < patience, f"nothing came after mutation {number}"


def _work(channel: Any, folder: Path, kind: Kind, seed: str, numbers: range) -> None:
    """The process that makes mutations."""
    warnings.simplefilter("ignore")  # of fields that nobody knows
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # a GPU's memory is for all that run beside
    bases, case, temporary = folder / "bases", folder / "case", folder / "temporary"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    kind.make(bases)
    names = sorted(base.name for base in bases.iterdir())
    for name, seeds in itertools.product(names, range(4)):  # whatever is done with them
        shutil.copytree(bases / name, case / name)
        kind.use(case / name, case / "out", random.Random(seeds))
        shutil.rmtree(case)
    gc.freeze()  # all that is there so far need not be looked at again
    channel.send(READY)
    with _errors(folder / "errors") as errors:
        for number in numbers:
            rng = random.Random(f"{seed}-{number}")
            name = rng.choice(names)
            source = shutil.copytree(bases / name, case / name)
            ways, what = _damage(rng, source, kind.files, bases / name)
            before = sorted(source.rglob("*"))
            channel.send((number, ways, f"{name}: {what}"))
            outcome, detail = _outcome(kind.use, source, case / "out", rng)
            gc.collect()  # what is told of objects that go is told now
            left = {path.name for path in case.iterdir()} - {name, "out"}
            left.update(path.name for path in {*temporary.iterdir()} | ({*source.rglob("*")} ^ {*before}))
            if outcome != "failed" and left:
                outcome, detail = "failed", f"left behind or took away: {sorted(left)}"
            shown = errors.read_text(errors="replace")
            if outcome != "failed" and "Traceback (most recent call last)" in shown:
                outcome, detail = "failed", f"a traceback on the screen, the end of which is {shown[-200:]!r}"
            channel.send((outcome, detail))
            os.truncate(errors, 0)
            shutil.rmtree(case)
            for path in temporary.iterdir():
                shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _errors(file: Path) -> Iterator[Path]:
    """Lets all that the process would show of errors go into a file."""
    screen = os.dup(2)
    with file.open("ab") as stream:
        os.dup2(stream.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(screen, 2)
            os.close(screen)


def _outcome(act: Callable[..., None], *given: Any) -> tuple[str, str]:
    """("accepted", ""), ("refused", the place in the code that found out why) or ("failed", how)."""
    try:
        act(*given)
    except KeyboardInterrupt:
        raise
    except JetSpecError as error:
        text = str(error)
        if text.splitlines() != [text] or len(text) > LONGEST_MESSAGE or text != text.encode(errors="ignore").decode():
            return "failed", f"a message from {_place(error)} that is no short line of text: {text[:200]!r}"
        return "refused", _place(error)
    except BaseException as error:  # a panic of Rust is no Exception
        return "failed", f"{type(error).__name__} at {_place(error)}: {str(error)[:200]!r}"
    return "accepted", ""


def _place(error: BaseException) -> str:
    """The line of the product in which an error, or what caused it, came up first."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)
    frame = ([frame for frame in frames if Path(frame.filename).parent in PACKAGES] or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


# What a user does with a source. What is accepted must be sound.


def _use_weights(source: Path, out: Path, rng: random.Random) -> None:
    """Converts and loads a target or a head, or loads or reads it where it is."""
    head, way = source.name == "head", rng.choices(("convert", "load", "read"), (1, 2, 5))[0]
    if way == "convert":
        _write(convert.convert_head if head else convert.convert_target, source, out)
    if head:
        check_model(*(convert.read_head(source, progress=False) if way == "read" else
                      load_head(out if way == "convert" else source)))
    elif way == "read":
        check_model(*convert.read_target(source, progress=False))
    else:
        _check_pair(load_pretrained(out if way == "convert" else source), rng)


def _use_gguf(source: Path, out: Path, rng: random.Random) -> None:
    _use_weights(source / GGUF, out, rng)


def _use_tokenizer(source: Path, out: Path, rng: random.Random) -> None:
    """Reads the tokenizer of a target, or converts all of it."""
    if rng.random() < 0.15:
        _write(convert.convert_target, source, out)
        _check_pair(load_pretrained(out), rng)
    else:
        config: Any = convert.read_config(source, "target")
        _check_text(Pair(config, None, Params({}, {}), load_tokenizer(source)), rng)


def _use_checkpoint(source: Path, out: Path, rng: random.Random) -> None:
    """Loads a checkpoint, with its tokenizer or without, or exports it."""
    if source.name == "head" and rng.random() < 0.3:
        _write(convert.export_head, source, out)
        check_model(*convert.read_head(out, progress=False))
    elif source.name == "target" and rng.random() < 0.5:
        _check_pair(load_pretrained(source), rng, converted=True)
    else:
        check_model(*checkpoint.load(source), converted=True)
    _check_checksums(source)


def _check_checksums(folder: Path) -> None:
    """What was accepted is what the description tells of."""
    description = json.loads((folder / checkpoint.DESCRIPTION).read_bytes())
    if description["version"] > 1:
        for name, value in description["checksums"].items():
            data = (folder / checkpoint.ARRAYS / name).read_bytes()
            assert f"{zlib.crc32(data):08x}" == value, f"{name} was changed, and nobody saw it"


def _write(make: Callable[..., None], source: Path, out: Path) -> None:
    """Converts: wholly or not at all."""
    try:
        make(source, out, progress=False)
    except JetSpecError:
        assert not out.exists()
        raise


def _check_pair(pair: Pair, rng: random.Random, converted: bool = False) -> None:
    check_model(pair.target_config, pair.params.target, converted)
    if pair.tokenizer is not None:
        _check_text(pair, rng)


def check_model(config: Any, params: dict, converted: bool = False) -> None:
    """Shapes as the config says, ids within the vocabulary, and values that are finite: who converts looks at them, and
    checksums keep them so."""
    def check(leaf: jax.Array, expected: jax.ShapeDtypeStruct) -> None:
        assert (leaf.shape, leaf.dtype) == (expected.shape, config.dtype)
        assert converted or np.isfinite(np.asarray(leaf, np.float64)).all()

    jax.tree.map(check, params, _shapes(config))
    if isinstance(config, HeadConfig):
        assert 0 <= config.mask_token_id < config.vocab_size
        assert all(0 <= i < config.num_target_layers for i in config.target_layer_ids)
    else:
        assert params["params"]["embedding"].shape == (config.vocab_size, config.hidden_size)
        assert all(0 <= i < config.vocab_size for i in config.eos_token_ids)
        assert 0 < config.max_positions <= MAX_INT


@cache
def _shapes(config: Any) -> Any:
    return head_shapes(config) if isinstance(config, HeadConfig) else target_shapes(config)


def _check_text(pair: Pair, rng: random.Random) -> None:
    """Text becomes ids of the vocabulary, and ids the same text at once and in pieces."""
    size = pair.target_config.vocab_size
    assert all(0 <= i < size for i in read_requests(pair, [TEXT], 4)[0].ids)
    ids, stream = [rng.randrange(size) for _ in range(12)], TextStream(pair.tokenizer)
    pieces = [stream.add(ids[:end], end == len(ids)) for end in range(1, len(ids) + 1)]
    whole = pair.tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces) == whole, f"{ids} became {pieces}, and {whole!r} at once"
    chat = pair.chat("Hi", system="Be brief.")
    chat.encode()
    assert all(0 <= i < size for i in read_requests(pair, [chat], 4)[0].ids)


# The sources that are damaged.


def _make_weights(bases: Path) -> None:
    """Targets of all families and a head, in one file or several."""
    _make_source(bases / "llama", "llama", tie_word_embeddings=True, attention_bias=True, rope_parameters={
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64})
    _make_source(bases / "dense", "qwen3", rope_theta=1e6, sliding_window=None, use_sliding_window=False, rope_scaling={
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})
    _make_source(bases / "experts", "qwen3_moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8,
           norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[0])
    _make_head(bases / "head")


def _make_head(folder: Path, **fields: Any) -> None:
    """A released head of random weights."""
    _make_source(folder, "qwen3", block_size=6, num_target_layers=4, dflash_config={
        "target_layer_ids": [0, 3], "mask_token_id": 5, "causal_head": True}, **fields)


def _make_source(folder: Path, family: str, vocab_size: int = 40, **fields: Any) -> None:
    """A Hugging Face folder of random weights; those of experts in two files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": family, "vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 24,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
              "rms_norm_eps": 1e-6, "dtype": "float32", "max_position_embeddings": 256, "hidden_act": "silu",
              "layer_types": ["full_attention"] * 2, "eos_token_id": 2, "bos_token_id": 1, "use_cache": True}
    (folder / "config.json").write_text(json.dumps({**config, **fields}, indent=1))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 3], "temperature": 0.6}')
    kind = "head" if folder.name == "head" else "target"
    shape: Any = convert.read_config(folder, kind)
    slots, shapes = (head_slots, head_shapes) if kind == "head" else (target_slots, target_shapes)
    tensors = list(take_apart(random_params(shapes(shape), np.random.default_rng(0)), slots(shape)))
    parts = 2 if family == "qwen3_moe" else 1
    files = {SINGLE if parts == 1 else f"model-{i}.safetensors": tensors[i::parts] for i in range(parts)}
    for file, shard in files.items():
        write_safetensors(folder / file, {name: value.shape for name, value in shard}, np.dtype(np.float32), shard,
                          lambda count: None)
    if parts > 1:
        names = {name: file for file, shard in files.items() for name, _ in shard}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))


def _make_gguf(bases: Path) -> None:
    """Both architectures, with their tokenizers."""
    for arch in ("llama", "qwen3"):
        config = tiny_target(dtype="float32", vocab_size=len(GGUF_TOKENS), qk_norm=arch == "qwen3",
                             tie_embeddings=arch == "llama")
        params = random_params(target_shapes(config), np.random.default_rng(0))
        tensors = {gguf_name(name): np.array(value) for name, value in take_apart(params, target_slots(config))}
        (bases / arch).mkdir(parents=True)
        write_gguf(bases / arch / GGUF, config, tensors, arch, templates=TEMPLATE, tokenizer={"add_bos_token": False},
                   **{"rope.scaling.type": "linear", "rope.scaling.factor": 2.0})


def _make_tokenizers(bases: Path) -> None:
    """Byte-level BPE as one file and as several, and pieces with byte fallback; each with a target."""
    alphabet, special = sorted(pre_tokenizers.ByteLevel.alphabet()), {"bos_token": "<s>", "eos_token": "</s>"}
    merges = [("a", "b"), ("Ġ", "c"), ("1", "2")]
    vocab = {token: i for i, token in enumerate([*special.values(), *alphabet, *map("".join, merges)])}
    whole = Tokenizer(models.BPE(vocab, merges))
    whole.pre_tokenizer, whole.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    whole.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=whole, chat_template={"default": TEMPLATE, "rag": TEMPLATE},
                            **special).save_pretrained(bases / "whole")
    fallback = {token: i for i, token in enumerate([
        "<unk>", *special.values(), *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁a", "b", "▁c", "1"])}
    pieces = Tokenizer(models.BPE(fallback, [], byte_fallback=True, unk_token="<unk>"))
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    pieces.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                        decoders.Strip(" ", 1, 0)])
    PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="<unk>", chat_template=TEMPLATE,
                            **special).save_pretrained(bases / "pieces")
    parts = {"vocab.json": json.dumps(vocab), "merges.txt": "#version: 0.2\na b\nĠ c\n1 2\n",
             "special_tokens_map.json": json.dumps(special), "added_tokens.json": json.dumps({"<t>": len(vocab)}),
             "tokenizer_config.json": json.dumps({"tokenizer_class": "GPT2Tokenizer", "unk_token": "</s>", **special}),
             "chat_template.jinja": TEMPLATE}
    (bases / "parts").mkdir()
    for name, text in parts.items():
        (bases / "parts" / name).write_text(text)
    for name, size in (("whole", len(vocab)), ("parts", len(vocab) + 1), ("pieces", len(fallback))):
        _make_source(bases / name, "qwen3", size, num_hidden_layers=1, layer_types=["full_attention"])


def _make_checkpoints(bases: Path) -> None:
    """A target with its tokenizer and a head, converted."""
    sources = bases.with_name("sources")
    _make_tokenizers(sources)
    _make_head(sources / "head", num_hidden_layers=1, layer_types=["full_attention"])
    convert.convert_target(sources / "whole", bases / "target", progress=False, label="whole")
    convert.convert_head(sources / "head", bases / "head", progress=False, label="head")
    for arrays in bases.glob(f"*/{checkpoint.ARRAYS}"):
        _make_timeless(arrays / "_CHECKPOINT_METADATA", r'(?<=_nsecs": )\d+', "1" * 19)
        _make_timeless(arrays / "commit_success.txt", r"/\S+", "/arrays")
        _seal(arrays.parent)


def _make_timeless(file: Path, pattern: str, fixed: str) -> None:
    """Lets a file be the same whenever and wherever it is made."""
    text, count = re.subn(pattern, fixed, file.read_text())
    assert count, f"{file.name} is written otherwise"
    file.write_text(text)


KINDS = {
    "config": Kind(_make_weights, ("*config.json",), _use_weights),
    "safetensors": Kind(_make_weights, ("*.safetensors", "*.index.json"), _use_weights),
    "gguf": Kind(_make_gguf, (GGUF,), _use_gguf),
    "tokenizer": Kind(_make_tokenizers, (
        "tokenizer*.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja",
        f"{MORE_TEMPLATES}/*.jinja"), _use_tokenizer),
    "checkpoint": Kind(_make_checkpoints, (
        checkpoint.DESCRIPTION, f"{checkpoint.ARRAYS}/*", f"{checkpoint.ARRAYS}/*/*", f"{checkpoint.TOKENIZER}/*"),
        _use_checkpoint)}


# How they are damaged.


def _damage(rng: random.Random, source: Path, patterns: tuple[str, ...], base: Path) -> tuple[list[str], str]:
    """Damages one to three files, of each pattern as often: (the ways, what was done)."""
    ways, told = [], []
    for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
        found = [files for pattern in patterns if (files := sorted(
            file for file in source.glob(pattern) if file.is_file() and file.stat().st_size < HUGE))]
        if not found:
            break
        file = rng.choice(rng.choice(found))
        way, what = _damage_file(rng, file, base / file.relative_to(source))
        ways.append(way)
        told.append(f"{file.relative_to(source)}: {what}")
    if (source / checkpoint.ARRAYS).is_dir() and rng.random() < 0.6:
        told.append(_seal(source))
    return ways, ascii(", ".join(told))[1:-1]


def _seal(folder: Path) -> str:
    """Puts the checksums right, so that what they guard is tested too."""
    file = folder / checkpoint.DESCRIPTION
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        files = (file, *(folder / checkpoint.ARRAYS).rglob("*"))
        if file.is_file() and max(path.stat().st_size for path in files) < HUGE:
            description = {**json.loads(file.read_bytes()), "checksums": checkpoint.checksums(folder)}
            file.write_text(json.dumps(description))
    return "checksums put right"


def _damage_file(rng: random.Random, file: Path, original: Path) -> tuple[str, str]:
    """(the way, what was done)."""
    way = rng.random()
    if way < 0.12:
        return _replace(rng, file)
    data = file.read_bytes()
    if way < 0.35 or not data:
        return _damage_bytes(rng, file, data)
    if file.suffix == ".gguf":
        return _damage_gguf(rng, file, bytearray(data), original)
    start = 8 if file.suffix == ".safetensors" else 0
    if start and way < 0.4:
        return _damage_length(rng, file, data)
    end = 8 + int.from_bytes(data[:8], "little") if start else len(data)
    try:
        tree = json.loads(data[start:end])
    except UnicodeDecodeError:
        return _damage_bytes(rng, file, data)
    except (ValueError, RecursionError):
        return _damage_lines(rng, file, data)
    text, name, what = _damage_json(rng, tree)
    written = text.encode(errors="surrogatepass")
    file.write_bytes((len(written).to_bytes(8, "little") if start else b"") + written + data[end:])
    return f"json {name}", what


def _replace(rng: random.Random, file: Path) -> tuple[str, str]:
    """Puts something else into the place of a file."""
    way = rng.choice(("emptied", "missing", "folder", "loop", "pipe", "endless", "huge"))
    if way == "huge":
        os.truncate(file, HUGE)  # takes no room on the disk
    elif way == "emptied":
        os.truncate(file, 0)
    else:
        file.unlink()
    if way == "folder":
        file.mkdir()
    elif way == "loop":
        file.symlink_to(file)
    elif way == "pipe":
        os.mkfifo(file)
    elif way == "endless":
        file.symlink_to("/dev/zero")
    return f"file {way}", way


def _damage_bytes(rng: random.Random, file: Path, data: bytes) -> tuple[str, str]:
    """Changes bytes, near the start more often than elsewhere."""
    at = rng.randrange(max(1, rng.choice((len(data), min(len(data), 600)))))
    end = min(len(data), at + rng.choice((1, 1, 4, 8, 100)))
    way = rng.choice(("flipped", "overwritten", "inserted", "deleted", "repeated", "truncated", "appended", "recoded"))
    noise = rng.randbytes(max(1, end - at)) if rng.random() < 0.5 else rng.choice((b"\0", b"\xff", b"\n", b'"', b"{"))
    if way == "flipped":
        new = data[:at] + bytes(byte ^ (1 << rng.randrange(8)) for byte in data[at:end]) + data[end:]
    elif way == "recoded":
        new = data.decode("latin-1").encode(rng.choice(("utf-8", "utf-8-sig", "utf-16")))
    else:
        new = {"overwritten": data[:at] + noise + data[at + len(noise):], "inserted": data[:at] + noise + data[at:],
               "deleted": data[:at] + data[end:], "repeated": data[:end] + data[at:], "truncated": data[:at],
               "appended": data + noise}[way]
    file.write_bytes(new)
    return f"bytes {way}", f"{way} at {at}"


def _damage_lines(rng: random.Random, file: Path, data: bytes) -> tuple[str, str]:
    """Changes lines of text."""
    lines = data.split(b"\n")
    at, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    way = rng.choice(("removed", "repeated", "swapped", "added"))
    if way == "removed":
        del lines[at]
    elif way == "repeated":
        lines.insert(other, lines[at])
    elif way == "swapped":
        lines[at], lines[other] = lines[other], lines[at]
    else:
        lines.insert(at, rng.choice(SNIPPETS).encode())
    file.write_bytes(b"\n".join(lines))
    return f"line {way}", f"line {at} {way}"


def _damage_length(rng: random.Random, file: Path, data: bytes) -> tuple[str, str]:
    """Another length of a safetensors header."""
    length = rng.choice((*SIZES, len(data), len(data) - 8, int.from_bytes(data[:8], "little") + rng.choice((-1, 1))))
    file.write_bytes(length.to_bytes(8, "little") + data[8:])
    return "header length", f"header length {length}"


def _damage_gguf(rng: random.Random, file: Path, data: bytearray, original: Path) -> tuple[str, str]:
    """Changes a number (of the header, of metadata, of a tensor's place) or a byte of a string."""
    name, parts = rng.choice(_gguf_places(original))
    at, size, text = rng.choice(parts)
    if text:
        at += rng.randrange(size)
        data[at:at + 1] = bytes([rng.choice((0, 10, 27, 127, 128, 255, rng.randrange(32, 127)))])
        way, what = "gguf text", f"byte {at}"
    else:
        value = int.from_bytes(data[at:at + size], "little")
        near = (value + 1, value - 1, 2 * value, value // 2, value ^ 1 << rng.randrange(8 * size), rng.randrange(14))
        new = rng.choice((*near, *SIZES)) % 2 ** (8 * size)
        data[at:at + size] = new.to_bytes(size, "little")
        way, what = "gguf number", f"{value} at {at} became {new}"
    file.write_bytes(data)
    return way, f"{name}: {what}"


@cache
def _gguf_places(file: Path) -> list[tuple[str, list[tuple[int, int, bool]]]]:
    """The fields and tensors of a sound file, each with its (offset, size, whether it is text) in the file."""
    from gguf import GGUFReader

    reader = GGUFReader(file)
    start = reader.data.ctypes.data
    return [(entry.name, [(part.ctypes.data - start, part.nbytes, part.dtype == np.uint8 and part.size > 1)
                          for part in entry.parts if part.size])
            for entry in (*reader.fields.values(), *(tensor.field for tensor in reader.tensors))]


def _damage_json(rng: random.Random, tree: Any) -> tuple[str, str, str]:
    """(the text, the way, what was done)."""
    whole: Any = {"": tree}
    parent, key, value, place = whole, "", tree, ""
    while isinstance(value, dict | list) and value and (not place or rng.random() < 0.8):
        parent, key = value, rng.choice([*value] if isinstance(value, dict) else range(len(value)))
        value, place = parent[key], f"{place}/{key}"
    way = rng.choice(("replaced", "replaced", "near", "near", "retyped", "moved", "exchanged", "removed", "renamed",
                      "twice", "added"))
    raw = rng.choice(NASTY)
    if way == "replaced":
        parent[key] = MARK
    elif way == "near":
        parent[key] = _near(rng, value)
    elif way == "retyped":
        parent[key] = rng.choice((str(value), [value], {"a": value}, len(str(value)), float(len(str(value))),
                                  not value))
    elif way == "moved":
        parent[key] = copy.deepcopy(rng.choice(list(_values(tree))))
    elif way == "exchanged":
        other = rng.choice([*parent] if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], parent[key]
    elif way == "removed":
        del parent[key]
    elif isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), value if way == "twice" else MARK)
    elif way == "renamed":
        parent[rng.choice((f"{key}x", f"{key}"[1:], "", "a\nb\u001b[2J", "\ud800", f"{key}".upper()))] = parent.pop(key)
    else:
        parent[f"{key}{TWIN}" if way == "twice" else rng.choice(("extra", "a\nb", "\ud800"))] = MARK
    text = json.dumps(whole.get(""))
    text = text.replace(json.dumps(MARK), raw).replace(TWIN, "")
    return text, way, f"{place[:80]} {way} ({raw[:30] if MARK in str(whole) else ''})"


def _values(tree: Any) -> Iterator[Any]:
    """All values inside one of JSON."""
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield value
        yield from _values(value)


def _near(rng: random.Random, value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, 2 * value, value // 2, -value))
    if isinstance(value, float):
        return rng.choice((2 * value, value / 3, -value, value + 1))
    if isinstance(value, str):
        return rng.choice((value[1:], value[:-1], value + value, value.upper(), f" {value}", value[::-1]))
    if isinstance(value, list):
        return rng.choice((value[1:], value + value, value[::-1], value[:1]))
    return dict(list(value.items())[1:]) if isinstance(value, dict) else rng.choice((0, "a", False))


def main(argv: list[str] | None = None) -> int:
    """Runs the fuzzer; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--count", type=int, default=1000, help="how many mutations")
    parser.add_argument("--first", type=int, default=0, help="the number of the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20, help="what a mutation may take")
    parser.add_argument("--megabytes", type=float, default=2000, help="what its process may have in memory")
    args, start = parser.parse_args(argv), time.monotonic()
    report = run(**vars(args), told=lambda line: print(line, flush=True))
    ways = {name: dict(counts) for name, counts in sorted(report.ways.items())}
    print(json.dumps({"kind": args.kind, "seed": args.seed, **report.outcomes, "places": len(report.places),
                      "megabytes": round(report.megabytes), "seconds": round(time.monotonic() - start, 1),
                      "slowest": report.slowest, "ways": ways}))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
