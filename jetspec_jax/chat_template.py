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
from typing import Any, NamedTuple

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
NUMBER = re.compile(r"\s*\d+(?:\.\d*)?(?:e\d+)?\s*")  # a text of which the filters int and float make a large number
# Of filters and methods: what pads or repeats by its arguments, and what is a number.
REPEATING = ("batch", "center", "expandtabs", "indent", "ljust", "rjust", "round", "to_bytes", "tojson", "zfill")
NUMERIC = ("abs", "count", "float", "int", "length", "round")
FORMATTING = ("format", "format_map")
# Widths above `MAX_NUMBER`, or (the group) such as are taken from the arguments.
PERCENT_WIDTH = re.compile(r"%(?:\([^)%]*\))?[-#0 +.\d]*(?:[1-9]\d{6}|(\*))")
BRACE_WIDTH = re.compile(r"\{[^{}:]*:[^{}]*(?:[1-9]\d{6}|(\{))")


def render(tokenizer: Any, conversation: Sequence[Mapping[str, Any]], switches: Mapping[str, Any]) -> str:
    """What `apply_chat_template` of transformers writes, within bounds.

    Bounded are the size of the template and of its text, the time (by a trace function of this thread, unless a
    debugger has set its own), and where Linux tells it the memory by which the process grows meanwhile. Time and memory
    are looked at between two lines of the template, so what one line takes is over by then. A line that repeats, pads
    or raises to a power by a number that is written in the template and above a million is refused before. What a line
    makes of numbers and texts that the template has computed before is not bounded; only a limit of the whole process
    bounds that.

    Raises:
        JetSpecError: a template that goes beyond these bounds.
        Exception: a template is a program, which fails in every way.
    """
    name = title(tokenizer, switches)
    template = tokenizer.get_chat_template(switches.get("chat_template"), switches.get("tools"))
    if len(template) > MAX_TEMPLATE:
        raise JetSpecError(f"{name} has {len(template)} characters, and no template needs more than {MAX_TEMPLATE}: "
                           "remove or replace it")
    with _bounded(name):
        line = dangerous_line(template)
        if line is not None:
            raise JetSpecError(f"line {line} of {name} has a power, or repeats or pads by a number above {MAX_NUMBER}, "
                               "which could take all memory: remove it, or replace the template")
        text = tokenizer.apply_chat_template(conversation, tokenize=False, **switches)
    if len(text) > MAX_TEXT:
        raise JetSpecError(f"{name} wrote {len(text)} characters, and no model reads more than {MAX_TEXT}: shorten the "
                           "messages, or replace the template")
    return text


def title(tokenizer: Any, switches: Mapping[str, Any]) -> str:
    """What an error calls the template: a user may have passed one of their own."""
    chosen, own = switches.get("chat_template"), tokenizer.chat_template
    named = chosen is None or (isinstance(own, dict) and chosen in own)
    return "the chat template of this target" if named else "the chat template that was passed"


@functools.lru_cache(maxsize=16)
def dangerous_line(template: str) -> int | None:
    """The first line of a template whose numbers could make it take all memory or time."""
    tree = Environment(trim_blocks=True, lstrip_blocks=True,
                       extensions=["jinja2.ext.loopcontrols", _Generation]).parse(template)
    variables: dict[str, _Measure] = {}
    for node in tree.find_all((nodes.Assign, nodes.Mul, nodes.Pow, nodes.Mod, nodes.Filter, nodes.Call)):
        if isinstance(node, nodes.Assign):
            _assign(_variable(node.target), node.node, variables)
        elif _is_dangerous(node, variables):
            return node.lineno
    return None


class _Measure(NamedTuple):
    """What is known of an expression before it runs."""

    size: float = 1  # how large its constants can make it: a number, or the length of a text
    number: bool = False  # it is a number for sure, of which no product repeats anything


def _assign(name: str | None, value: nodes.Node, variables: dict[str, _Measure]) -> None:
    """Takes down what a variable, or an attribute of a namespace, can become."""
    if name is not None:
        old, new = variables.get(name, _Measure(number=True)), _measure(value, variables)
        variables[name] = _Measure(max(old.size, new.size), old.number and new.number)
        for argument in value.kwargs if isinstance(value, nodes.Call) else ():
            _assign(f"{name}.{argument.key}", argument.value, variables)


def _variable(node: nodes.Node) -> str | None:
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.NSRef):
        return f"{node.name}.{node.attr}"
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        return f"{node.node.name}.{node.attr}"
    return None


def _is_dangerous(node: nodes.Node, variables: Mapping[str, _Measure]) -> bool:
    if isinstance(node, nodes.Mul):
        size, number = _measure(node, variables)
        return size > MAX_NUMBER and not number
    if isinstance(node, nodes.Pow):
        parts = [part.value for part in (node.left, node.right) if isinstance(part, nodes.Const)]
        return not (len(parts) == 2 and all(isinstance(part, int | float) and part <= MAX_NUMBER for part in parts)
                    and float(parts[0]) ** min(parts[1], 20) <= MAX_NUMBER)
    if isinstance(node, nodes.Mod):
        return _is_padded(PERCENT_WIDTH, node.left, [node.right], variables)
    assert isinstance(node, nodes.Filter | nodes.Call)
    name = node.name if isinstance(node, nodes.Filter) else getattr(node.node, "attr", None)
    arguments = [*node.args, *(argument.value for argument in node.kwargs)]
    if name in FORMATTING:
        pattern = PERCENT_WIDTH if isinstance(node, nodes.Filter) else BRACE_WIDTH
        return _is_padded(pattern, node.node, arguments, variables)
    return name in REPEATING and any(_measure(argument, variables).size > MAX_NUMBER for argument in arguments)


def _is_padded(pattern: re.Pattern[str], text: nodes.Node | None, arguments: Sequence[nodes.Node],
               variables: Mapping[str, _Measure]) -> bool:
    """Whether a text in which values are put gives one of them a width above `MAX_NUMBER`."""
    large = any(_measure(argument, variables).size > MAX_NUMBER for argument in arguments)
    parts = [] if text is None else [text, *text.find_all(nodes.Const)]
    texts = [part.value for part in parts if isinstance(part, nodes.Const) and isinstance(part.value, str)]
    return any(large or found[1] is None for text in texts for found in pattern.finditer(text))


def _measure(node: nodes.Node, variables: Mapping[str, _Measure]) -> _Measure:
    if isinstance(node, nodes.Const):
        value = node.value
        if isinstance(value, str):
            return _Measure(max(len(value), float(value) if NUMBER.fullmatch(value) else 0))
        return _Measure(min(abs(value), MAX_NUMBER + 1), True) if isinstance(value, int | float) else _Measure()
    if isinstance(node, nodes.Name | nodes.Getattr):
        return variables.get(_variable(node) or "", _Measure())
    if isinstance(node, nodes.Getitem | nodes.Call):
        return _Measure()
    parts = [_measure(part, variables) for part in node.iter_child_nodes()]
    sizes = [max(part.size, 1) for part in parts]
    size = math.prod(sizes) if isinstance(node, nodes.Mul) else sum(sizes)
    if isinstance(node, nodes.Add | nodes.Mul):
        number = all(part.number for part in parts)
    else:
        number = isinstance(node, nodes.Sub | nodes.Div | nodes.FloorDiv | nodes.Neg | nodes.Pos) or (
            isinstance(node, nodes.Filter) and node.name in NUMERIC)
    return _Measure(min(size, MAX_NUMBER + 1), number)


class _Generation(Extension):
    """The block with which templates mark what a model has written."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _StoppedError(BaseException):
    """No Exception, which a template's filters might catch."""


@contextlib.contextmanager
def _bounded(name: str) -> Iterator[None]:
    """Stops what runs within once `MAX_SECONDS` are over or the process has grown by `MAX_BYTES`.

    It does so between two lines of a template: one that runs longer is stopped only after it.
    """
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
        raise JetSpecError(f"{name} {error} and was stopped: shorten the messages, or replace the "
                           "template") from error
    finally:
        sys.settrace(None)


def _resident_bytes() -> int:
    """Of this process; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
