"""Step `pair`: the real small pair. Are the tokens of trees those of plain decoding, and how many come a second?

In float32 all must be the same; in bfloat16 rounding decides near-ties, and the first difference is told.
"""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.h100_steps.bench import Bench, say
from jetspec_jax import JetSpecError, Pair, PromptLookup, TreeConfig, load_pretrained
from jetspec_jax.draft import Params
from jetspec_jax.generate import Draft, Generation, generate
from jetspec_jax.programs import Programs

MODEL = "smollm2-135m"
# One length of programs for all of them.
PROMPTS = {"train": "A train travels 60 miles in 1.5 hours. What is its average speed? Think step by step.",
           "rivers": "Write a short story about two rivers that meet in a wide valley and do not agree on their way.",
           "code": "Write a Python function that returns the n-th Fibonacci number, and explain how it works."}
METHODS: dict[str, Draft | None] = {"plain": None, "tree 16": TreeConfig(budget=16), "tree 64": TreeConfig(budget=64),
                                    "best-first 64": TreeConfig("best_first", 16, 64), "lookup": PromptLookup()}
WARM = 3  # answers before the timed ones: graphs are recorded in the second


def run(bench: Bench) -> None:
    """Writes pair.json: a row per dtype, prompt and method."""
    rows: list[dict[str, Any]] = []
    wrong = []
    for dtype in ("float32", "bfloat16"):
        pair, prompts = tiny_pair(bench, dtype) if bench.tiny else real_pair(bench, dtype)
        say(f"loaded, {dtype}")
        tokens, repeats = (24, 1) if bench.tiny else (256, 3)
        with ThreadPoolExecutor(len(METHODS)) as pool:  # compiles side by side
            list(pool.map(partial(answer, pair, prompts["train"], 8), METHODS.values()))
        for key, prompt in prompts.items():
            plain: Generation | None = None
            for name, tree in METHODS.items():
                for _ in range(WARM if key == "train" and not bench.tiny else 0):
                    answer(pair, prompt, tokens, tree)
                found = [answer(pair, prompt, tokens, tree) for _ in range(repeats)]
                plain = plain or found[0]
                rows.append({"dtype": dtype, "prompt": key, "method": name} | row_of(found, plain))
                bench.save("pair", rows)
                print("  ", *(f"{k}={v}" for k, v in rows[-1].items() if k != "text"), flush=True)
                if dtype == "float32" and not rows[-1]["identical"]:
                    wrong.append(f"{name} on {key} from token {rows[-1]['same']} on")
    if wrong:
        raise AssertionError(f"float32 tokens differ from plain decoding's: {'; '.join(wrong)}")


def answer(pair: Pair, prompt: Any, tokens: int, tree: Draft | None) -> Generation:
    found: Generation = generate(pair, prompt, max_new_tokens=tokens, tree=tree, eos_token_ids=())
    return found


def row_of(answers: list[Generation], plain: Generation) -> dict[str, Any]:
    last = answers[-1]
    seconds = statistics.median(a.seconds - a.prompt_seconds for a in answers)
    same = next((i for i, (a, b) in enumerate(zip(last.token_ids, plain.token_ids, strict=True)) if a != b),
                len(last.token_ids))
    return {"identical": all(a.token_ids == plain.token_ids for a in answers), "same": same,
            "tokens": len(last.token_ids), "rounds": last.rounds, "accepted": float(np.mean(last.accept_lengths)),
            "tokens_per_second": (len(last.token_ids) - 1) / seconds,
            "prompt_ms": statistics.median(a.prompt_seconds for a in answers) * 1e3, "text": (last.text or "")[:200]}


def real_pair(bench: Bench, dtype: str) -> tuple[Pair, dict[str, Any]]:
    """The default pair, its target from `--weights` where that is given."""
    target: str | Path = MODEL
    if bench.weights is not None:
        inside = sorted(bench.weights.glob("*.gguf")) if bench.weights.is_dir() else []
        target = inside[0] if inside else bench.weights
    pair = load_pretrained(target, MODEL, dtype=dtype)
    if pair.tokenizer is None:
        raise JetSpecError(f"{target} holds no tokenizer: --weights must be the target of {MODEL}")
    return with_options(pair, bench), {key: pair.chat(text) for key, text in PROMPTS.items()}


def tiny_pair(bench: Bench, dtype: str) -> tuple[Pair, dict[str, Any]]:
    setup = bench.setup
    params: Params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), bench.params)
    pair = Pair(setup.target.with_dtype(dtype), setup.head.with_dtype(dtype), params)
    return with_options(pair, bench), {key: [i + 3 for i in range(8)] for key in ("train", "code")}


def with_options(pair: Pair, bench: Bench) -> Pair:
    return replace(pair, programs=Programs(bench.loop_options))
