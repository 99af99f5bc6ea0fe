"""What forwards cost this processor, timed once and kept on disk, and the tree that decodes fastest by it.

A processor reads the weights once for a few rows, and soon is bound by arithmetic instead: how many rows are cheap, and
whether matrices are better in tiles (`jetspec_jax.tiles`), differs between processors and with the cores that a process
may use. So it is measured, on some of the model's own layers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
from jetspec_jax.files import read_json, write_text
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
        lm_head, layers: of the target's products.
        head_share: what all products of a draft head take of the target's layers: it is built like them, so bytes tell.
    """

    tile: int | None
    lm_head: tuple[float, ...]
    layers: tuple[float, ...]
    head_share: float = 0.0

    def speeds(self, head: DrafterConfig | None, batch: int = 1) -> dict[int, float]:
        """Tokens per second to expect of `batch` sequences, by nodes a tree: of plain decoding (1), and of the trees of
        which the head knows how much they accept, as far as so many rows were timed."""
        found = {1: batch / self._forward(batch, 1.0)}
        for nodes, accepted in zip(ACCEPT_NODES, known_lengths(head), strict=False):
            assert isinstance(head, HeadConfig)
            if batch * nodes <= ROWS[-1]:
                slots = min(head.block_size, nodes) if head.causal else head.block_size
                seconds = self._forward(batch * slots, self.head_share) + self._forward(batch * nodes, 1.0)
                found[nodes] = batch * accepted / seconds
        return found

    def plausible(self) -> bool:
        """Whether more rows hardly ever cost less; else other work disturbed the timing."""
        return all(later >= 0.75 * max(part[:i], default=0.0) for part in (self.lm_head, self.layers)
                   for i, later in enumerate(part))

    def _forward(self, rows: int, share: float) -> float:
        return _at(self.lm_head, rows) + share * _at(self.layers, rows)


def known_lengths(head: DrafterConfig | None) -> tuple[float, ...]:
    """What a head says that it accepts."""
    return head.accept_lengths if isinstance(head, HeadConfig) else ()


def fastest_nodes(speeds: dict[int, float]) -> int:
    """The nodes of the fastest tree; 1 where none beats plain decoding."""
    return max(speeds, key=lambda nodes: _merit(nodes, speeds[nodes]))


def fastest_layout(layouts: tuple[Costs, ...], head: DrafterConfig | None) -> int | None:
    """The tile of the layout in which one sequence decodes fastest, or None for plain matrices and where nothing was
    timed."""
    def best(costs: Costs) -> float:
        return max(_merit(nodes, speed) for nodes, speed in costs.speeds(head).items())

    return max(layouts, key=best).tile if layouts else None


def _merit(nodes: int, speed: float) -> float:
    return speed if nodes > 1 else MARGIN * speed


def costs_of(target: TargetConfig, head: DrafterConfig | None, params: Params, folder: Path) -> tuple[Costs, ...]:
    """What forwards of this pair cost this processor: from `folder`, or timed (some seconds, with a progress bar) and
    kept there, unless other work disturbed it.

    Args:
        target, head: of weights in any layout.
        folder: of files that are named after all that a cost depends on.

    Returns:
        Plain matrices, and tiles where the target's can lie in them; nothing where there is nothing to choose.
    """
    layouts: list[int | None] = [None, TILE] if can_lie_in_tiles(target, params.target) else [None]
    if len(layouts) == 1 and not known_lengths(head):
        return ()
    description = _description(target)
    file = folder / f"{sha256(json.dumps(description).encode()).hexdigest()[:32]}.json"
    found = _read(file, layouts)
    if found is None:
        with suppress(OSError):  # where nothing can be kept
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "lock"):  # two that timed at once would disturb each other
                found = _read(file, layouts)
                if found is None:
                    found = _time(target, params.target, layouts)
                    if all(costs.plausible() for costs in found):
                        write_text(file, json.dumps({**description, "costs": list(map(asdict, found))}, indent=1))
        found = found or _time(target, params.target, layouts)
    share = _layer_bytes(params.head) / _layer_bytes(params.target)
    return tuple(replace(costs, head_share=share) for costs in found)


def _description(target: TargetConfig) -> dict[str, Any]:
    """All that the costs depend on, for people too."""
    return {"processor": processor(), "details": sha256(processor_details().encode()).hexdigest(), "cores": cores(),
            "jax": jax.__version__, "version": VERSION, "rows": ROWS, "target": repr(replace(target, weight_tile=None))}


def _read(file: Path, layouts: list[int | None]) -> tuple[Costs, ...] | None:
    """What a file keeps; None where there is none, or one that makes no sense."""
    try:
        found = tuple(Costs(entry["tile"], tuple(entry["lm_head"]), tuple(entry["layers"]))
                      for entry in read_json(file)["costs"])
    except (JetSpecError, KeyError, TypeError):
        return None
    parts = [part for costs in found for part in (costs.lm_head, costs.layers)]
    sound = all(isinstance(value, float) and 0 < value < float("inf") for part in parts for value in part)
    whole = [costs.tile for costs in found] == layouts and all(len(part) == len(ROWS) for part in parts)
    return found if sound and whole else None


def _time(target: TargetConfig, params: dict, layouts: list[int | None]) -> tuple[Costs, ...]:
    """Times the LM head and a sample of the layers in every layout, in turns."""
    parts = {(part, tile): part(target, params, tile) for tile in layouts for part in (_lm_head, _layers)}
    work = [(rows, key) for rows in ROWS for key in parts]
    best: dict[Any, np.ndarray] = {}  # seconds of each step
    with ThreadPoolExecutor(cores()) as pool, tqdm(total=2 * len(work), leave=False, delay=0.5,
                                                   desc="timing this processor, once") as bar:

        def prepare(rows: int, key: Any) -> Callable[[], np.ndarray]:
            sweep = _compiled(*parts[key], jnp.full((1, rows, target.hidden_size), 0.1, target.jnp_dtype))
            bar.update()
            return sweep

        sweeps = dict(zip(work, pool.map(prepare, *zip(*work, strict=True)), strict=True))
        for rows in ROWS:
            end = time.perf_counter() + SECONDS
            for turn in range(MOST_SWEEPS):
                if turn < LEAST_SWEEPS or time.perf_counter() < end:
                    for key in parts:
                        taken = sweeps[rows, key]()
                        best[rows, key] = np.minimum(taken, best.get((rows, key), taken))
            bar.update(len(parts))

    def seconds(part: Any, tile: int | None, whole: int) -> tuple[float, ...]:
        scale = whole / _bytes(parts[part, tile][1])
        return tuple(scale * float(best[rows, (part, tile)].sum()) for rows in ROWS)

    matrices, layers = _bytes(_lm_head_params(params)), _layer_bytes(params)
    return tuple(Costs(tile, seconds(_lm_head, tile, matrices), seconds(_layers, tile, layers)) for tile in layouts)


def _lm_head(config: TargetConfig, params: dict, tile: int | None) -> _Part:
    """The LM head, and the best of its logits."""
    config, weights = in_layout(config, _lm_head_params(params), tile)

    def run(weights: dict, x: Array) -> Array:  # the next step depends on this one
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
    program = jax.jit(run).lower(sample[0], x).compile()

    def sweep() -> np.ndarray:
        state, times = x, [time.perf_counter()]
        for weights in sample:
            state = program(weights, state).block_until_ready()
            times.append(time.perf_counter())
        return np.diff(times)

    sweep()  # the first one touches memory
    return sweep


def _lm_head_params(params: dict) -> dict:
    """Embedding, and LM head where that is another matrix."""
    return {"params": {name: tree for name, tree in params["params"].items() if name in ("embedding", "lm_head")}}


def _layer_bytes(params: dict) -> int:
    """All parameters but embedding and LM head."""
    return _bytes([tree for name, tree in params.get("params", {}).items() if name not in ("embedding", "lm_head")])


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _at(seconds: tuple[float, ...], rows: int) -> float:
    """Between two numbers of rows that were timed, and beyond them, on a straight line."""
    after = min(max(int(np.searchsorted(ROWS, rows)), 1), len(ROWS) - 1)
    (low, high), (start, end) = ROWS[after - 1:after + 1], seconds[after - 1:after + 1]
    return start + (end - start) * (rows - low) / (high - low)
