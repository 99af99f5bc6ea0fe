"""`jetspec-convert`: Hugging Face weights and released heads into checkpoints, and heads back."""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from typing import Any

from converters.convert import convert_head, convert_target, export_head, resolve_source
from jetspec_jax.arguments import Parser, one_line, user_path
from jetspec_jax.errors import JetSpecError


def build_parser() -> argparse.ArgumentParser:
    """The options of jetspec-convert."""
    parser = Parser(prog="jetspec-convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("target", "a target: Hugging Face folder, hub id, or GGUF file"),
                       ("head", "a released JetSpec or DFlash head: folder or hub id")):
        command = commands.add_parser(name, help=f"convert {what}")
        command.add_argument("src", metavar="SRC", help=what)
        command.add_argument("out", metavar="OUT", type=user_path, help="folder to create")
        command.add_argument("--dtype", choices=("bfloat16", "float32"),
                             help="dtype of the result (default: the source's; float32 for GGUF)")
    command = commands.add_parser("export-head", help="write a head checkpoint in the released format")
    command.add_argument("src", metavar="CKPT", type=user_path, help="converted or trained head")
    command.add_argument("out", metavar="OUT", type=user_path, help="folder to create")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs jetspec-convert; returns its exit status, 2 for a user's mistake."""
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character shows its number
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = build_parser().parse_args(argv)
        with warnings.catch_warnings():
            warnings.filterwarnings("always", category=UserWarning)
            warnings.showwarning = _print_note  # type: ignore[assignment]
            if args.command == "export-head":
                export_head(args.src, args.out)
            else:
                convert = convert_target if args.command == "target" else convert_head
                convert(resolve_source(args.src), args.out, args.dtype, label=args.src)
    except JetSpecError as error:
        print(f"jetspec-convert: error: {one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"jetspec-convert: error: {one_line(error.filename)[:200]}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jetspec-convert: interrupted; nothing was left behind", file=sys.stderr)
        return 130
    print(f"wrote {args.out}")
    return 0


def _print_note(message: Warning | str, *_: Any) -> None:
    """In the place of `warnings.showwarning`: one line, without the place in the code."""
    print(f"jetspec-convert: note: {message}", file=sys.stderr)
