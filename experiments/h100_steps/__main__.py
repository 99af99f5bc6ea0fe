"""Runs steps in this process, until one fails: what comes after a failed step deserves a fresh process.

    python -m experiments.h100_steps --out runs/h100 machine correct rounds

`experiments/h100_bench.py` starts it; `steps.json` in --out tells how each step ended.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import sys
import time
import traceback
from pathlib import Path

import jax

from experiments.h100_steps.bench import Bench
from experiments.h100_steps.ledger import LIMITS, Ledger

MESSAGE = 6000  # characters that are kept of a failure; the log has all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="+", choices=LIMITS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--host-loop", action="store_true")
    args = parser.parse_args()
    faulthandler.enable()  # a crash says where
    bench, ledger = Bench(args.out, args.tiny, args.host_loop, args.weights), Ledger(args.out)
    for name in args.steps:
        print(f"== {name}", flush=True)
        begin = time.perf_counter()
        ledger.write(name, state="running", host_loop=args.host_loop)
        # A step that hangs ends the process; a CPU may be slow.
        faulthandler.dump_traceback_later(LIMITS[name] * (10 if args.tiny else 1), exit=True)
        try:
            importlib.import_module(f"experiments.h100_steps.{name}").run(bench)
        except Exception as error:
            traceback.print_exc()
            ledger.write(name, state="failed", host_loop=args.host_loop, seconds=time.perf_counter() - begin,
                         error=type(error).__name__, message=traceback.format_exc()[-MESSAGE:])
            sys.exit(1)
        finally:
            faulthandler.cancel_dump_traceback_later()
        ledger.write(name, state="done", host_loop=args.host_loop, seconds=time.perf_counter() - begin)
        gc.collect()
        jax.clear_caches()


if __name__ == "__main__":
    main()
