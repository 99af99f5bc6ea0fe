"""Measures on a real H100: are the kernels right, what do rounds and kernels take, and what decides the next steps.

    make gpu                                                     # experiments/h100_bench.py --out runs/h100 --all
    python experiments/h100_bench.py --out runs/h100 --steps rounds kernels
    python experiments/h100_bench.py --out runs/check --all --tiny     # every step on any machine, kernels interpreted

Nine minutes suffice. Every step writes its JSON into --out at once; a step that fails keeps its whole message and the
next goes on; what is cut off has left what was done, and a further run of other --steps adds to it. The project need
not be installed: JAX, Flax, transformers and the wheels of platformdirs and gguf are enough. results.md puts the
measurements beside what the plan predicts (docs/h100.md). Weights of Qwen3-8B are random and made on the device.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs without being installed

from experiments.common import claim_output, run_main
from experiments.h100_steps.ledger import ALONE, LIMITS, LOOPS, Ledger
from experiments.h100_steps.report import as_markdown
from jetspec_jax import JetSpecError
from jetspec_jax.arguments import Parser, number, user_path
from jetspec_jax.files import write_text

ROOT = Path(__file__).resolve().parents[1]
DAY = 1440


def main() -> None:
    args = build_parser().parse_args()
    steps = [name for name in LIMITS if args.all or name in args.steps]
    if args.minutes is None:
        args.minutes = 60 if args.tiny else 9
    if not 0 < args.minutes <= DAY:
        raise JetSpecError(f"--minutes must be above 0 and at most {DAY}, not {args.minutes}")
    check_weights(args.weights)
    if not args.tiny:
        require_gpu()
    claim_output(args.out)
    with (args.out / "log.txt").open("a") as log:
        run_steps(steps, args, log)
    text = as_markdown(args.out)
    write_text(args.out / "results.md", text)
    print(text)
    bad = [name for name in steps if Ledger(args.out).rows.get(name, {}).get("state") != "done"]
    if bad:
        raise JetSpecError(f"not done: {', '.join(bad)}; see {args.out / 'steps.json'} and log.txt beside it")


def run_steps(steps: list[str], args: argparse.Namespace, log: IO[str]) -> None:
    """Runs the steps in few processes; one that ended badly is left out, or tried once more with the host's loop."""
    deadline = time.monotonic() + 60 * args.minutes
    waiting, host_loop = list(steps), args.host_loop
    for name in steps:  # what an earlier run found is not this one's
        Ledger(args.out).write(name, state="not reached")
        (args.out / f"{name}.json").unlink(missing_ok=True)
    while waiting and time.monotonic() < deadline:
        size = 1 if waiting[0] in ALONE else next((i for i, name in enumerate(waiting) if name in ALONE), len(waiting))
        log_start = log.tell()
        run_process(waiting[:size], args, host_loop, deadline, log)
        ledger = Ledger(args.out)
        while waiting and ledger.rows[waiting[0]]["state"] == "done":
            waiting.pop(0)
            size -= 1
        if not size or not waiting:
            continue
        name, row = waiting[0], ledger.rows[waiting[0]]
        if row["state"] in ("running", "not reached"):  # the process is gone
            tail = (args.out / "log.txt").read_bytes()[log_start:].decode(errors="replace")[-6000:]
            cut = "Timeout (" in tail or time.monotonic() >= deadline
            ledger.write(name, **row | {"state": "died", "error": "cut off" if cut else "crash", "message": tail})
        if name in LOOPS and not host_loop and ledger.rows[name]["error"] in ("crash", "JaxRuntimeError"):
            print(f"{name} failed: once more with the host's loop instead of a graph that loops", flush=True)
            host_loop = True
        else:
            host_loop = args.host_loop
            waiting.pop(0)


def run_process(steps: list[str], args: argparse.Namespace, host_loop: bool, deadline: float, log: IO[str]) -> None:
    """One process for some steps; what it prints goes to the terminal and into the log."""
    command = [sys.executable, "-m", "experiments.h100_steps", *steps, "--out", str(args.out.resolve())]
    command += ["--tiny"] if args.tiny else []
    command += ["--host-loop"] if host_loop else []
    command += ["--weights", str(args.weights.resolve())] if args.weights else []
    folders = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Nearly all memory is JAX's: weights, caches and the operands of every launch.
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9", "PYTHONUNBUFFERED": "1", **os.environ,
                   "PYTHONPATH": os.pathsep.join(folders)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace") as process:
        end = threading.Timer(max(1.0, deadline - time.monotonic()), process.kill)
        end.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                log.flush()
                print(line, end="", flush=True)
        finally:  # also where the user has had enough
            end.cancel()
            process.kill()


def check_weights(weights: Path | None) -> None:
    """Raises JetSpecError for --weights that cannot be the small target; tensors are checked where they are read."""
    if weights is None:
        return
    if not weights.exists():
        raise JetSpecError(f"--weights {weights} does not exist: name the folder or GGUF file of the small target")
    if weights.is_dir() and not any((weights / name).exists() for name in ("jetspec.json", "config.json")):
        files = sorted(weights.glob("*.gguf"))
        if len(files) != 1:
            raise JetSpecError(f"--weights {weights} holds {len(files)} GGUF files and no model's config: name a "
                               "file, or a folder with one")
    if weights.is_file():
        with weights.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise JetSpecError(f"--weights {weights} is no GGUF file")


def require_gpu() -> None:
    """Raises JetSpecError where JAX sees no GPU; asked in a process of its own, which gives the card back."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
    if done.stdout.strip() != "gpu":
        raise JetSpecError("no NVIDIA GPU is visible to JAX (pip install -e '.[gpu]'); --tiny checks the script "
                           "without one")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=user_path, required=True, metavar="FOLDER",
                        help="JSON per step, log.txt, results.md")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every step, in order")
    which.add_argument("--steps", nargs="+", choices=LIMITS, default=[], metavar="STEP", help=", ".join(LIMITS))
    parser.add_argument("--weights", type=user_path, metavar="FOLDER",
                        help="target of the step `pair`, where it cannot be fetched: its converted folder, or one with "
                             "the GGUF file")
    parser.add_argument("--minutes", type=number, help="after which all ends (default 9; 60 with --tiny)")
    parser.add_argument("--host-loop", action="store_true", help="the loop of rounds outside the CUDA graph")
    parser.add_argument("--tiny", action="store_true", help="a tiny model with interpreted kernels, on any machine")
    return parser


if __name__ == "__main__":
    run_main(main)
