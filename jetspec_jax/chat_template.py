"""Chat templates: programs of strangers, which transformers runs in Jinja's sandbox, and which are bounded here."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from jinja2 import Environment, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from jetspec_jax.errors import JetSpecError

MAX_TEMPLATE = 2**20  # characters; the longest that models are published with have some 20,000
MAX_TEXT = 2**24  # characters; more than any context holds
MAX_NUMBER = 10**6
MAX_SECONDS = 10.0
MAX_BYTES = 2**29
INTERVAL = 1e-3  # seconds between two looks at time and memory
WIDTH = re.compile(r"[1-9]\d{8,}")  # of a format, or what the filter int makes a number of


def render(tokenizer: Any, conversation: Sequence[Mapping[str, Any]], switches: Mapping[str, Any]) -> str:
    """What `apply_chat_template` of transformers writes, within bounds.

    Bounded are the size of the template and of its text, the time (by a trace function of this thread, unless a
    debugger has set its own), and where Linux tells it the memory by which the process grows meanwhile. Both are looked
    at between two lines of the template, so numbers with which one line could take all memory are refused before. Not
    bounded is what one line makes of strings that the template has built itself; only a limit of the whole process
    bounds that.

    Raises:
        JetSpecError: a template that goes beyond these bounds.
        Exception: a template is a program, which fails in every way.
    """
    template = tokenizer.get_chat_template(switches.get("chat_template"), switches.get("tools"))
    if len(template) > MAX_TEMPLATE:
        raise JetSpecError(f"the chat template of this target has {len(template)} characters, and no template needs "
                           f"more than {MAX_TEMPLATE}: remove or replace it")
    with _bounded():
        check_numbers(template)
        text = tokenizer.apply_chat_template(conversation, tokenize=False, **switches)
    if len(text) > MAX_TEXT:
        raise JetSpecError(f"the chat template of this target wrote {len(text)} characters, and no model reads more "
                           f"than {MAX_TEXT}: shorten the messages, or replace the template")
    return text


@functools.lru_cache(maxsize=16)
def check_numbers(template: str) -> None:
    """Raises JetSpecError for numbers that could make one line of a template take all memory or time."""
    tree = Environment(trim_blocks=True, lstrip_blocks=True,
                       extensions=["jinja2.ext.loopcontrols", _Generation]).parse(template)
    for node in tree.find_all((nodes.Const, nodes.Mul, nodes.Pow, nodes.Mod, nodes.Filter, nodes.Getattr)):
        if _is_dangerous(node):
            raise JetSpecError(f"line {node.lineno} of the chat template of this target has a power or a number above "
                               f"{MAX_NUMBER}, which could take all memory: remove it, or replace the template")


def _is_dangerous(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Mod | nodes.Filter | nodes.Getattr):
        return any(isinstance(text, nodes.Const) and WIDTH.search(str(text.value)) for text in node.iter_child_nodes())
    if isinstance(node, nodes.Const | nodes.Mul):
        return _largest(node) > MAX_NUMBER
    return True


def _largest(node: nodes.Node) -> float:
    """How large the constants in an expression can make it: a number, or the length of a text."""
    if isinstance(node, nodes.Const):
        value = node.value
        return len(value) if isinstance(value, str) else abs(value) if isinstance(value, int | float) else 1
    parts = [_largest(part) for part in node.iter_child_nodes()]
    return math.prod(max(part, 1) for part in parts) if isinstance(node, nodes.Mul) else sum(parts)


class _Generation(Extension):
    """The block with which templates mark what a model has written."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _StoppedError(BaseException):
    """No Exception, which a template's filters might catch."""


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Stops what runs within after `MAX_SECONDS`, or once the process has grown by `MAX_BYTES`."""
    if sys.gettrace() is not None:
        yield
        return
    looked = time.monotonic()
    end, most = looked + MAX_SECONDS, _resident_bytes() + MAX_BYTES

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal looked
        now, template = time.monotonic(), frame.f_code.co_filename == "<template>"
        # Not at every event, since much memory takes long to fill; and not anywhere: what a callback of the garbage
        # collector raises is lost. (Jinja's lipsum loops over random calls.)
        if now > looked + INTERVAL and (
                template or frame.f_globals.get("__name__", "").startswith(("jinja2.", "random"))):
            looked = now
            if now > end:
                raise _StoppedError(f"takes more than {MAX_SECONDS:g} seconds")
            if _resident_bytes() > most:
                raise _StoppedError(f"takes more than {MAX_BYTES / 1e6:.0f} MB")
        return trace if template else None  # Jinja's own loops call something

    sys.settrace(trace)
    try:
        yield
    except _StoppedError as error:
        raise JetSpecError(f"the chat template of this target {error} and was stopped: shorten the messages, or "
                           "replace the template") from error
    finally:
        sys.settrace(None)


def _resident_bytes() -> int:
    """Of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
