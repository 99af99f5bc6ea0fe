"""What the scripts share: model and tree options, the compilation cache, and how a user's mistake ends."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import io
import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import get_args

import jax
from jax.sharding import Mesh

from converters.convert import looks_like_hub_id, resolve_source
from jetspec_jax import PRESETS, JetSpecError, Pair, SamplingParams, TreeConfig, load_pretrained
from jetspec_jax.arguments import integer, number, one_line
from jetspec_jax.config import FLOAT_DTYPES, MAX_TREE_BUDGET, MAX_TREE_WIDTH, TREE_WIDTHS, Builder
from jetspec_jax.files import local_path, locked
from jetspec_jax.generate import CPU_TREE, DEFAULT_TREE, best_tree
from jetspec_jax.pretrained import cache_folder
from jetspec_jax.sharding import connect, make_mesh


def add_target_arguments(parser: argparse.ArgumentParser) -> None:
    """Which target, which dtype."""
    parser.add_argument("--model", default="smollm2-135m", metavar="NAME|PATH",
                        help=f"target: {', '.join(PRESETS)}; a converted or Hugging Face folder; a hub id "
                             "(default %(default)s)")
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, help="default: the stored one, float32 on a CPU")
    parser.add_argument("--no-verify", action="store_true", help="load converted weights without comparing their "
                                                                 "checksums")


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """Which target, which head, which dtype."""
    add_target_arguments(parser)
    parser.add_argument("--head", metavar="NAME|PATH", help="draft head: folder or hub id (default: the preset's)")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which pair, which tree, which sampling."""
    add_pair_arguments(parser)
    parser.add_argument("--tree-builder", choices=get_args(Builder),
                        help=f"default {DEFAULT_TREE.builder}; {CPU_TREE.builder} for large models on a CPU")
    add_tree_width(parser)
    parser.add_argument("--budget", type=integer,
                        help=f"nodes of a tree, the root included, 1 to {MAX_TREE_BUDGET} (default "
                             f"{DEFAULT_TREE.budget}; what pays by timing for large models on a CPU)")
    add_sampling(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=number, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=integer, help="keep the k most likely tokens")
    parser.add_argument("--top-p", type=number, help="keep the most likely tokens up to this probability")


def add_mesh_arguments(parser: argparse.ArgumentParser) -> None:
    """How many devices decode together, of how many processes."""
    mesh = parser.add_argument_group("several devices (see jetspec_jax.sharding)")
    mesh.add_argument("--tensor-parallel", type=integer, metavar="N",
                      help="devices that share every layer (default: one)")
    mesh.add_argument("--coordinator", metavar="HOST:PORT|auto",
                      help="of the first of several processes, each started with the same command; auto asks the "
                           "cluster's environment (Slurm, Open MPI, Kubernetes)")
    mesh.add_argument("--processes", type=integer, metavar="N", help="how many (with --coordinator HOST:PORT)")
    mesh.add_argument("--process-id", type=integer, metavar="I", help="which one this is, from 0; the first one prints")


def mesh_from(args: argparse.Namespace) -> Mesh | None:
    """The mesh that the options name, once all processes have met; None for one device.

    Raises:
        JetSpecError: options that do not fit each other or the devices.
    """
    if args.coordinator is not None:
        connect(None if args.coordinator == "auto" else args.coordinator, args.processes, args.process_id)
        if jax.process_index() > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
        return make_mesh(args.tensor_parallel or jax.device_count())
    if args.processes is not None or args.process_id is not None:
        raise JetSpecError("--processes and --process-id need --coordinator HOST:PORT")
    return None if args.tensor_parallel is None else make_mesh(args.tensor_parallel)


def add_tree_width(parser: argparse.ArgumentParser) -> None:
    defaults = ", ".join(f"{width} for {builder}" for builder, width in TREE_WIDTHS.items())
    parser.add_argument("--tree-width", type=integer, metavar="W",
                        help=f"children per node, 1 to {MAX_TREE_WIDTH} (default {defaults})")


def tree_of(builder: Builder, budget: int, args: argparse.Namespace) -> TreeConfig:
    return TreeConfig(builder, TREE_WIDTHS[builder] if args.tree_width is None else args.tree_width, budget)


def tree_from(args: argparse.Namespace, pair: Pair | None = None) -> TreeConfig:
    """The tree that the options name; what they leave out is what pays best with this pair.

    Raises:
        JetSpecError: an option out of its range, whatever the pair.
    """
    default = DEFAULT_TREE if pair is None else best_tree(pair)
    return tree_of(args.tree_builder or default.builder, default.budget if args.budget is None else args.budget, args)


def sampling_from(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(args.temperature, args.top_k, args.top_p)


def add_compile_cache() -> None:
    """Keeps compiled programs between runs, where pairs do not do so themselves (`jetspec_jax.store`)."""
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def load(args: argparse.Namespace, mesh: Mesh | None = None, tiles: bool | None = None, drafts: bool = True) -> Pair:
    """Loads the pair that the options name, or its target alone, with compiled programs kept between runs."""
    if mesh is not None or jax.default_backend() != "cpu":
        add_compile_cache()
    return load_pretrained(args.model, args.head if drafts else False, dtype=args.dtype, mesh=mesh, tiles=tiles,
                           verify=not args.no_verify)


def require_head(args: argparse.Namespace) -> None:
    """Before the loading of a target that is there: that it has a head, or one is named.

    Raises:
        JetSpecError: it has none.
    """
    local = local_path(args.model) is not None
    preset = None if local else PRESETS.get(args.model)
    known = local or preset is not None or looks_like_hub_id(args.model)
    if known and args.head is None and (preset is None or not preset.head_source):
        raise JetSpecError(f"no draft head is known for {args.model}: name one with --head (experiments/train_head.py "
                           "trains one), or take --draft lookup or none")


def require_present(*sources: str | None) -> None:
    """Before long work: that targets and heads are there (a hub id is fetched); None and a preset's name pass.

    Raises:
        JetSpecError: one of them is not.
    """
    for source in sources:
        if source is not None and source not in PRESETS:
            resolve_source(source)


def require_at_least(args: argparse.Namespace, **least: int) -> None:
    """Raises JetSpecError for an option below its smallest value: `limit=1` is --limit."""
    for name, value in least.items():
        if getattr(args, name) < value:
            raise JetSpecError(f"--{name.replace('_', '-')} must be at least {value}, not {getattr(args, name)}")


def check_output(folder: Path | None) -> None:
    """Before long work: that results can be written into `folder` (None: they are not wanted).

    Raises:
        JetSpecError: something else than a folder is there, or it cannot be made.
    """
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write into it")
    except OSError as error:
        raise JetSpecError(f"{str(folder)[:200]} cannot be a folder for results: {error.strerror}; name "
                           "another") from error


def claim_output(folder: Path | None) -> None:
    """`check_output` for results that grow: until this process ends, no other one may claim the folder.

    Raises:
        JetSpecError: see `check_output`; or another process has claimed it.
    """
    check_output(folder)
    if folder is not None:
        _claim(folder.resolve())


@cache
def _claim(folder: Path) -> None:
    claim = contextlib.ExitStack()
    claim.enter_context(locked(folder / ".lock", f"another process is writing into {folder}: wait for it, or choose "
                                                 "another folder"))
    atexit.register(claim.close)


def run_main(main: Callable[[], None]) -> None:
    """Runs a script: a user's mistake is one line and status 2; what the library notes is one line too."""
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows its number
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except JetSpecError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # no space, no permission, a folder where a file is wanted
        if error.filename is None:
            raise
        print(f"error: {one_line(error.filename)[:200]}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
