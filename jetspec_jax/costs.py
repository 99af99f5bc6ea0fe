"""What forwards cost this processor, timed once and kept on disk, and the tree that decodes fastest by it.

A processor reads the weights once for a few rows, and soon is bound by arithmetic instead: how many rows are cheap, and
whether matrices are better in tiles (`jetspec_jax.tiles`), differs between processors and with the cores that a process
may use. So it is measured, on some of the model's own layers.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from filelock import FileLock
from jax import Array
from tqdm import tqdm

from jetspec_jax.config import ACCEPT_NODES, DrafterConfig, HeadConfig, TargetConfig
from jetspec_jax.draft import Params
from jetspec_jax.errors import JetSpecError
from jetspec_jax.files import read_json
from jetspec_jax.layers import PRECISION
from jetspec_jax.machine import cores, processor, processor_details
from jetspec_jax.target import target_logits
from jetspec_jax.tiles import TILE, can_lie_in_tiles, in_layout, tiled_product
from pallas_kernels.gated_product.reference import gate

VERSION = 1  # of what is timed, and how
ROWS = (1, 2, 4, 8, 16, 32, 64)
MARGIN = 1.05  # by which a tree must win: what is not timed (attention, the tree itself) costs it more than one row
# Sweeps over the sample, in each of which every step may be disturbed: its fastest one counts. As many as fit into the
# seconds, for every number of rows.
LEAST_SWEEPS, MOST_SWEEPS, SECONDS = 3, 9, 0.4
_Part = tuple[Callable[[Any, Array], Array], list[Any]]  # (weights, x [1, rows, D]) -> the next x; weights to run over
SAMPLE_BYTES = 2**27  # of layers that are timed in turn: more than most processors keep in a cache


@dataclass(frozen=True)
class Costs:
    """Seconds of forwards over so many rows (`ROWS`) of weights in one layout.

    Attributes:
        tile: columns of a tile, or None for plain matrices.
        target: of the target's products.
        head: of the draft head's and the LM head's; None without a head.
    """

    tile: int | None
    target: tuple[float, ...]
    head: tuple[float, ...] | None

    def speeds(self, head: DrafterConfig | None, batch: int = 1) -> dict[int, float]:
        """Tokens per second to expect of `batch` sequences, by nodes a tree: of plain decoding (1), and of the trees of
        which the head knows how much they accept, as far as so many rows were timed."""
        found = {1: batch / _at(self.target, batch)}
        if isinstance(head, HeadConfig) and self.head is not None:
            for nodes, accepted in zip(ACCEPT_NODES, head.accept_lengths, strict=False):
                if batch * nodes <= ROWS[-1]:
                    drafted = _at(self.head, batch * (min(head.block_size, nodes) if head.causal else head.block_size))
                    found[nodes] = batch * accepted / (drafted + _at(self.target, batch * nodes))
        return found


def fastest_nodes(speeds: dict[int, float]) -> int:
    """The nodes of the fastest tree; 1 where none beats plain decoding."""
    return max(speeds, key=lambda nodes: _merit(nodes, speeds[nodes]))


def fastest_layout(layouts: tuple[Costs, ...], head: DrafterConfig | None) -> int | None:
    """The tile of the layout in which one sequence decodes fastest, or None for plain matrices."""
    return max(layouts, key=lambda costs: max(map(_merit, *zip(*costs.speeds(head).items(), strict=True)))).tile


def _merit(nodes: int, speed: float) -> float:
    return speed if nodes > 1 else MARGIN * speed


def costs_of(target: TargetConfig, head: DrafterConfig | None, params: Params, folder: Path) -> tuple[Costs, ...]:
    """What forwards of this pair cost this processor: from `folder`, or timed (some seconds, with a progress bar) and
    kept there.

    Args:
        target, head: of weights in any layout.
        folder: of files that are named after all that a cost depends on.

    Returns:
        Plain matrices, and tiles where the target's can lie in them.
    """
    layouts: list[int | None] = [None, TILE] if can_lie_in_tiles(target, params.target) else [None]
    description = _description(target, head)
    file = folder / f"{sha256(json.dumps(description).encode()).hexdigest()[:32]}.json"
    if (found := _read(file, layouts)) is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):  # two that timed at once would disturb each other
            if (found := _read(file, layouts)) is None:
                found = _time(target, head, params, layouts)
                _write(file, {**description, "costs": [asdict(costs) for costs in found]})
        return found
    except OSError:  # nothing can be kept there
        return _time(target, head, params, layouts)


def _description(target: TargetConfig, head: DrafterConfig | None) -> dict[str, Any]:
    """All that the costs depend on, for people too."""
    shapes = [repr(replace(config, weight_tile=None)) for config in (target, head) if config is not None]
    return {"processor": processor(), "details": sha256(processor_details().encode()).hexdigest(), "cores": cores(),
            "jax": jax.__version__, "version": VERSION, "shapes": shapes}


def _read(file: Path, layouts: list[int | None]) -> tuple[Costs, ...] | None:
    """What a file keeps; None where there is none, or one that makes no sense."""
    try:
        kept = read_json(file)["costs"]
        found = tuple(Costs(entry["tile"], tuple(entry["target"]), entry["head"] and tuple(entry["head"]))
                      for entry in kept)
    except (JetSpecError, KeyError, TypeError):
        return None
    seconds = [value for costs in found for part in (costs.target, costs.head) if part is not None for value in part]
    sound = all(isinstance(value, float) and 0 < value < float("inf") for value in seconds)
    lengths = {len(part) for costs in found for part in (costs.target, costs.head) if part is not None}
    return found if sound and lengths == {len(ROWS)} and [costs.tile for costs in found] == layouts else None


def _write(file: Path, contents: dict[str, Any]) -> None:
    """Beside, then renamed."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".partial", delete=False) as beside:
        try:
            json.dump(contents, beside, indent=1)
        except BaseException:
            os.unlink(beside.name)
            raise
    os.replace(beside.name, file)


def _time(target: TargetConfig, head: DrafterConfig | None, params: Params,
          layouts: list[int | None]) -> tuple[Costs, ...]:
    """Times a sample of the layers and the LM head in every layout, in turns.

    Layers count by their bytes: those of the head are built like the target's.
    """
    parts = [(tile, part) for tile in layouts for part in (_lm_head(target, params.target, tile),
                                                           _layers(target, params.target, tile))]
    work = [(rows, i) for rows in ROWS for i in range(len(parts))]
    best: dict[tuple[int, int], np.ndarray] = {}  # seconds of each step
    with ThreadPoolExecutor(cores()) as pool, tqdm(total=2 * len(work), leave=False, delay=0.5,
                                                   desc="timing this processor, once") as bar:

        def prepare(key: tuple[int, int]) -> Callable[[], np.ndarray]:
            rows, i = key
            sweep = _compiled(*parts[i][1], jnp.full((1, rows, target.hidden_size), 0.1, target.jnp_dtype))
            bar.update()
            return sweep

        sweeps = dict(zip(work, pool.map(prepare, work), strict=True))
        for rows in ROWS:
            mine = [(rows, i) for i in range(len(parts))]
            end = time.perf_counter() + SECONDS
            for turn in range(MOST_SWEEPS):
                if turn < LEAST_SWEEPS or time.perf_counter() < end:
                    for key in mine:
                        taken = sweeps[key]()
                        best[key] = np.minimum(taken, best.get(key, taken))
            bar.update(len(mine))
    seconds = {key: float(steps.sum()) for key, steps in best.items()}

    def costs(i: int, tile: int | None) -> Costs:
        def total(model: dict) -> tuple[float, ...]:
            layers = {name: tree for name, tree in model["params"].items() if name not in ("embedding", "lm_head")}
            scale = _bytes(layers) / _bytes(parts[i + 1][1][1])
            return tuple(seconds[rows, i] + scale * seconds[rows, i + 1] for rows in ROWS)

        return Costs(tile, total(params.target), None if head is None else total(params.head))

    return tuple(costs(2 * i, tile) for i, tile in enumerate(layouts))


def _lm_head(config: TargetConfig, params: dict, tile: int | None) -> _Part:
    """The LM head, and the best of its logits."""
    matrices = {name: tree for name, tree in params["params"].items() if name in ("embedding", "lm_head")}
    config, weights = in_layout(config, {"params": matrices}, tile)

    def run(weights: dict, x: Array) -> Array:
        best = jnp.argmax(target_logits(config, weights, x), axis=-1, keepdims=True)
        return x + 1e-9 * best.astype(x.dtype)

    return run, [weights]


def _layers(config: TargetConfig, params: dict, tile: int | None) -> _Part:
    """The products of the first layers, up to `SAMPLE_BYTES`."""
    sample = [params["params"]["layers_0"]]
    while len(sample) < min(config.num_layers, SAMPLE_BYTES // _bytes(sample[0])):
        sample.append(params["params"][f"layers_{len(sample)}"])
    config, sample = in_layout(config, sample, tile)
    product = partial(jnp.matmul, precision=PRECISION) if tile is None else tiled_product

    def run(layer: dict, x: Array) -> Array:
        qkv, out, gate_up, down = (layer[part][name]["kernel"] for part, name in (
            ("attention", "qkv_proj"), ("attention", "o_proj"), ("mlp", "gate_up_proj"), ("mlp", "down_proj")))
        x = x + product(product(x, qkv)[..., :out.shape[-2]], out)
        return x + product(gate(product(x, gate_up)), down)

    return run, sample


def _compiled(run: Callable[[Any, Array], Array], sample: list[Any], x: Array) -> Callable[[], np.ndarray]:
    """A sweep over a sample, each step on the result of the one before: how many seconds each took."""
    program = jax.jit(partial(run)).lower(sample[0], x).compile()

    def sweep() -> np.ndarray:
        state, times = x, [time.perf_counter()]
        for weights in sample:
            state = program(weights, state).block_until_ready()
            times.append(time.perf_counter())
        return np.diff(times)

    sweep()  # the first one touches memory
    return sweep


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _at(seconds: tuple[float, ...], rows: int) -> float:
    """Between two numbers of rows that were timed, and beyond them, on a straight line."""
    after = min(max(int(np.searchsorted(ROWS, rows)), 1), len(ROWS) - 1)
    (low, high), (start, end) = ROWS[after - 1:after + 1], seconds[after - 1:after + 1]
    return start + (end - start) * (rows - low) / (high - low)
