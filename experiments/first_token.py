"""Seconds from the start of a process to its first token: ours (decode.py) and peers, each a program of its own.

`peers.py --start` asks `start_seconds`. This file is the peers' program too, which loads nothing of ours:

    python experiments/first_token.py transformers FOLDER "Name three rivers."
    python experiments/first_token.py llama.cpp FILE.gguf "1 15 28"  # token ids: a file may have no tokenizer
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jetspec_jax import Pair

STARTS = 3  # after one that warms the caches up


def start_seconds(args: argparse.Namespace, pair: Pair, message: str, names: list[str]) -> dict[str, float]:
    """Medians over starts in turn, by the name of the program.

    Args:
        args: which pair, as `add_pair_arguments` reads it.
        pair: the same, loaded, whose weights the peers get as files.
        message: a user's message of one line.
        names: who of `peers.PEERS` takes part; ours does anyway.

    Raises:
        JetSpecError: a program ended without a token.
    """
    from experiments.llama_peer import packed_default, write_gguf
    from experiments.torch_peer import save_huggingface

    ours = [str(Path(__file__).with_name("decode.py")), "--model", args.model, f"--prompt={message}",
            "--max-new-tokens", "32"]
    for option in ("head", "dtype"):
        if (value := getattr(args, option)) is not None:
            ours += [f"--{option}", value]
    ours += ["--no-verify"] if args.no_verify else []
    ids = " ".join(map(str, pair.encode(pair.chat(message))))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder)
        programs = {"default": (ours, f"> {message}\n\n")}
        if "transformers" in names:
            save_huggingface(pair, target)
            programs["transformers"] = ([__file__, "transformers", folder, message], "")
        if "llama.cpp" in names:
            write_gguf(pair, target / "target.gguf")
            programs["llama.cpp"] = ([__file__, "llama.cpp", str(target / "target.gguf"), ids], "")
        if "llama.cpp-4bit" in names:
            programs["llama.cpp-4bit"] = ([__file__, "llama.cpp", str(packed_default(pair)), ids], "")
        rounds = [{name: _first_output(*program) for name, program in programs.items()} for _ in range(STARTS + 1)]
    return {name: statistics.median(found[name] for found in rounds[1:]) for name in programs}


def _first_output(arguments: list[str], before: str) -> float:
    """Seconds until a Python program has written something to standard output after `before`."""
    from jetspec_jax import JetSpecError

    start, size = time.perf_counter(), len(before.encode()) + 1
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        found = len(process.stdout.read(size))
        seconds = time.perf_counter() - start
        process.stdout.read()  # it may be writing into a cache
    if found < size:
        raise JetSpecError(f"{Path(arguments[0]).name} ended without a token: run it to see why: "
                           f"{' '.join(arguments)[:300]}")
    return seconds


def _transformers(folder: str, message: str) -> str:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt: Any = tokenizer.apply_chat_template([{"role": "user", "content": message}], add_generation_prompt=True,
                                                return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    return str(tokenizer.decode(answer[0, -1:]))


def _llama(file: str, ids: str) -> str:
    from llama_cpp import Llama

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    model = Llama(file, n_ctx=512, n_threads=cores, n_threads_batch=cores, verbose=False)
    return str(next(iter(model.generate([int(i) for i in ids.split()], temp=0.0))))


if __name__ == "__main__":
    print({"transformers": _transformers, "llama.cpp": _llama}[sys.argv[1]](*sys.argv[2:]), flush=True)
