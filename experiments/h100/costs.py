"""What one launch moves and computes, from the shapes it was compiled for.

Every operand counts as read and every result as written, once, with four exceptions: what is only sliced or gathered
from counts as far as it is taken; what is written in place counts as far as it is written; an attention kernel, which
gets the whole cache of all layers, reads the committed slots of one layer; and a product of experts, which gets all of
them, reads those that some token chose (`used_experts`). Blocks that share keys run at the same time and find them in
the L2 cache (50 MB), so keys count once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from experiments.h100.hlo import Computation, Instruction, Module, Shape

VIEWS = ("bitcast", "reshape")
# What each of n devices sends in a ring, as a share of the bytes that it puts in.
SENT: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n, "all-gather": lambda n: n - 1, "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n, "collective-permute": lambda n: 1}


@dataclass(frozen=True)
class Source:
    """An argument of the program that a launch reads: its name, its whole shape, and the bytes that are read."""

    name: str
    shape: Shape
    read: int

    @property
    def is_weight(self) -> bool:
        return re.search(r"\bparams\b", self.name) is not None and len(self.shape.dims) > 1

    @property
    def whole(self) -> bool:
        return self.read == self.shape.bytes


@dataclass(frozen=True)
class Cost:
    """Of one launch.

    Attributes:
        read, written: bytes.
        flops: operations on tensor cores (two per multiply-add); others are hidden behind the bytes.
        sources: arguments of the program that it reads.
        sent: bytes that a collective makes each device send to others.
    """

    read: int
    written: int
    flops: int = 0
    sources: tuple[Source, ...] = ()
    sent: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written


def cost_of(module: Module, instruction: Instruction, committed: int) -> Cost:
    """The cost of a launched instruction of `module`.

    Args:
        committed: cache slots that attention reads.
    """
    home = module.home[instruction.name]
    operands = [home[name].shapes[0] for name in instruction.operands]
    read, written, flops = [shape.bytes for shape in operands], sum(s.bytes for s in instruction.shapes), 0
    sent = sent_bytes(instruction, sum(read), module.devices)
    if instruction.opcode == "fusion":
        body = module.computations[instruction.attribute(r"calls=%([\w.\-]+)") or ""]
        shares = taken(body)
        read = [math.ceil(shape.bytes * shares[body.parameters[i].name]) for i, shape in enumerate(operands)]
        written = sum(written_bytes(body, name) for name in results(body))
    elif "matmul" in instruction.target:
        written, flops = instruction.shapes[0].bytes, matmul_flops(instruction, operands)
    elif kernel := re.search(r"(\w+)/pallas_call$", instruction.scope):
        read, flops = kernel_cost(kernel.group(1), operands, committed, module.devices)
    elif "output_to_operand_aliasing" in instruction.rest:
        in_place = [int(i) for i in re.findall(r"\((\d+), \{", instruction.rest)]
        written -= sum(operands[i].bytes for i in in_place)
        read = [0 if i in in_place else size for i, size in enumerate(read)]
        written = max(written, sum(read))
    elif instruction.opcode == "dynamic-update-slice":
        read[0], written = 0, operands[1].bytes
    sources = tuple(Source(origin, shape, size)
                    for name, shape, size in zip(instruction.operands, operands, read, strict=True)
                    if size and (origin := module.origin(home, name)))
    return Cost(sum(read), written, flops, sources, sent)


def collective_of(instruction: Instruction) -> str | None:
    """Its kind, if it exchanges data between devices."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in SENT else None


def sent_bytes(instruction: Instruction, operands: int, devices: int) -> int:
    """What each device sends in a collective whose operands have so many bytes on each."""
    kind = collective_of(instruction)
    return round(SENT[kind](devices) * operands) if kind else 0


def used_experts(experts: int, choices: int, tokens: int) -> float:
    """Different experts that some token chooses, on average, where all are equally likely: E (1 - (1 - A/E)^N)."""
    return experts * (1 - (1 - choices / experts) ** tokens)


def matmul_flops(instruction: Instruction, operands: list[Shape]) -> int:
    """Two operations per multiply-add."""
    axes = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
    contracted = math.prod(operands[0].dims[int(i)] for i in re.findall(r"\d+", axes.group(1))) if axes else 0
    return 2 * instruction.shapes[0].size * contracted


def kernel_cost(name: str, operands: list[Shape], committed: int, devices: int = 1) -> tuple[list[int], int]:
    """Bytes read of each operand of a kernel of ours, and its operations on tensor cores.

    Args:
        name: of the Pallas call.
        operands: as the kernel takes them.
        devices: that share a layer; each holds some whole experts.
    """
    read = [shape.bytes for shape in operands]
    if name == "gated_product":  # rows [N, D], weights [D, 2F]
        return read, 2 * operands[0].size * operands[1].dims[1]
    if name in ("grouped_gate_up", "grouped_down"):  # choices [N, A], rows, this device's experts [E, Y, Z]
        (tokens, choices), (held, inner, width) = operands[0].dims, operands[2].dims
        read[2] = round(read[2] * used_experts(held * devices, choices, tokens) / (held * devices))
        return read, 2 * tokens * choices * inner * width // devices
    if name != "tree_attention":
        return read, 0
    # layer, cached, queries [B, N, K, g, C] (padded), new keys and values [B, M, K, C], bits, caches [L, B, K, S, C]
    layers, _, _, slots, _ = operands[-1].dims
    for side in (-2, -1):
        read[side] = operands[side].bytes // layers * min(committed, slots) // slots
    queries, seen = operands[2].size, min(committed, slots) + operands[3].dims[1]
    return read, 4 * queries * seen


def taken(body: Computation) -> dict[str, float]:
    """Which share of each value inside a fusion is used: slices and gathers take less than all."""
    shares: dict[str, float] = {}
    for i in reversed(body.instructions.values()):  # users come after what they use
        share = 1.0 if i.is_root else 0.0
        for user in body.users[i.name]:
            first = user.operands[0] == i.name
            if user.opcode in ("slice", "dynamic-slice", "gather") and first:
                share += user.shapes[0].size * shares[user.name] / max(i.shapes[0].size, 1)
            elif not (user.opcode in ("dynamic-update-slice", "scatter") and first):  # those write in place
                share += shares[user.name]
        shares[i.name] = min(share, 1.0)
    return shares


def results(body: Computation) -> tuple[str, ...]:
    """The values that a fusion returns."""
    return body.root.operands if body.root.opcode == "tuple" else (body.root.name,)


def written_bytes(body: Computation, name: str) -> int:
    """What a fusion writes of one result."""
    i = body[name]
    while i.opcode in VIEWS:
        i = body[i.operands[0]]
    if i.opcode == "dynamic-update-slice":
        return body[i.operands[1]].shapes[0].bytes
    if i.opcode == "scatter":
        return sum(body[o].shapes[0].bytes for o in i.operands[2 * len(i.operands) // 3:])
    return sum(shape.bytes for shape in i.shapes)
