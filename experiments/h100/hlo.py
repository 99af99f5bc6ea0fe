"""Reads the text of an optimised HLO module: its instructions, and where a value comes from."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

ITEMSIZE = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2,
            "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}


@dataclass(frozen=True)
class Shape:
    """One array."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return math.ceil(self.size * ITEMSIZE.get(self.dtype, 0))  # tokens and opaque values have no bytes

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    """One line of HLO.

    Attributes:
        shapes: of its result; several for a tuple (nested tuples laid flat).
        operands: names of instructions of the same computation.
        rest: the attributes, as text.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.rest)
        return found.group(1) if found else None

    @property
    def scope(self) -> str:
        """The path of named scopes and modules that it was traced under."""
        return self.attribute(r'op_name="([^"]*)"') or ""

    @property
    def target(self) -> str:
        """Of a custom call."""
        return self.attribute(r'custom_call_target="([^"]*)"') or ""

    @property
    def index(self) -> int:
        """Of a parameter or of a get-tuple-element."""
        return int(self.attribute(r"^(\d+)\)" if self.opcode == "parameter" else r"index=(\d+)") or 0)

    @property
    def trips(self) -> int | None:
        """How often a loop runs, where XLA knows."""
        known = self.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        return int(known) if known else None


class Computation:
    """The instructions of one computation by name, in the order of their schedule."""

    def __init__(self, name: str, instructions: list[Instruction]) -> None:
        self.name = name
        self.instructions = {i.name: i for i in instructions}

    def __getitem__(self, name: str) -> Instruction:
        return self.instructions[name]

    @cached_property
    def root(self) -> Instruction:
        return next(i for i in self.instructions.values() if i.is_root)

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {i.index: i for i in self.instructions.values() if i.opcode == "parameter"}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for operand in set(instruction.operands):
                users[operand].append(instruction)
        return users


class Module:
    """A parsed module.

    Attributes:
        computations: by name.
        entry: the one that is called.
        devices: how many run it together; its shapes are those of one of them.
    """

    def __init__(self, text: str) -> None:
        partitions = re.match(r"HloModule [^\n]*num_partitions=(\d+)", text)
        self.devices = int(partitions.group(1)) if partitions else 1
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        name = ""
        lines: list[Instruction] = []
        for line in text.splitlines():
            head = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line)
            if head:
                name, lines = head.group(2), []
                self.entry = name if head.group(1) else self.entry
            elif line.startswith("}"):
                self.computations[name] = Computation(name, lines)
            elif " = " in line and line.startswith("  "):
                lines.append(parse_instruction(line))

    @cached_property
    def home(self) -> dict[str, Computation]:
        """The computation of every instruction that can be launched (instruction names are unique in a module)."""
        return {name: c for c in self.computations.values() for name in c.instructions}

    @cached_property
    def _loop_of(self) -> dict[str, Instruction]:
        """The while instruction of each loop body and condition."""
        loops = {}
        for computation in self.computations.values():
            for i in computation.instructions.values():
                if i.opcode == "while":
                    for part in ("body", "condition"):
                        loops[i.attribute(rf"{part}=%([\w.\-]+)") or ""] = i
        return loops

    def origin(self, computation: Computation, name: str) -> str:
        """The scope of the module's parameter that a value is (through views, and through loops that carry it in
        place), or ""."""
        path: list[int] = []  # tuple indices still to be taken
        while True:
            i = computation[name]
            if i.opcode == "get-tuple-element":
                path.append(i.index)
                name = i.operands[0]
            elif i.opcode == "bitcast":
                name = i.operands[0]
            elif i.opcode in ("tuple", "while") and path:
                name = i.operands[path.pop()] if i.opcode == "tuple" else i.operands[0]
            elif i.opcode == "parameter" and computation.name in self._loop_of:
                loop = self._loop_of[computation.name]
                computation, name = self.home[loop.name], loop.operands[0]
            else:
                return i.scope if i.opcode == "parameter" and computation.name == self.entry else ""


def parse_instruction(line: str) -> Instruction:
    """One line, e.g. `  ROOT %a.1 = f32[2,3]{1,0} add(%b, %c), metadata={...}`."""
    left, right = line.strip().split(" = ", 1)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    opcode, operands_at = right[end:].lstrip().split("(", 1)[0], right.index("(", end)
    close = _closing(right, operands_at)
    inside = right[operands_at + 1:close]
    # A parameter's number and a constant's value stand where others have operands.
    leaf = opcode in ("parameter", "constant")
    return Instruction(
        name=left.removeprefix("ROOT ").lstrip("%"), opcode=opcode, shapes=parse_shapes(right[:end]),
        operands=() if leaf else tuple(re.findall(r"%([\w.\-]+)", inside)),
        rest=right[operands_at + 1:] if leaf else right[close + 1:], is_root=left.startswith("ROOT "))


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """Every array of a type, e.g. `(bf16[2,3]{1,0}, s32[])`."""
    return tuple(Shape(dtype, tuple(int(d) for d in dims.split(",") if d))
                 for dtype, dims in re.findall(r"\b(\w+)\[([\d,]*)\]", text))


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return start + found.start()
    raise ValueError(f"no closing parenthesis: {text[start:start + 80]}")
