"""From a compiled program to a list of launches: what each one is, where it belongs, what it moves and computes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from experiments.h100.compile import Program
from experiments.h100.costs import Cost, collective_of, cost_of
from experiments.h100.hlo import Instruction, Module, Shape

CONTAINERS = ("kWhile", "kCommandBuffer", "kSequential", "kConditional")
ASYNC = "kAsyncStart"  # of jax 0.11: what lies inside is the same launch once more
NOT_PLACES = ("", "shard_map", "while", "body", "cond", "branch_0_fun", "pallas_call", "dot_general")
HOST_OPCODES = ("infeed", "outfeed", "send", "recv", "send-done", "recv-done")


@dataclass(frozen=True)
class Thunk:
    """One line of XLA's launch sequence.

    Attributes:
        id: what its origin is filed under.
        kind: XLA's name of its class, e.g. kCustomKernel.
        kernel: name of the kernel, "" if it is not one of the module's own.
        grid: blocks launched.
        shared_bytes: dynamic shared memory of a block.
        loops: ids of the loops around it, outermost first.
        in_graph: whether a command buffer (CUDA graph) holds it.
    """

    id: int
    kind: str
    kernel: str
    grid: tuple[int, ...]
    shared_bytes: int
    loops: tuple[int, ...]
    in_graph: bool


@dataclass(frozen=True)
class Launch:
    """One launch of a round (or of whatever the program repeats).

    Attributes:
        label: what it is: "matmul", "copy", "fusion", "topk", "all-reduce", or the name of a kernel of ours.
        kernel: name of the compiled kernel, "" for library calls and copies.
        scope: the path of named scopes and modules it was traced under.
        times: how often it is launched.
        cost: bytes and operations of one launch.
        grid, shared_bytes: as in `Thunk`.
        results: what it returns; a result that is written in place counts in full here.
    """

    label: str
    kernel: str
    scope: str
    times: int
    cost: Cost
    grid: tuple[int, ...]
    shared_bytes: int
    results: tuple[Shape, ...]

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)

    @property
    def moves(self) -> bool:
        """Whether it is neither a product nor a kernel of ours, so that what it does may be a mere copy."""
        return self.label in ("copy", "fusion", "transpose", "dynamic-slice", "dynamic-update-slice")

    @property
    def place(self) -> str:
        """Phase of the round and innermost named part, e.g. "verify gate_up_proj"."""
        steps = [step for step in re.sub(r"jit\([^)]*\)", "", self.scope).split("/") if step not in NOT_PLACES]
        return " ".join(dict.fromkeys((steps[0], steps[-1]))) if steps else ""

    def layer(self, part: str) -> int | None:
        """Which decoder layer of the `part` ("verify": the target's, "draft": the head's) it belongs to."""
        found = re.search(rf"/{part}/.*\blayers_(\d+)\b", self.scope)
        return int(found.group(1)) if found else None


def read_thunks(text: str) -> list[Thunk]:
    """Parses XLA's listing; what lies deeper than a loop or a command buffer is inside it."""
    thunks: list[Thunk] = []
    around: list[tuple[int, Thunk]] = []  # (indentation, container)
    for line in text.splitlines():
        found = re.match(r"( *)(\d+): (k\w+)\s+\[[^\]]*\]\s*(.*)", line)
        if not found:
            continue
        indent = len(found.group(1))
        while around and around[-1][0] >= indent:
            around.pop()
        if any(container.kind == ASYNC for _, container in around):
            continue
        kernel = re.match(r"(\S+) grid: \[([\d, ]+)\] .*shared_memory: (\d+)", found.group(4))
        thunk = Thunk(
            id=int(found.group(2)), kind=found.group(3), kernel=kernel.group(1) if kernel else "",
            grid=tuple(int(n) for n in kernel.group(2).split(",")) if kernel else (),
            shared_bytes=int(kernel.group(3)) if kernel else 0,
            loops=tuple(t.id for _, t in around if t.kind == "kWhile"),
            in_graph=any(t.kind == "kCommandBuffer" for _, t in around))
        thunks.append(thunk)
        if thunk.kind in (*CONTAINERS, ASYNC):
            around.append((indent, thunk))
    return thunks


def read_origins(text: str) -> dict[int, str]:
    """Thunk id -> name of its instruction."""
    origins = {}
    for entry in text.split("thunk_metadata {")[1:]:
        name = re.search(r'profile_annotation: "([^"]*)"', entry)
        number = re.search(r"thunk_id: (\d+)", entry)
        if name:
            origins[int(number.group(1)) if number else 0] = name.group(1)
    return origins


@dataclass(frozen=True)
class Sequence:
    """What a program launches.

    Attributes:
        launches: those of one round, or of the whole program.
        host_syncs: how often the host evaluates a condition in a round.
        host_launches: launches that the host makes one by one, outside any graph in a round.
        host_graphs: graphs that the host launches in a round; none where one graph holds all rounds.
        host_transfers: instructions that exchange data with the host.
    """

    launches: list[Launch]
    host_syncs: int
    host_launches: int
    host_graphs: int
    host_transfers: int


def read_sequence(program: Program, committed: int, repetitions: int = 1, whole: bool = False) -> Sequence:
    """The launches of a compiled program.

    Args:
        committed: cache slots that attention really reads (the arrays' shapes only tell how many there are).
        repetitions: how often a loop of unknown length runs; 1 gives what one round does.
        whole: whether what comes before and after such a loop counts too.
    """
    module, origins = Module(program.hlo), read_origins(program.origins)
    thunks = read_thunks(program.thunks)
    trips: dict[int, int | None] = {}
    for thunk in thunks:
        if thunk.kind == "kWhile":
            name = origins[thunk.id]
            trips[thunk.id] = module.home[name][name].trips
    rounds_only = not whole and any(count is None for count in trips.values())
    launches, syncs, alone, graphs = [], 0, 0, 0
    for thunk in thunks:
        if rounds_only and thunk.kind != "kWhile" and not any(trips[loop] is None for loop in thunk.loops):
            continue
        times = math.prod(trips[loop] or repetitions for loop in thunk.loops)
        if thunk.kind == "kWhile" and trips[thunk.id] is None and not thunk.in_graph:
            syncs += times * repetitions
        if thunk.kind == "kCommandBuffer":
            graphs += times
        if thunk.kind in CONTAINERS:
            continue
        name = origins[thunk.id]
        instruction = module.home[name][name]
        if instruction.opcode.endswith("-done"):  # waits for what was launched before
            continue
        alone += 0 if thunk.in_graph else times
        cost = cost_of(module, instruction, committed)
        launches.append(Launch(label=label_of(instruction, cost), kernel=thunk.kernel, scope=instruction.scope,
                               times=times, cost=cost, grid=thunk.grid, shared_bytes=thunk.shared_bytes,
                               results=instruction.shapes))
    return Sequence(launches, syncs, alone, graphs, sum(1 for _ in host_transfers(program, module)))


def label_of(instruction: Instruction, cost: Cost) -> str:
    """What a launch is, in one word; a Pallas kernel goes by its own name."""
    kernel = re.search(r"(\w+)/pallas_call$", instruction.scope)
    if instruction.opcode == "custom-call" and kernel:
        return kernel.group(1)
    # The product of one row with a matrix is a reduction to XLA.
    if instruction.scope.endswith("dot_general") and any(s.is_weight and s.whole for s in cost.sources):
        return "matmul"
    if collective := collective_of(instruction):
        return collective
    if instruction.opcode == "custom-call":
        return "matmul" if "matmul" in instruction.target else instruction.target.strip("_").split("$")[-1].lower()
    return {"fusion": "fusion", "copy": "copy"}.get(instruction.opcode, instruction.opcode)


def host_transfers(program: Program, module: Module) -> Iterator[str]:
    """Names of instructions that exchange data with the host or keep arrays in its memory."""
    for computation in module.computations.values():
        for i in computation.instructions.values():
            if i.opcode in HOST_OPCODES or "callback" in i.target or "host" in i.target.lower():
                yield i.name
    yield from re.findall(r"%([\w.\-]+) = \S*:S\(5\)", program.hlo)


def weight_copies(launches: list[Launch]) -> int:
    """Bytes of launches that do nothing but move a whole weight matrix."""
    return sum(launch.times * launch.cost.bytes for launch in launches if launch.moves and any(
        source.is_weight and source.whole and launch.cost.written >= source.read // 2
        for source in launch.cost.sources))


def expert_bytes(launches: list[Launch]) -> int:
    """Bytes of experts' weights that are read."""
    return sum(launch.times * source.read for launch in launches for source in launch.cost.sources
               if launch.label.startswith("grouped_") and source.is_weight)


def weight_collectives(launches: list[Launch]) -> int:
    """Bytes of weights that devices send to each other."""
    return sum(launch.times * launch.cost.sent for launch in launches
               if any(source.is_weight for source in launch.cost.sources))


def cache_copies(launches: list[Launch], slots: int) -> int:
    """Bytes of launches that move at least a layer of a cache [L, B, K, S, C], whatever they are made from."""
    total = 0
    for launch in launches:
        for shape in launch.results if launch.moves else ():
            layer = math.prod(shape.dims[-3:]) if len(shape.dims) >= 3 and shape.dims[-2] == slots else 0
            if layer and launch.cost.written >= layer:
                total += launch.times * launch.cost.bytes
    return total
